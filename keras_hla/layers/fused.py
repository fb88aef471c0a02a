"""A layer's stages from the first token on as one function, under PyTorch on a GPU.

Called one at a time, through the layers and operations of Keras, the stages have a CPU overhead
above their time on a GPU. This file repeats what `HLACell` computes.
"""

import weakref

import keras
from keras.src.backend import AutocastScope  # which has no public name

from keras_hla.backend.compiling import is_torch_compiling
from keras_hla.inputs import arrange_log_decay
from keras_hla.scan import least_log_decay
from keras_hla.stages import norm
from keras_hla.stages.rotary import rotation_from_start

# Of layers: those of what is recorded, with segments or without.
_programs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def why_not_fused(cell, denses):
    """Why the stages of a cell are not one function, or `None` if they can be.

    Args:
        cell: an `HLACell`.
        denses: the projections, those of the cell and what is computed together with it.
    """
    activations = cell.conv_activation, cell.output_gate
    more = [dense.path for dense in denses if not _is_plain(dense, cell)]
    obstacles = (
        (keras.config.backend() != "torch", "the backend compiles whole layers"),
        (is_torch_compiling(), "PyTorch compiles the layer"),
        (cell.feature_map is not None, "there is a feature map"),
        (
            any(x not in (None, keras.activations.silu) for x in activations),
            "there is an activation that is not 'silu'",
        ),
        (bool(more), f"layers {more} are more than a product and a bias in the dtype of the layer"),
        (
            cell.query_dense.kernel.shape[0] > norm.LARGEST,
            f"there are more than {norm.LARGEST} features",
        ),
        (cell.compute_dtype == "float16", "float16 overflows between stages"),
    )
    return next((reason for found, reason in obstacles if found), None)


def _is_plain(dense, cell):
    """Whether a projection is a product and a bias, in the dtype of the stage that computes it."""
    dtype = cell.state_dtype if dense.name == "logit" else cell.compute_dtype
    more = dense.lora_enabled or dense.quantization_mode or dense.compute_dtype != dtype
    return type(dense) is keras.layers.Dense and not more


def mix(layer, sequences, starts):
    """The outputs of an `HLA` layer, before dropout, from its start.

    Args:
        layer: the layer.
        sequences: tensor of shape `(batch, length, features)`, in the compute dtype.
        starts: boolean tensor `(batch, length)`, true where a segment starts, or `None`.
    """
    return _run(layer, _record_mixer_alone, _inputs(layer.cell, sequences, starts))


def transform(block, sequences, starts, drop=None):
    """As `mix`, the outputs of an `HLADecoderBlock`.

    Between what `drop` acts on, as it draws random numbers, the block is two functions.
    """
    inputs = _inputs(block.cell, sequences, starts)
    if drop is None:
        return _run(block, _record_block, inputs)
    x = sequences + drop(_run(block, _record_mixer_branch, inputs))
    return x + drop(_run(block, _record_mlp_branch, {"sequences": x}))


def _run(layer, record, inputs):
    programs = _programs.setdefault(layer, {})
    key = record, "starts" in inputs
    if key not in programs:
        programs[key] = _program(layer, *key)
    with AutocastScope(None):  # as each stage casts, or does not
        return programs[key](**inputs)


def _program(layer, record, segmented):
    from keras_hla.kernels.fusion import Recorder

    recorder = Recorder()
    sequences = recorder.input("sequences")
    starts = recorder.input("starts") if segmented else None
    record(recorder, layer, sequences, starts)
    return recorder.program()


def _inputs(cell, sequences, starts):
    """The inputs of a program by name."""
    inputs, length = {"sequences": sequences}, sequences.shape[1]
    if starts is not None:
        inputs |= {"starts": starts, "segments": starts.cumsum(1).int()}
    if cell.rope_max_wavelength is not None:
        inputs["cos"], inputs["sin"] = rotation_from_start(length, cell.turns, cell.state_dtype)
    if cell.decay != "input":
        with AutocastScope(None):  # as the decay is in the dtype of states
            log_decay = None if cell.decay is None else cell.log_decay(sequences)
        log_decay = arrange_log_decay(log_decay, length, cell.state_dtype, None, starts)
        inputs |= {} if log_decay is None else {"log_decay": log_decay}
    return inputs


def _record_mixer_alone(recorder, layer, x, starts):
    _record_mixer(recorder, layer.cell, x, starts)


def _record_block(recorder, block, x, starts):
    """Notes the stages of a block."""
    x = recorder.add(x, _record_mixer_branch(recorder, block, x, starts))
    recorder.add(x, _record_mlp_branch(recorder, block, x))


def _record_mixer_branch(recorder, block, x, starts):
    return _record_mixer(recorder, block.cell, recorder.rms_norm(x, block.mixer_norm), starts)


def _record_mlp_branch(recorder, block, x, starts=None):
    x, size = recorder.rms_norm(x, block.mlp_norm), (block.gate_dense.units,)
    gates, hidden = recorder.project(x, (block.gate_dense, size), (block.up_dense, size))
    hidden = recorder.gate(hidden, gates)
    (output,) = recorder.project(hidden, (block.down_dense, (block.down_dense.units,)))
    return output


def _record_mixer(recorder, cell, x, starts):
    """Notes what an `HLA` layer makes of `x`, and returns what stands for the result."""
    joint = recorder.project_together(x, cell.query_dense, cell.key_dense, cell.value_dense)
    angles = segments = None
    if cell.rope_max_wavelength is not None:
        angles = tuple(recorder.input(name, constant=True) for name in ("cos", "sin"))
    if cell.conv_kernel_size is not None and starts is not None:
        segments = recorder.input("segments")
    query, key, value = recorder.operands(
        joint,
        (cell.num_heads, cell.num_key_value_heads),
        (cell.key_dim, cell.value_dim),
        convolution=None if cell.conv_kernel_size is None else cell.conv,
        segments=segments,
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
        log_decay = recorder.log_decay(x, cell.log_decay.logit_dense, least, starts)
    else:
        given = cell.decay is not None or starts is not None
        log_decay = recorder.input("log_decay") if given else None
    output = recorder.attend(cell.operator, query, key, value, log_decay)
    if cell.output_norm:
        output = recorder.rms_norm(output, cell.norm, recompute=True)
    if cell.output_gate is not None:
        (gates,) = recorder.project(x, (cell.gate_dense, (cell.num_heads, cell.value_dim)))
        output = recorder.gate(output, gates)
    (output,) = recorder.project(output, (cell.output_dense, (cell.output_size,)))
    return output
