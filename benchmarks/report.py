"""Prints results as a table, and saves them as a CSV file."""

import csv
from dataclasses import dataclass, field


@dataclass
class Row:
    """One contender on one case.

    Args:
        case: description of the case.
        name: the contender.
        operator: operator that it computes.
        times: `timing.Times` by column.
        errors: relative errors, by the name of the result.
        megabytes: memory in MB.
        implementation: what computed the result, and why.
        note: why there is no time.
        failed: whether keras_hla raised an error, or the result is wrong.
    """

    case: str
    name: str
    operator: str = ""
    times: dict = field(default_factory=dict)
    errors: dict = field(default_factory=dict)
    megabytes: float | None = None
    implementation: str = ""
    note: str = ""
    failed: bool = False

    def refuse(self, tolerance):
        """Whether an error is too large; notes it if so."""
        wrong = {name: error for name, error in self.errors.items() if not error <= tolerance}
        if wrong:
            self.failed = True
            listed = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
            self.note = f"WRONG, not timed: relative error of {listed}"
        return bool(wrong)

    def give_up(self, error, failed):
        """Notes an exception."""
        lines = [x for x in map(str.strip, str(error).splitlines()) if x]
        if len(lines) > 1 and lines[0].startswith("Exception encountered"):  # by Keras, in a layer
            del lines[0]
        self.times, self.failed, self.implementation = {}, failed, ""
        self.note = f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def print_table(rows):
    """Prints the rows of one case, with the columns that any of them has.

    The ratio is the time in the last column over that of the first row that has times.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row.times))
    header = ["", *(f"{column}, ms" for column in columns)]
    errors = any(row.errors for row in rows)
    memory = any(row.megabytes is not None for row in rows)
    named = any(row.implementation for row in rows)
    header += ["ratio"] * bool(columns) + ["MB"] * memory
    header += ["output error", "gradient error"] * errors
    header += ["implementation"] * named
    first = next((row for row in rows if row.times), None)
    lines = [header]
    for row in rows:
        line = [row.name]
        if row.note:
            lines.append([*line, row.note])
            continue
        line += [_times(row.times.get(column)) for column in columns]
        if columns:
            line.append(_ratio(row, first, columns[-1]))
        if memory:
            line.append("" if row.megabytes is None else f"{row.megabytes:,.1f}")
        if errors:
            line += [_largest(row, gradients) for gradients in (False, True)]
        lines.append(line + [row.implementation] * named)
    _print_aligned(rows[0].case, lines, named)


def _times(times):
    if times is None:
        return ""
    median, low, high = (f"{x:.3g}" if x < 100 else f"{x:,.0f}" for x in times[:3])
    return f"{median} [{low}, {high}]"


def _ratio(row, first, column):
    if column not in row.times or column not in first.times:
        return ""
    return f"{row.times[column].ratio(first.times[column]):.2f}"


def _largest(row, gradients):
    errors = [error for name, error in row.errors.items() if name.startswith("d") == gradients]
    return f"{max(errors):.1e}" if errors else ""


def _print_aligned(title, lines, words):
    """Prints aligned lines of cells: words in the first, and with `words` in the last cell."""
    count = max(map(len, lines))
    full = [line for line in lines if len(line) == count]
    widths = [max(len(line[n]) for line in full) for n in range(count)]
    widths[0] = max(len(line[0]) for line in lines)
    print(f"\n{title}")
    for line in lines:
        name, *cells = line
        if len(line) == count:
            cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            cells[-1] = line[-1] if words else cells[-1]
        print("  ".join([f"  {name:{widths[0]}}", *cells]).rstrip(), flush=True)


def save_csv(rows, path, **same):
    """Writes all rows; `same` are columns with the same value in each row."""
    records = []
    for row in rows:
        record = {**same, "case": row.case, "contender": row.name, "operator": row.operator}
        for column, times in row.times.items():
            for name in ("median", "low", "high"):
                record[f"{column} ms {name}"] = getattr(times, name)
        record |= {f"error of {name}": value for name, value in row.errors.items()}
        record |= {"MB": row.megabytes, "implementation": row.implementation}
        records.append(record | {"failed": row.failed, "note": row.note})
    names = list(dict.fromkeys(name for record in records for name in record))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
