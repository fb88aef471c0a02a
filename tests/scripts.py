"""Separate Python processes, for what one process cannot show."""

import os
from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).parent.parent


def run_python(*arguments, backend=None, optimize=False, folder=ROOT):
    """Runs Python in a folder, by default the repository's root, and returns what it printed.

    With `optimize` JAX compiles as it does for users.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if optimize:
        for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):
            environment.pop(name, None)
    if backend is not None:
        environment["KERAS_BACKEND"] = backend
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
