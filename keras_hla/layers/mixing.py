"""What an `HLA` layer makes of its tokens: at once, or rematerialized in parts."""

import functools

from keras import ops

from keras_hla import stages
from keras_hla.backend.loops import recomputed
from keras_hla.backend.tensors import is_known, is_single_token
from keras_hla.evaluate import evaluate
from keras_hla.inputs import arrange
from keras_hla.layers import fused as fused_layers
from keras_hla.layers import token
from keras_hla.layers.rematerialization import scan_rematerialized


def mix(layer, states, sequences, mask, starts, return_state, shard=None):
    """The outputs, before dropout, and the tuple of states, which is empty unless wanted.

    Args:
        layer: the layer.
        states: states before the tokens, or `None`, which is zeros.
        sequences: tensor of shape `(batch, length, features)`, zero at masked tokens.
        mask: boolean tensor `(batch, length)`, or `None`.
        starts: boolean tensor `(batch, length)`, true where a segment starts, or `None`.
        return_state: whether the states after the tokens are wanted.
        shard: the `SequenceShard` that `sequences` is, or `None` where it is the whole.
    """
    inputs, weights = {"sequences": sequences, "mask": mask, "starts": starts}, layer.cell.weights
    part = functools.partial(_mix_part, layer)
    whole = functools.partial(part, return_state=return_state, shard=shard)
    if not is_rematerialized(layer, sequences):
        return whole(states, **inputs)
    if shard is not None:  # each pass is of all devices, so that there is no cutting it
        return recomputed(whole, weights, shard.devices)(states, **inputs)
    states = _or_initial(layer, states, sequences)
    return scan_rematerialized(part, states, inputs, layer.remat_length, weights)


def _or_initial(layer, states, sequences):
    """The states, or those before the first token."""
    return layer.get_initial_state(ops.shape(sequences)[0]) if states is None else states


def is_rematerialized(layer, sequences):
    """Whether sequences are longer than the `remat_length` of the layer."""
    length, longest = sequences.shape[1], layer.remat_length
    return layer.causal and longest is not None and is_known(length) and length > longest


def _mix_part(layer, states, sequences, mask=None, starts=None, return_state=True, shard=None):
    """`mix` at once: choose, project, evaluate, finish."""
    cell, segmented = layer.cell, starts is not None
    implementation, _ = layer.implementation_for(sequences, segmented)
    if implementation == "triton" and is_single_token(sequences):
        states = _or_initial(layer, states, sequences)
        output, states = token.mix(layer, states, sequences, mask)
        return output, tuple(states) if return_state else ()
    fused, zero = stages.are_fused(implementation), None
    devices = None if shard is None else shard.devices
    if fused and layer.why_not_fused(sequences, states, mask, segmented) is None:
        sequences = ops.cast(sequences, layer.compute_dtype)
        if return_state or states is not None:
            states = _or_initial(layer, states, sequences)
            output, states = fused_layers.mix_with_states(layer, states, sequences, starts)
            return output, tuple(states) if return_state else ()
        if devices is None or sequences.shape[1] > 0:
            return fused_layers.mix(layer, sequences, starts, mask, shard), ()
        zero, shard = fused_layers.take_part(cell, sequences, starts, shard), None
    memory, context = (None, {}) if states is None else cell.split_states(states)
    (query, key, value, log_decay), context = cell.project(
        sequences, context, mask, starts, return_state, fused, shard
    )
    output, memory = evaluate(
        cell.operator,
        arrange(query, key, value, log_decay, mask, starts),
        memory if layer.causal else None,
        causal=layer.causal,
        return_state=return_state,
        epsilon=cell.epsilon if cell.normalize else None,
        chunk_size=layer.chunk_size,
        implementation=implementation,
        devices=devices,
    )
    output = cell.finish(output, sequences, fused)
    output = output if zero is None else output + zero
    return output, (*memory, *context.values()) if return_state else ()
