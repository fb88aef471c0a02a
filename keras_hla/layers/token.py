"""One token of a layer after its states, by one kernel besides the projections.

It is what `HLACell` computes, for inference.
"""

from keras import ops

from keras_hla import kernels
from keras_hla.backend.tensors import constant, may_have_gradients
from keras_hla.inputs import arrange_log_decay
from keras_hla.kernels.choice import choose_token
from keras_hla.layers.fused import is_plain, outside_of_kernels
from keras_hla.layers.state_scope import current_state_scope
from keras_hla.precision import exchanged_dtype
from keras_hla.scan import least_log_decay


def choose(layer, sequences, segmented):
    """The implementation of a token of an `HLA` layer, as `HLA.implementation_for` returns it."""
    obstacle = None if layer.implementation == "portable" else _why_not(layer, segmented)
    if obstacle:
        return kernels.Choice("portable", obstacle)
    cell = layer.cell
    dims = cell.key_dim, cell.value_dim
    return choose_token(cell.operator, cell.compute_dtype, dims, layer.implementation, sequences)


def _why_not(layer, segmented):
    """Why a kernel cannot compute a token, or `None` if it can."""
    obstacles = (
        (not layer.causal, "a layer with causal=False has no states"),
        (segmented, "there are segments"),
        (layer.context_parallel is not None, "several devices hold the sequence"),
        (
            may_have_gradients(current_state_scope() is not None),
            "the kernel of a token has no gradients",
        ),
        (layer.cell.normalize, "the kernel of a token does not divide by a sum"),
        *outside_of_kernels(layer.cell),
    )
    return next((reason for found, reason in obstacles if found), None)


def mix(layer, states, sequences, mask=None):
    """The output, before dropout, and the list of states after a token.

    Args:
        layer: an `HLA` layer.
        states: list of the states before the token.
        sequences: tensor of shape `(batch, 1, features)`.
        mask: boolean tensor `(batch, 1)`, or `None`.
    """
    from keras_hla.kernels.token import TOKEN, chain_of

    cell = layer.cell
    memory, context = cell.split_states(states)
    x = sequences[:, 0]
    tensors = {"x": ops.cast(_project(cell, x), exchanged_dtype(cell.compute_dtype))}
    tensors |= {f"state{i}": state for i, state in enumerate(memory)} | context
    if cell.conv_kernel_size is not None:
        tensors["kernel"] = ops.convert_to_tensor(cell.conv.kernel)
    if cell.qk_norm:
        tensors["query_scale"] = ops.convert_to_tensor(cell.query_norm.scale)
        tensors["key_scale"] = ops.convert_to_tensor(cell.key_norm.scale)
    if cell.rope_max_wavelength is not None:
        turns = cell.turns
        tensors["turns"] = constant(turns.of_token + turns.of_block, "int32")
        tensors["lost"] = constant(turns.lost_of_token + turns.lost_of_block, "float32")
    if cell.decay == "input":
        tensors["decays"] = cell.log_decay.logit_dense(x)
    elif cell.decay is not None:
        tensors["decays"] = arrange_log_decay(cell.log_decay(x), 1, cell.state_dtype)[:, 0]
    if mask is not None:
        tensors["mask"] = ops.cast(mask[:, 0], "int32")
    if cell.output_norm:
        tensors["scale"] = ops.convert_to_tensor(cell.norm.scale)
    if cell.output_gate is not None:
        tensors["gates"] = cell.gate_dense(x)
    options = {
        "dtype": cell.compute_dtype,
        "chain": chain_of(cell.operator),
        "heads": cell.num_heads,
        "key_heads": cell.num_key_value_heads,
        "key_dim": cell.key_dim,
        "value_dim": cell.value_dim,
        "conv_kernel_size": cell.conv_kernel_size,
        "silu": cell.conv_activation is not None,
        "rotate": cell.rope_max_wavelength is not None,
        "scale": cell.scale,
        "logits": cell.decay == "input",
        "least_log_decay": least_log_decay(cell.state_dtype),
        "qk_epsilon": cell.query_norm.epsilon if cell.qk_norm else 0.0,
        "epsilon": cell.norm.epsilon if cell.output_norm else 0.0,
    }
    output, *after = TOKEN(tuple(options.items()), **tensors)
    output = ops.reshape(output, (-1, 1, cell.num_heads * cell.value_dim))
    return cell.output_dense(output), after


def _project(cell, x):
    """The queries, keys and values, concatenated."""
    denses = cell.query_dense, cell.key_dense, cell.value_dense
    if not all(is_plain(dense, cell) for dense in denses):
        return ops.concatenate([dense(x) for dense in denses], axis=-1)
    # One product, as each launch takes time.
    kernel, *bias = (
        ops.concatenate([ops.cast(w, cell.compute_dtype) for w in weights], axis=-1)
        for weights in zip(*(dense.weights for dense in denses), strict=True)
    )
    y = ops.cast(x, cell.compute_dtype) @ kernel
    return y + bias[0] if bias else y
