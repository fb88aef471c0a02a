"""The file of a task: a row for each replicate that was trained, without exception."""

import csv
from pathlib import Path

SETTINGS = ("task", "size", "mixer", "width", "steps", "batch", "dtype")


class Records:
    """Rows in `FOLDER/TASK.csv`, kept when the program ends.

    Args:
        folder: where the file is, or will be.
        task: name of the task.
    """

    def __init__(self, folder, task):
        self.path = Path(folder) / f"{task}.csv"
        self.rows = []
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))

    def find(self, settings, **values):
        """The rows with these `SETTINGS` and these values of other columns."""
        wanted = {name: str(value) for name, value in {**settings, **values}.items()}
        return [
            row for row in self.rows if all(row[name] == value for name, value in wanted.items())
        ]

    def add(self, rows):
        """Appends rows, dictionaries with equal columns, to the file."""
        rows = [{name: _text(value) for name, value in row.items()} for row in rows]
        names = list(self.rows[0]) if self.rows else list(rows[0])
        if any(set(row) != set(names) for row in rows):
            raise ValueError(
                f"Rows must have the columns of {self.path}: {names}. Received: {list(rows[0])}"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.rows
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerows(rows)
        self.rows += rows


def _text(value):
    return f"{value:.6g}" if isinstance(value, float) else str(value)
