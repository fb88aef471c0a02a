"""The table of a task: each mixer at its best learning rate, mean and spread over the seeds."""

from collections import Counter
import statistics
from typing import Any, NamedTuple

from benchmarks.learning.records import SETTINGS
from benchmarks.learning.schedule import best_rate


class Line(NamedTuple):
    """A mixer in one setting, at its best learning rate.

    It is the best of the rates with the most seeds: a rate that has not been trained with all seeds
    yet replaces none that has. `edge` tells whether the best rate of all was the smallest or the
    largest that was tried. `tests` are the values of all seeds by the name of the test, `steps`
    those to 0.99.
    """

    mixer: str
    settings: dict
    rate: float
    edge: bool
    weights: int
    state: int
    tests: dict
    steps: list
    diverged: int
    curves: list


def lines(rows, metric):
    """A `Line` of each setting of the rows: the longest training first, and there the best one."""
    groups: dict[tuple, list[Any]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SETTINGS), []).append(row)
    found = [_line(group, metric) for group in groups.values()]
    sign = -1 if metric == "accuracy" else 1

    def order(line):
        steps, width = int(line.settings["steps"]), int(line.settings["width"])
        return -steps, -width, sign * statistics.mean(next(iter(line.tests.values())))

    return sorted(found, key=order)


def _line(rows, metric):
    tried = Counter(float(row["rate"]) for row in rows)
    most = max(tried.values())
    rate = best_rate(rows, [rate for rate, seeds in tried.items() if seeds == most])
    best = [row for row in rows if float(row["rate"]) == rate]
    tests = {
        name.removeprefix(f"{metric} "): [float(row[name]) for row in best]
        for name in best[0]
        if name.startswith(f"{metric} ")
    }
    return Line(
        best[0]["mixer"],
        {name: best[0][name] for name in SETTINGS},
        rate,
        len(tried) > 1 and best_rate(rows) in (min(tried), max(tried)),
        int(best[0]["weights"]),
        int(best[0]["state"]),
        tests,
        [row.get("steps to 0.99", "") for row in best],
        sum(int(row["diverged"]) for row in rows),
        [[float(x) for x in row["curve"].split()] for row in best],
    )


def spread(values):
    """The mean and the standard deviation."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(found):
    """The lines as a Markdown table."""
    tests = list(dict.fromkeys(name for line in found for name in line.tests))
    stepped = any(any(line.steps) for line in found)
    head = ["mixer", "width", "steps", "weights", "state", "rate", "seeds", *tests]
    head += ["steps to 0.99"] * stepped
    text = [head, ["---"] * len(head)]
    for line in found:
        cells = [line.mixer, line.settings["width"], line.settings["steps"]]
        cells += [f"{line.weights:,}", f"{line.state:,}"]
        cells += [f"{line.rate:g}" + " (edge)" * line.edge, str(len(line.curves))]
        cells += ["{:.4g} ± {:.2g}".format(*spread(line.tests[name])) for name in tests]
        cells += [_steps(line.steps)] * stepped
        text.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in text)


def _steps(steps):
    """The median over the seeds, if more than half of them reached the accuracy."""
    passed = [float(x) if x else float("inf") for x in steps]
    median = statistics.median_high(passed)
    return "" if median == float("inf") else f"{median:.0f}"


def show(task, records, folder):
    """Prints the table of a task, and saves it and its plot beside the records."""
    found = lines(records.rows, task.metric)
    if not found:
        return
    text = table(found)
    print(f"\n{task.name}: {task.metric}, mean ± standard deviation over the seeds\n\n{text}")
    (folder / f"{task.name}.md").write_text(text + "\n", encoding="utf-8")
    try:
        from benchmarks.learning.plots import save

        save(found, task, folder / f"{task.name}.png")
    except ImportError as error:
        print(f"No plot was saved: {error}")
