"""Which replicates are trained: all learning rates with seed 0, then the best one with others."""

import math

from benchmarks.learning.train import Replicate

SWEEP_SEED = 0


def missing(records, settings, rates, seeds):
    """The replicates that are to be trained next: a list, empty if none is missing.

    The best rate is that of the smallest validation loss.
    """
    there = records.find(settings)
    trained = {(float(row["rate"]), int(row["seed"])) for row in there}
    sweep = [Replicate(rate, SWEEP_SEED) for rate in rates]
    lacking = [x for x in sweep if x not in trained]
    if lacking:
        return lacking
    best = best_rate(there, rates)
    return [x for seed in range(seeds) if (x := Replicate(best, seed)) not in trained]


def best_rate(rows, rates=None):
    """The learning rate of the smallest validation loss, with the seed of the sweep."""
    sweep = [
        row
        for row in rows
        if int(row["seed"]) == SWEEP_SEED and (rates is None or float(row["rate"]) in rates)
    ]
    return float(min(sweep, key=_valid_loss)["rate"])


def _valid_loss(row):
    loss = float(row["valid loss"])
    return float("inf") if math.isnan(loss) else loss  # NaN where it diverged
