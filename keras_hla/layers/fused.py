"""A layer's stages from the first token on as one function, under PyTorch on a GPU.

Called one at a time, through the layers and operations of Keras, the stages have a CPU overhead
above their time on a GPU. This file repeats what `HLACell` computes.
"""

import weakref

import keras
from keras import ops
from keras.src.backend import AutocastScope  # which has no public name

from keras_hla.backend.compiling import is_torch_compiling
from keras_hla.backend.tensors import count_up, pad_axis
from keras_hla.inputs import arrange_log_decay
from keras_hla.masking import compacted_places
from keras_hla.scan import least_log_decay
from keras_hla.stages import last_window, norm, of_last_segment
from keras_hla.stages.rotary import rotation_from_start

# Of layers: by what is recorded, and the names of its inputs.
_programs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def why_not_fused(cell, denses):
    """Why the stages of a cell are not one function, or `None` if they can be.

    Args:
        cell: an `HLACell`.
        denses: the projections, those of the cell and what is computed together with it.
    """
    more = [dense.path for dense in denses if not is_plain(dense, cell)]
    obstacles = (
        (keras.config.backend() != "torch", "the backend compiles whole layers"),
        (is_torch_compiling(), "PyTorch compiles the layer"),
        *outside_of_kernels(cell),
        (bool(more), f"layers {more} are more than a product and a bias in the dtype of the layer"),
        (
            cell.query_dense.kernel.shape[0] > norm.LARGEST,
            f"there are more than {norm.LARGEST} features",
        ),
        (cell.compute_dtype == "float16", "float16 overflows between stages"),
    )
    return next((reason for found, reason in obstacles if found), None)


def outside_of_kernels(cell):
    """Pairs: whether a cell computes what no kernel of stages does, and what that is."""
    activations = cell.conv_activation, cell.output_gate
    return (
        (cell.feature_map is not None, "there is a feature map"),
        (
            any(x not in (None, keras.activations.silu) for x in activations),
            "there is an activation that is not 'silu'",
        ),
    )


def is_plain(dense, cell):
    """Whether a projection is a product and a bias, in the dtype of the stage that computes it."""
    dtype = cell.state_dtype if dense.name == "logit" else cell.compute_dtype
    more = dense.lora_enabled or dense.quantization_mode or dense.compute_dtype != dtype
    return type(dense) is keras.layers.Dense and not more


def mix(layer, sequences, starts, mask=None, shard=None):
    """The outputs of an `HLA` layer, before dropout, without states; undefined at masked tokens.

    With a mask the unmasked tokens are moved to the front, where no masked one is before them.

    Args:
        layer: the layer.
        sequences: tensor of shape `(batch, length, features)`, in the compute dtype.
        starts: boolean tensor `(batch, length)`, true where a segment starts, or `None`.
        mask: boolean tensor `(batch, length)`, or `None`; not of a shard.
        shard: the `SequenceShard` that `sequences` is, or `None` where it is the whole.
    """
    orders = {}
    if mask is not None:
        orders = _orders(mask)
        starts = None if starts is None else starts.flatten()[orders["order"]].view(starts.shape)
    inputs = _inputs(layer.cell, sequences, starts, shard) | orders
    return _run(layer, _record_mixer_alone, inputs, shard)[0]


def mix_with_states(layer, states, sequences, starts):
    """As `mix`, from the list of states before the tokens; and the list of states after them."""
    from keras_hla.kernels.fusion import state_from_kernel, state_to_kernel

    cell = layer.cell
    memory, context = cell.split_states(states)
    angles = None
    if cell.rope_max_wavelength is not None:
        angles, position = cell.angles(sequences, context["position"], None, True, None)
    inputs = _inputs(cell, sequences, starts, window=context.get("window"), angles=angles)
    inputs |= {f"state {i}": state_to_kernel(x, cell.num_heads) for i, x in enumerate(memory)}
    output, *after = _run(layer, _record_mixer_with_states, inputs)
    for i in range(len(memory)):
        after[i] = state_from_kernel(after[i], cell.num_heads, cell.state_size[i][0])
    if cell.conv_kernel_size is not None:
        if starts is not None:
            segments = inputs["segments"][:, 1 - cell.conv_kernel_size :]
            after[-1] = of_last_segment(after[-1], segments)
        after[-1] = ops.cast(after[-1], cell.state_dtype)
    return output, after if angles is None else [*after, position]


def transform_mlp(block, sequences):
    """What the MLP of an `HLADecoderBlock` adds to `sequences`, before dropout."""
    return _run(block, _record_mlp_branch, {"sequences": sequences})[0]


def transform(block, sequences, starts, shard=None, drop=None):
    """As `mix`, the outputs of an `HLADecoderBlock`.

    Between what `drop` acts on, as it draws random numbers, the block is two functions.
    """
    inputs = _inputs(block.cell, sequences, starts, shard, block.mixer_norm)
    if drop is None:
        return _run(block, _record_block, inputs, shard)[0]
    x = sequences + drop(_run(block, _record_mixer_branch, inputs, shard)[0])
    return x + drop(transform_mlp(block, x))


def _run(layer, record, inputs, shard=None):
    programs = _programs.setdefault(layer, {})
    key = record, tuple(inputs)
    if key not in programs:
        programs[key] = _program(layer, *key)
    devices = None if shard is None else shard.devices.kept
    with AutocastScope(None):  # as each stage casts, or does not
        return programs[key](devices, **inputs)


def _program(layer, record, names):
    from keras_hla.kernels.fusion import Recorder

    recorder = Recorder()
    inputs = {x: recorder.input(x, constant=x in ("cos", "sin")) for x in names}
    return recorder.program(record(recorder, layer, inputs))


def _inputs(cell, sequences, starts, shard=None, norm=None, window=None, angles=None):
    """The inputs of a program by name, the sequences first.

    Args:
        norm: what a block applies to the sequences before the projections, or `None`.
        window: the projected tokens before them, or `None`.
        angles: the cosines and sines of their positions, or `None`.
    """
    inputs, length = {"sequences": sequences}, sequences.shape[1]
    if cell.conv_kernel_size is not None:
        inputs |= _window_and_segments(cell, sequences, starts, shard, norm)
        if window is not None:
            inputs["projected window"] = ops.cast(window, sequences.dtype)
            if starts is not None:  # zeros are of any segment
                inputs["segments"] = pad_axis(inputs["segments"], cell.conv_kernel_size - 1, 0, 1)
    if cell.rope_max_wavelength is not None:
        if shard is not None:
            angles, _ = cell.angles(sequences, None, None, False, shard)
        elif angles is None:
            angles = rotation_from_start(length, cell.turns, cell.state_dtype)
        inputs["cos"], inputs["sin"] = angles
    if cell.decay == "input":
        inputs |= {} if starts is None else {"starts": starts}
    else:
        with AutocastScope(None):  # as the decay is in the dtype of states
            log_decay = None if cell.decay is None else cell.log_decay(sequences)
        log_decay = arrange_log_decay(log_decay, length, cell.state_dtype, None, starts)
        inputs |= {} if log_decay is None else {"log_decay": log_decay}
    return inputs


def _orders(mask):
    """The permutation of the tokens of all sequences, unmasked ones first, and its inverse."""
    batch, length = mask.shape
    inverse = compacted_places(mask) + length * count_up(batch)[:, None]
    inverse = inverse.flatten().long()
    indices = count_up(batch * length).long()
    return {
        "order": indices.new_empty(indices.shape).scatter_(0, inverse, indices),
        "inverse": inverse,
    }


def take_part(cell, sequences, starts, shard):
    """Runs the collectives of `mix`, for a shard without tokens.

    Returns:
        Zero, through which the collective takes part in the backward pass; `None` without one.
    """
    if cell.conv_kernel_size is None:
        return None
    return 0 * ops.sum(_window_and_segments(cell, sequences, starts, shard)["window"])


def _window_and_segments(cell, sequences, starts, shard, norm=None):
    """What the convolution reads besides the sequences, by name.

    Of a shard these are the last tokens before it, and the segments of these and its own. A token
    of another segment than that which goes on, or before all, is in none.
    """
    segments = None if starts is None else starts.cumsum(1).int()
    if shard is None:
        return {} if segments is None else {"segments": segments}
    size = cell.conv_kernel_size
    tokens = last_window(sequences, size, starts=starts)
    tokens = tokens if norm is None else norm.normalize(tokens)
    are_read = last_window(ops.ones_like(sequences[..., :1]), size, starts=starts)
    both = ops.concatenate([ops.cast(tokens, sequences.dtype), are_read], axis=-1)
    both, _ = shard.last_tokens(both, segmented=starts is not None, return_end=False)
    window, are_read = both[..., :-1], both[..., -1] > 0
    if segments is None:
        if not cell.use_bias:  # and zeros are projected to zeros
            return {"window": window}
        segments = ops.zeros(sequences.shape[:2], "int32")
    before = ops.cast(are_read, "int32") - 1
    return {"window": window, "segments": ops.concatenate([before, segments], axis=1)}


def _record_mixer_alone(recorder, layer, inputs):
    x = inputs["sequences"]
    if "order" not in inputs:
        output, _ = _record_mixer(recorder, layer.cell, x, inputs)
        return (output,)
    order, inverse = inputs["order"], inputs["inverse"]
    output, _ = _record_mixer(recorder, layer.cell, recorder.permute(x, order, inverse), inputs)
    return (recorder.permute(output, inverse, order),)


def _record_mixer_with_states(recorder, layer, inputs):
    output, after = _record_mixer(recorder, layer.cell, inputs["sequences"], inputs)
    return output, *after


def _record_block(recorder, block, inputs):
    """Records the stages of a block."""
    x = recorder.add(inputs["sequences"], *_record_mixer_branch(recorder, block, inputs))
    return (recorder.add(x, *_record_mlp_branch(recorder, block, {"sequences": x})),)


def _record_mixer_branch(recorder, block, inputs):
    x = recorder.rms_norm(inputs["sequences"], block.mixer_norm)
    output, _ = _record_mixer(recorder, block.cell, x, inputs)
    return (output,)


def _record_mlp_branch(recorder, block, inputs):
    x, size = recorder.rms_norm(inputs["sequences"], block.mlp_norm), (block.gate_dense.units,)
    gates, hidden = recorder.project(x, (block.gate_dense, size), (block.up_dense, size))
    hidden = recorder.gate(hidden, gates)
    return recorder.project(hidden, (block.down_dense, (block.down_dense.units,)))


def _record_mixer(recorder, cell, x, inputs):
    """Records the stages of an `HLA` layer of `x`.

    Returns what stands for the output; and, if there are states, for those of the operator and the
    projected tokens that a convolution reads after them.
    """
    read, past = x, 0
    after: tuple = ()
    if "window" in inputs:
        read, past = recorder.concatenate(inputs["window"], x), cell.conv_kernel_size - 1
    joint = recorder.project_together(read, cell.query_dense, cell.key_dense, cell.value_dense)
    if "projected window" in inputs:
        past = cell.conv_kernel_size - 1
        joint = recorder.concatenate(inputs["projected window"], joint)
        after = (recorder.last_tokens(joint, past),)
    angles = (inputs["cos"], inputs["sin"]) if "cos" in inputs else None
    query, key, value = recorder.operands(
        joint,
        (cell.num_heads, cell.num_key_value_heads),
        (cell.key_dim, cell.value_dim),
        convolution=None if cell.conv_kernel_size is None else cell.conv,
        segments=inputs.get("segments"),
        past=past,
        scale=1.0 if cell.qk_norm else cell.scale,
        angles=None if cell.qk_norm else angles,
    )
    if cell.qk_norm:
        query = recorder.rms_norm(query, cell.query_norm)
        key = recorder.rms_norm(key, cell.key_norm)
        query = recorder.rotate(query, angles, cell.scale)
        key = recorder.rotate(key, angles)
    if cell.decay == "input":
        least = least_log_decay(cell.state_dtype)
        log_decay = recorder.log_decay(x, cell.log_decay.logit_dense, least, inputs.get("starts"))
    else:
        log_decay = inputs.get("log_decay")
    states = [number for name, number in inputs.items() if name.startswith("state ")]
    output, states = recorder.attend(cell.operator, query, key, value, log_decay, states)
    if cell.output_norm:
        output = recorder.rms_norm(output, cell.norm, recompute=True)
    if cell.output_gate is not None:
        (gates,) = recorder.project(x, (cell.gate_dense, (cell.num_heads, cell.value_dim)))
        output = recorder.gate(output, gates)
    (output,) = recorder.project(output, (cell.output_dense, (cell.output_size,)))
    return output, (*states, *after)
