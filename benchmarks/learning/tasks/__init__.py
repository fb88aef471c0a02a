"""The tasks: one file each, which says what it generates and who defined the task."""

import importlib

SIZES = ("small", "full")
#: The file of each task.
TASKS = {
    "mqar": "mqar",
    "language": "language",
    "series": "series",
    "parity": "state_tracking",
    "s3": "state_tracking",
    "s5": "state_tracking",
    "selective_copy": "selective_copy",
    "in_context_recall": "in_context_recall",
    "copy": "copying",
    "far": "far",
}


def make(name, size):
    """The `Task` of a name, in a size: `"small"` for two CPU cores, `"full"` for a large GPU."""
    module = importlib.import_module(f"benchmarks.learning.tasks.{TASKS[name]}")
    return module.make(name, size)
