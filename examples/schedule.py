"""The learning rate of the examples that train."""

import keras


def warmup_cosine(peak, steps):
    """Rises to the peak in a tenth of the steps, then falls along a cosine to 2 % of it."""
    warmup = max(1, steps // 10)
    return keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=max(1, steps - warmup),
        alpha=0.02,
        warmup_target=peak,
        warmup_steps=warmup,
    )
