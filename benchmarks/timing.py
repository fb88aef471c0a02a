"""Times of several functions, called alternately until each had its seconds."""

import time
from typing import NamedTuple

import numpy as np

LEAST = 5  # turns, unless they take more than
PATIENCE = 10  # times the seconds
MOST = 300


class Times(NamedTuple):
    """Times in milliseconds: the median, the quartiles, and all samples in order."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...] = ()

    def ratio(self, other):
        """The median ratio of samples that were measured in the same turn."""
        count = min(len(self.samples), len(other.samples))
        if not count:
            return self.median / other.median
        return float(np.median(np.divide(self.samples[:count], other.samples[:count])))


def in_turns(samples, seconds):
    """Measures functions alternately, so that a busy machine affects all of them alike.

    Args:
        samples: dictionary of functions that return lists of milliseconds.
        seconds: time to spend on each of them, after one turn that is discarded.

    Returns:
        A dictionary of `Times`, or of the exception that a function raised.
    """
    found: dict[str, list[float]] = {name: [] for name in samples}
    spent = dict.fromkeys(samples, 0.0)
    results: dict[str, Times | Exception] = {}
    turn = 0
    while waiting := [name for name in samples if name not in results]:
        for name in waiting:
            begin = time.perf_counter()
            try:
                milliseconds = samples[name]()
            except Exception as error:  # a peer that ran out of memory, say
                results[name] = error
                continue
            if turn:
                spent[name] += time.perf_counter() - begin
                found[name] += milliseconds
            enough = spent[name] >= seconds * (1 if turn >= LEAST else PATIENCE)
            if turn and (enough or turn >= MOST):
                low, median, high = np.quantile(found[name], (0.25, 0.5, 0.75))
                results[name] = Times(float(median), float(low), float(high), tuple(found[name]))
        turn += 1
    return results


def on_cpu(call, arguments, synchronize=lambda result: result):
    """One time in milliseconds: of the second of two calls, the first of which warms the caches."""
    synchronize(call(*arguments))
    begin = time.perf_counter()
    synchronize(call(*arguments))
    return [1e3 * (time.perf_counter() - begin)]


def on_gpu(call, argument_sets, synchronize):
    """One mean time in milliseconds of calls that are in the device's queue together."""
    synchronize(call(*argument_sets[0]))
    begin = time.perf_counter()
    for arguments in argument_sets:
        result = call(*arguments)
    synchronize(result)
    return [1e3 * (time.perf_counter() - begin) / len(argument_sets)]
