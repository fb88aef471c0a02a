"""How the examples measure time and memory."""

import multiprocessing
import time

import numpy as np


def median_times(functions, repeats):
    """Milliseconds of each of a dictionary of functions, called in turns.

    A turn is two calls, of which the second counts: so that none pays for the
    memory and the caches that another left behind.
    """
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            function()
            begin = time.perf_counter()
            function()
            if repeat:  # after compiling and warming up
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: float(np.median(values)) for name, values in times.items()}


def resident_memory(field="VmRSS"):
    """`VmRSS` or, for the peak, `VmHWM`, in MB; NaN on systems that do not tell."""
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            (line,) = (line for line in status if line.startswith(field))
    except OSError:
        return float("nan")
    return int(line.split()[1]) / 1024


def added_memory(function):
    """MB by which the peak of this process rises in a call; meant for a fresh process."""
    before = resident_memory()
    function()
    return resident_memory("VmHWM") - before


def in_fresh_process(function, *arguments):
    """Calls a function of a module's top level in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        return processes.apply(function, arguments)
