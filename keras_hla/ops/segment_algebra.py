"""The algebra of segments: the associative product of the paper's sections 4, 6.2 and 7.3."""

from typing import Any

from keras import ops

from keras_hla import forms, operators
from keras_hla.checks import check_rank
from keras_hla.grouping import group, ungroup
from keras_hla.inputs import prepare
from keras_hla.operators import Operator
from keras_hla.ops.functional import functional
from keras_hla.ops.segment import check_segments, operator_of, segment
from keras_hla.types import State, Tensor


@functional
def summarize(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operator: str | Operator = "hla2",
    log_decay: Tensor | None = None,
) -> Any:
    """Summarizes a segment: all that later tokens read of its tokens.

    Segments of any length can be summarized independently, on different
    devices, and composed with `combine`. The first entries of a segment are the
    operator's states after its last token, from zero: what
    `higher_order_attention` takes as `initial_state` for the tokens after it.

    Args:
        query: Tensor of shape `(batch, length, heads, dim)`.
        key: Tensor of shape `(batch, length, key_value_heads, dim)`.
        value: Tensor of shape `(batch, length, key_value_heads, value_dim)`.
        operator: `"hla2"`, `"ahla"`, `"hla3"`, `"linear"`, or an operator that
            defines `summarize`.
        log_decay: As in `higher_order_attention`.

    Returns:
        A named tuple of tensors: the operator's `state_names`, then its
        `segment_names`, each of shape `(batch, heads, rows, columns)`, and last
        `log_decay`, the sum of the log-decays, `(batch, heads)`, with one head
        where they are the same. It knows its operator, also after a map over its
        tensors as a tree. The empty segment is all zeros.

    Raises:
        ValueError: as `higher_order_attention`; and if the operator's segments
            do not compose.

    Example:

    >>> q = k = v = keras.random.normal((2, 100, 4, 16))
    >>> summarize, combine = keras_hla.ops.summarize, keras_hla.ops.combine
    >>> left = summarize(q[:, :60], k[:, :60], v[:, :60], log_decay=-0.1)
    >>> right = summarize(q[:, 60:], k[:, 60:], v[:, 60:], log_decay=-0.1)
    >>> S, F, C, log_decay = combine(left, right)  # the summary of all 100
    """
    operator = operators.get(operator)
    query, key, value = check_rank(
        4, "(batch, length, heads, dim)", query=query, key=key, value=value
    )
    query, key, value, log_decay = prepare(query, key, value, log_decay, None).grouped()
    tensors = forms.summarize(operator, query, key, value, log_decay)
    batch = ops.shape(query)[0]
    if log_decay is None:
        total = ops.zeros((batch, 1), query.dtype)
    else:
        total = ungroup(ops.sum(log_decay, axis=-1))
        total = ops.broadcast_to(total, (batch, ops.shape(total)[1]))
    return segment(operator, [*(ungroup(x) for x in tensors), total])


def combine(left: State, right: State, operator: str | Operator | None = None) -> Any:
    """The summary of two segments, the second right after the first.

    For the default operator `"hla2"`, with `ρ` the product of the decays of the
    right segment:

        S = ρ S_left + S_right,  C = ρ C_left + C_right,
        F = ρ² F_left + F_right + ρ S_left C_right

    It is associative, so that segments can be folded from the left, from the
    right, or as a tree (`keras.ops.associative_scan`), and costs a few products
    of matrices with `dim` rows.

    Args:
        left: A segment as returned by `summarize`, or a list of its tensors.
            These may have any axes in front.
        right: The segment after it, in the same dtype and with the same axes in
            front.
        operator: The operator of both. `None` is the one that the segments know;
            of two plain lists it has to be named.

    Returns:
        The joint segment; a list where `left` is a plain list.

    Raises:
        ValueError: if the two are not segments of that operator, or their sizes
            or dtypes do not fit together; if plain lists come without an
            operator; or if the operator's segments do not compose.

    Example:

    >>> q = k = v = keras.random.normal((2, 100, 4, 16))
    >>> segment = keras_hla.ops.summarize(q, k, v, "ahla")
    >>> twice = keras_hla.ops.combine(segment, segment)
    """
    if operator is None:
        operator = operator_of(left) or operator_of(right)
        if operator is None:
            raise ValueError(
                "Argument `operator` must be named where neither `left` nor `right` is a segment "
                "as `summarize` returns it. Received: operator=None, "
                f"left of {type(left)}, right of {type(right)}"
            )
    return _combine(left, right, operator)


@functional
def _combine(left, right, operator):
    """`combine`, of an operator that is named."""
    operator = operators.get(operator)
    check_segments(operator, left, right)
    key_heads = min(x.shape[-3] for x in (*left[:-1], *right[:-1]))
    *lefts, left_decay = left
    *rights, right_decay = right
    decay = group(ops.exp(right_decay), key_heads, axis=-1)[..., None, None]
    lefts, rights = (tuple(group(x, key_heads, axis=-3) for x in side) for side in (lefts, rights))
    joint = operator.combine(lefts, rights, decay)
    joint = [*(ungroup(x, axis=-4) for x in joint), left_decay + right_decay]
    return joint if operator_of(left) is None else segment(operator_of(left), joint)
