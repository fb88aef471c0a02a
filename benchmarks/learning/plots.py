"""The plot of a task: the result of each mixer in each test, and its training curve."""

import statistics

from benchmarks.learning.report import spread


def save(found, task, path):
    """Plots the `Line`s of a task."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    height = 2 + 0.35 * len(found)
    figure, (left, right) = plt.subplots(1, 2, figsize=(18, height), layout="constrained")
    _tests(left, found, task)
    _curves(right, found, task)
    figure.suptitle(f"{task.name}: mean over the seeds; lines are the standard deviation")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _tests(ax, found, task):
    names = list(dict.fromkeys(name for line in found for name in line.tests))
    height = 0.8 / len(names)
    for n, name in enumerate(names):
        mean, deviation = zip(*(spread(line.tests[name]) for line in found), strict=True)
        y = [place + (n - (len(names) - 1) / 2) * height for place in range(len(found))]
        ax.barh(y, mean, height, xerr=deviation, label=name, error_kw={"linewidth": 1})
    ax.set_yticks(range(len(found)), [_label(line) for line in found])
    ax.invert_yaxis()
    ax.set_xlabel(task.metric)
    ax.legend(fontsize="small")
    if task.metric == "bits":
        ax.set_xlim(left=0.9 * min(min(values) for line in found for values in line.tests.values()))


def _curves(ax, found, task):
    for n, line in enumerate(found):
        points = list(zip(*line.curves, strict=True))
        steps = int(line.settings["steps"])
        x = [steps * (i + 1) / len(points) for i in range(len(points))]
        style = ("-", "--", ":")[n // 10 % 3]
        ax.plot(x, [statistics.mean(y) for y in points], style, label=_label(line))
    ax.set_xlabel("step")
    ax.set_ylabel(f"{task.metric} in training")
    if task.metric != "accuracy":
        ax.set_yscale("log")
    ax.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves


def _label(line):
    return f"{line.mixer}, {line.settings['width']}, {line.settings['steps']} steps"
