"""Memory of a CPU process, which no backend reports."""

import multiprocessing


def resident(field="VmRSS"):
    """`VmRSS` or, for the peak, `VmHWM`, in MB; NaN on systems that do not report it."""
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            (line,) = (line for line in status if line.startswith(field))
    except OSError:
        return float("nan")
    return int(line.split()[1]) / 1024


def in_fresh_process(function, *arguments):
    """Calls a function of a module's top level in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        return processes.apply(function, arguments)


def added(make, small, large):
    """MB by which the peak of a fresh process rises in a call.

    Args:
        make: function of a module's top level that returns the function to be called.
        small: tuple of arguments of `make`, for a first call that loads what any call needs.
        large: tuple of arguments for the call that is measured.
    """
    return in_fresh_process(_added, make, small, large)


def _added(make, small, large):
    make(*small)()
    call = make(*large)
    before = resident()
    call()
    return resident("VmHWM") - before
