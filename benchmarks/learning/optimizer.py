"""AdamW for weights in a list, with a bounded gradient and one cycle of the learning rate."""

import jax
import jax.numpy as jnp

BETAS = 0.9, 0.95
EPSILON = 1e-8
WEIGHT_DECAY = 0.1
LARGEST_NORM = 1.0
WARM_UP = 0.1  # share of the steps


def start(weights):
    """The moments before the first step."""
    return [jnp.zeros_like(x) for x in weights], [jnp.zeros_like(x) for x in weights]


def rate_at(step, steps, peak):
    """The learning rate: linear to its peak, then half a cosine to zero."""
    warm = max(1, round(WARM_UP * steps))
    fall = 0.5 * (1 + jnp.cos(jnp.pi * (step + 1 - warm) / max(1, steps - warm)))
    return peak * jnp.minimum((step + 1) / warm, fall)


def update(weights, moments, gradients, step, rate):
    """The weights and moments after a step. Only matrices decay."""
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in gradients))
    shrink = jnp.minimum(1.0, LARGEST_NORM / (norm + 1e-6))
    first, second = moments
    gradients = [shrink * x for x in gradients]
    first = _mean(first, gradients, BETAS[0])
    second = _mean(second, [jnp.square(x) for x in gradients], BETAS[1])
    mend = [1 - beta ** (step + 1.0) for beta in BETAS]

    def moved(x, m, v):
        change = (m / mend[0]) / (jnp.sqrt(v / mend[1]) + EPSILON)
        return x - rate * (change + (WEIGHT_DECAY * x if x.ndim > 1 else 0.0))

    return jax.tree.map(moved, weights, first, second), (first, second)


def _mean(means, values, beta):
    return [beta * mean + (1 - beta) * x for mean, x in zip(means, values, strict=True)]
