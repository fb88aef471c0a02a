"""The weights of an operator, for inspection."""

from keras import ops

from keras_hla import forms, operators
from keras_hla.checks import check_noncausal, check_number, check_rank
from keras_hla.grouping import ungroup
from keras_hla.inputs import prepare
from keras_hla.operators import Operator
from keras_hla.ops.functional import functional
from keras_hla.types import Tensor


@functional
def attention_weights(
    query: Tensor,
    key: Tensor,
    operator: str | Operator = "hla2",
    log_decay: Tensor | None = None,
    masked: bool = True,
    normalize: bool = False,
    epsilon: float = 1e-6,
    ridge: float = 0.0,
    causal: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Returns the weights of the values in each output of `higher_order_attention`.

    The weight of value `j` in output `t` is, for the default operator `"hla2"`,

        w_tj = Σ_{i≤j} a(i→t) a(j→t) (q_t·k_i) (k_i·q_j)  for j <= t, else 0

    Time and memory grow with the square of the length.

    Args:
        query: Tensor of shape `(batch, length, heads, dim)`.
        key: Tensor of shape `(batch, length, key_value_heads, dim)`.
        operator: As in `higher_order_attention`.
        log_decay: As in `higher_order_attention`.
        masked: As in `higher_order_attention`.
        normalize: Whether each row is divided by its sum plus `epsilon`.
        epsilon: Positive number.
        ridge: As in `higher_order_attention`.
        causal: As in `higher_order_attention`.
        mask: As in `higher_order_attention`.

    Returns:
        Tensor of shape `(batch, heads, length, length)`: float32, or float64 for
        float64 inputs.

    Raises:
        ValueError: as `higher_order_attention`.

    Example:

    >>> q = k = keras.random.normal((2, 100, 4, 16))
    >>> tuple(keras_hla.ops.attention_weights(q, k, operator="ahla").shape)
    (2, 4, 100, 100)
    """
    operator = operators.get(operator, masked, ridge)
    check_number("epsilon", epsilon, "a positive number", lambda x: x > 0)
    if not causal:
        check_noncausal(operator, log_decay, masked)
    query, key = check_rank(4, "(batch, length, heads, dim)", query=query, key=key)
    query, key, _, log_decay = prepare(query, key, key, log_decay, mask).grouped()
    weights = forms.weights(operator, query, key, log_decay, causal)
    if normalize:
        weights = weights / (ops.sum(weights, axis=-1, keepdims=True) + epsilon)
    return ungroup(weights)
