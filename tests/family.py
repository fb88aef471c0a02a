"""The operators with their options, random problems for them, and calls of them."""

import functools

from backends import compiled, value_and_gradients
import keras
import numpy as np

from keras_hla import ops

VARIANTS = {
    "linear": {},
    "hla2": {},
    "hla2 ridge": {"ridge": 0.3},
    "hla2 unmasked": {"masked": False},
    "hla2 unmasked ridge": {"masked": False, "ridge": 0.3},
    "ahla": {},
    "hla3": {},
    "hla3 unmasked": {"masked": False},
    "hla2_published": {},
    "hla2_published ridge": {"ridge": 0.3},
    "hla3_published": {},
}
VARIANTS = {name: {"operator": name.split()[0], **options} for name, options in VARIANTS.items()}
# Options of a layer that is little more than its operator.
PLAIN = {"decay": None, "conv_kernel_size": None}
PROBLEMS = ("none", "decay", "normalized")
FORMS = ("chunked", "recurrent", "matrix")
FORWARD, GRADIENT = 1e-5, 1e-4  # largest relative RMS errors in float32


def draw(rng, length, decay, heads=2, key_heads=None, dim=8, value_dim=5, batch=2, positive=False):
    """Arrays of query, key and value, and the log-decay or `None`, all in float32."""
    key_heads = key_heads or heads
    q = rng.standard_normal((batch, length, heads, dim))
    k = rng.standard_normal((batch, length, key_heads, dim))
    v = rng.standard_normal((batch, length, key_heads, value_dim))
    if positive:
        q, k = np.abs(q), np.abs(k)
    log_decay = {
        "none": None,
        "constant": np.full((batch, length, heads), np.log(0.9)),
        "per_token": np.log(rng.uniform(0.5, 1.0, (batch, length, heads))),
    }[decay]
    inputs = [x.astype("float32") for x in (q, k, v)]
    return inputs, None if log_decay is None else log_decay.astype("float32")


def draw_to_normalize(rng, length, variant):
    """`draw`, but so that the denominators of normalized outputs are far from zero."""
    # Those of the published operators change their sign where there is decay.
    return draw(rng, length, "none" if "published" in variant else "per_token", positive=True)


def draw_problem(rng, length, variant, problem):
    """The inputs, the log-decay, and whether outputs are normalized."""
    if problem == "normalized":
        return *draw_to_normalize(rng, length, variant), True
    if problem == "decay":  # the paper's is constant
        problem = "constant" if "published" in variant else "per_token"
    return *draw(rng, length, problem), False


def split(variant):
    """The operator's name, and its options for the definitions."""
    options = dict(VARIANTS[variant])
    return options.pop("operator"), options


def like(rng, arrays):
    """Random arrays of the same shapes, in float32."""
    return [rng.standard_normal(x.shape).astype("float32") for x in arrays]


@functools.cache
def _attention(decays, **options):
    def function(q, k, v, *rest):
        g, rest = (rest[0], rest[1:]) if decays else (None, rest)
        return ops.higher_order_attention(
            q, k, v, log_decay=g, initial_state=list(rest) or None, **options
        )

    return function


@functools.cache
def _compiled(decays, **options):
    return compiled(_attention(decays, **options))


def attend(inputs, log_decay=None, state=(), **options):
    """`higher_order_attention` on arrays."""
    arrays = [*inputs, *([] if log_decay is None else [log_decay]), *state]
    tensors = [keras.ops.convert_to_tensor(x) for x in arrays]
    return _compiled(log_decay is not None, **options)(*tensors)


@functools.cache
def _loss(decays, states, **options):
    """The output and the last states, weighted and summed."""
    attention = _attention(decays, return_state=bool(states), **options)

    def function(*arguments):
        count = 3 + decays + states
        inputs, weights = arguments[:count], arguments[count:]
        result = attention(*inputs)
        results = [result[0], *result[1]] if states else [result]
        products = (keras.ops.sum(x * w) for x, w in zip(results, weights, strict=True))
        return sum(products), results

    return function


def attend_with_gradients(inputs, log_decay, weights, state=(), **options):
    """Returns the output and the last states, and the gradients of their weighted sum.

    Args:
        inputs: arrays of query, key and value.
        log_decay: array, or `None`.
        weights: arrays, for the output and, if there is a state, for the last states.
        state: list of arrays, or nothing.
        **options: those of `higher_order_attention`.
    """
    decays = log_decay is not None
    arrays = [*inputs, *([log_decay] if decays else []), *state]
    return value_and_gradients(_loss(decays, len(state), **options), arrays, weights)
