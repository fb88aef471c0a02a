"""From checked inputs to outputs and states, where public functions and layers meet."""

from keras import ops

from keras_hla import forms
from keras_hla.grouping import group, ungroup, ungroup_sequence


def evaluate(
    operator,
    inputs,
    state,
    form="chunked",
    causal=True,
    return_state=True,
    epsilon=None,
    chunk_size=None,
    implementation="portable",
    devices=None,
):
    """Evaluates an operator.

    Args:
        operator: An `Operator`.
        inputs: `keras_hla.inputs.Inputs`.
        state: List of states before the first token, in their dtype, with a column for the
            denominator if there is an `epsilon`. `None` is zero.
        form: `"chunked"`, `"recurrent"`, `"matrix"`, or `"step"` for one token after a state.
        causal: Whether tokens read none after them.
        return_state: Whether the states after the last token are wanted. Where it costs nothing
            they are returned even so.
        epsilon: Added to the denominator by which outputs are divided. `None` divides by none.
        chunk_size: Of the chunked form; `None` chooses.
        implementation: `"portable"` or `"triton"`, as `keras_hla.kernels.choose` tells.
        devices: Those that hold the sequence, each a shard, for the chunked form; `None`
            where there is one.

    Returns:
        The output, `(batch, length, heads, value_dim)`, in the dtype of the query, and the list
        of states or `None`.
    """
    dtype = inputs.query.dtype
    if epsilon is not None:  # The denominator is what the operator makes of values of one.
        ones = ops.ones_like(inputs.value[..., :1])
        inputs = inputs._replace(value=ops.concatenate([inputs.value, ones], axis=-1))
    if implementation == "triton":
        from keras_hla.kernels.operator.attention import attention  # which imports Triton

        output, state = attention(operator, inputs, state, return_state, devices)
    else:
        state = state and tuple(group(x, inputs.key.shape[2]) for x in state)
        output, state = _evaluate_form(
            operator, inputs.grouped(), state, form, causal, chunk_size, devices
        )
        output, state = ungroup_sequence(output), state and [ungroup(x) for x in state]
    if epsilon is not None:
        output = output[..., :-1] / (output[..., -1:] + epsilon)
    return ops.cast(output, dtype), state


def _evaluate_form(operator, inputs, state, form, causal, chunk_size, devices):
    query, key, value, log_decay = inputs
    if form == "step":
        return forms.step(operator, query, key, value, log_decay, state)
    if form == "recurrent":
        return forms.recurrent(operator, query, key, value, log_decay, state)
    if form == "matrix":
        return forms.matrix(operator, query, key, value, log_decay, state, causal)
    if not causal:
        return forms.unordered(operator, query, key, value, log_decay, state)
    return forms.chunked(operator, query, key, value, log_decay, state, chunk_size, devices)
