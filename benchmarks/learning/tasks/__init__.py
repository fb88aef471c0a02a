"""The tasks: one file each, which says what is generated and where the definition comes from."""

import importlib

SIZES = ("small", "full")
TASKS = {
    "mqar": "mqar",
}


def make(name, size):
    """The `Task` of a name, in a size: `"small"` for two CPU cores, `"full"` for a large GPU."""
    module = importlib.import_module(f"benchmarks.learning.tasks.{TASKS[name]}")
    return module.make(name, size)
