"""The operators as functions on tensors `(batch, length, heads, dim)`."""

import functools

import keras
from keras import ops
import numpy as np

from keras_hla import forms, operators
from keras_hla.checks import (
    check_attention_inputs,
    check_choice,
    check_log_decay,
    check_mask,
    check_positive_int,
    check_rank,
    check_states,
)
from keras_hla.layout import (
    apply_mask,
    group,
    group_log_decay,
    group_sequence,
    ungroup,
    ungroup_sequence,
)

FORMS = ("chunked", "recurrent", "matrix")


def higher_order_attention(
    query,
    key,
    value,
    operator="hla2",
    form="chunked",
    log_decay=None,
    mask=None,
    initial_state=None,
    return_state=False,
    chunk_size=None,
):
    """Causal higher-order linear attention.

    For the default operator `"hla2"`, with `a(j→t)` the product of the decays
    of the tokens after `j` up to `t`:

        o_t = Σ_{i≤j≤t} a(i→t) a(j→t) (q_t·k_i) (k_i·q_j) v_j

    Time and memory are linear in the length, except for `form="matrix"`. No
    scale is applied to the queries, and the outputs are not normalized: they
    grow with the length.

    Args:
        query: Tensor of shape `(batch, length, heads, dim)`.
        key: Tensor of shape `(batch, length, key_value_heads, dim)`, where
            `key_value_heads` divides `heads`: query heads in a row share a key
            and value head.
        value: Tensor of shape `(batch, length, key_value_heads, value_dim)`.
            All three have the same floating dtype.
        operator: Name of an operator, or an operator; see
            `keras_hla.operators.get`.
        form: `"chunked"`, the parallel form; `"recurrent"`, one token after the
            other; or `"matrix"`, the definition with its length x length
            weights, which neither takes nor returns a state.
        log_decay: Logarithm of the decay, `log a_t <= 0`: a number or a tensor
            broadcastable to `(batch, length, heads)`. Its sign is checked for
            numbers and NumPy arrays. If it has one value per query head, each
            query head holds its own moment of the keys it shares. `None` is no
            decay.
        mask: Boolean (or integer) tensor of shape `(batch, length)`, true where
            a token counts. The others leave the state unchanged, whatever they hold,
            and have outputs of zero.
        initial_state: List of states as returned with `return_state=True`.
        return_state: Whether to return the state after the last token.
        chunk_size: Largest number of tokens of a chunk, for `form="chunked"`.
            It changes time and memory, not the result. `None` is 64.

    Returns:
        The output, shape `(batch, length, heads, value_dim)`, in the dtype of
        the inputs but computed in float32 at least. With `return_state=True`
        the tuple `(output, state)`, the state a list of float32 tensors
        (float64 for float64 inputs): for `"hla2"` `S`, `(batch,
        key_value_heads, dim, dim)`, and `F`, `(batch, heads, dim, value_dim)`.

    Raises:
        ValueError: if shapes, dtypes, names or numbers do not fit together.

    Example:

    >>> q = k = v = keras.random.normal((2, 100, 4, 16))
    >>> output, state = keras_hla.ops.higher_order_attention(
    ...     q, k, v, log_decay=-0.1, return_state=True
    ... )
    >>> tuple(output.shape), [tuple(s.shape) for s in state]
    ((2, 100, 4, 16), [(2, 4, 16, 16), (2, 4, 16, 16)])
    """
    operator = operators.get(operator)
    check_choice("form", form, FORMS)
    check_positive_int("chunk_size", chunk_size, optional=True)
    if form != "chunked" and chunk_size is not None:
        raise ValueError(f"Argument `chunk_size` needs form='chunked'. Received: form={form!r}")
    if form == "matrix" and (return_state or initial_state is not None):
        raise ValueError(
            "Arguments `initial_state` and `return_state` need form='chunked' or "
            "form='recurrent'. Received: form='matrix'"
        )
    check_rank(4, "(batch, length, heads, dim)", query=query, key=key, value=value)
    evaluate = {
        "chunked": functools.partial(forms.chunked, chunk_size=chunk_size),
        "recurrent": forms.recurrent,
        "matrix": forms.matrix,
    }[form]
    output, state = _evaluate(evaluate, operator, query, key, value, log_decay, mask, initial_state)
    return (output, state) if return_state else output


def causal_linear_attention(
    query,
    key,
    value,
    log_decay=None,
    mask=None,
    initial_state=None,
    return_state=False,
    chunk_size=None,
):
    """First-order causal linear attention, the primitive of the whole family.

        o_t = q_tᵀ H_t,   H_t = a_t H_{t-1} + k_t v_tᵀ

    Args:
        query: Tensor of shape `(batch, length, heads, dim)`.
        key: Tensor of shape `(batch, length, key_value_heads, dim)`.
        value: Tensor of shape `(batch, length, key_value_heads, value_dim)`.
        log_decay: `log a_t`, as in `higher_order_attention`.
        mask: Boolean tensor of shape `(batch, length)`.
        initial_state: List that holds `H`, shape
            `(batch, key_value_heads, dim, value_dim)`.
        return_state: Whether to return the state after the last token.
        chunk_size: Largest number of tokens of a chunk. `None` is 64.

    Returns:
        The output, `(batch, length, heads, value_dim)`, or with
        `return_state=True` the tuple `(output, [H])`.

    Raises:
        ValueError: as `higher_order_attention`.

    Example:

    >>> q = k = v = keras.random.normal((2, 100, 4, 16))
    >>> tuple(keras_hla.ops.causal_linear_attention(q, k, v).shape)
    (2, 100, 4, 16)
    """
    return higher_order_attention(
        query,
        key,
        value,
        operator="linear",
        log_decay=log_decay,
        mask=mask,
        initial_state=initial_state,
        return_state=return_state,
        chunk_size=chunk_size,
    )


def attention_step(query, key, value, state, operator="hla2", log_decay=None):
    """One token of `higher_order_attention`, at a cost that does not depend on the past.

    Args:
        query: Tensor of shape `(batch, heads, dim)`.
        key: Tensor of shape `(batch, key_value_heads, dim)`.
        value: Tensor of shape `(batch, key_value_heads, value_dim)`.
        state: List of states before the token, as returned by this function or
            by `higher_order_attention(return_state=True)`.
        operator: Name of an operator, or an operator.
        log_decay: A number or a tensor broadcastable to `(batch, heads)`.

    Returns:
        The tuple `(output, state)`: the output of shape
        `(batch, heads, value_dim)` and the list of new states.

    Raises:
        ValueError: as `higher_order_attention`.

    Example:

    >>> q = k = v = keras.random.normal((2, 4, 16))
    >>> state = [keras.ops.zeros((2, 4, 16, 16))] * 2
    >>> output, state = keras_hla.ops.attention_step(q, k, v, state)
    """
    operator = operators.get(operator)
    check_rank(3, "(batch, heads, dim)", query=query, key=key, value=value)
    query, key, value = (ops.expand_dims(x, 1) for x in (query, key, value))
    if log_decay is not None and np.ndim(log_decay) == 2:
        log_decay = ops.expand_dims(log_decay, 1)
    output, state = _evaluate(
        forms.step, operator, query, key, value, log_decay, None, state, state_name="state"
    )
    return output[:, 0], state


def _evaluate(
    evaluate,
    operator,
    query,
    key,
    value,
    log_decay,
    mask,
    state,
    state_name="initial_state",
):
    """Checks the arguments, and calls one of `keras_hla.forms` between the two layouts."""
    query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
    check_attention_inputs(query, key, value)
    batch, length, heads, dim = query.shape
    key_heads = key.shape[2]
    log_decay = check_log_decay(log_decay, batch, length, (heads, key_heads))
    if mask is not None:
        check_mask(mask, batch, length)
    if state is not None or evaluate is forms.step:
        own_moments = log_decay is not None and log_decay.shape[-1:] == (heads,)
        shapes = operator.state_shapes(
            heads if own_moments else key_heads, heads, dim, value.shape[3]
        )
        check_states(state_name, state, batch, shapes, operator.state_names)

    output_dtype = query.dtype
    dtype = state_dtype(output_dtype)
    query, key, value = (group_sequence(ops.cast(x, dtype), key_heads) for x in (query, key, value))
    if log_decay is not None:
        log_decay = group_log_decay(log_decay, ops.shape(query)[-2], key_heads, dtype)
    if mask is not None:
        query, key, value, log_decay = apply_mask(mask, query, key, value, log_decay)
    if state is not None:
        state = tuple(group(ops.cast(x, dtype), key_heads) for x in state)
    output, state = evaluate(operator, query, key, value, log_decay, state)
    output = ops.cast(ungroup_sequence(output), output_dtype)
    return output, state and [ungroup(x) for x in state]


def state_dtype(dtype):
    """The dtype of states for inputs of `dtype`: float32, or float64 for float64."""
    dtype = keras.backend.standardize_dtype(dtype)
    return "float64" if dtype == "float64" else "float32"
