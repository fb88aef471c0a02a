"""A layer's stages from the first token on as one function, under PyTorch on a GPU.

One at a time the host takes longer to call them, with the layers and operations of Keras between
them, than a GPU to compute them. What `HLACell` computes is said here a second time.
"""

import keras
from keras.src.backend import AutocastScope  # which has no public name

from keras_hla.inputs import arrange_log_decay
from keras_hla.scan import least_log_decay
from keras_hla.stages.rotary import rotation_from_start


def why_not_fused(cell, denses):
    """Why the stages of a cell are not one function, or `None` if they can be.

    Args:
        cell: an `HLACell`.
        denses: the projections, those of the cell and what is computed together with it.
    """
    if keras.config.backend() != "torch":
        return "the backend compiles whole layers"
    import torch

    if torch.compiler.is_compiling():
        return "PyTorch compiles the layer"
    if cell.compute_dtype not in ("bfloat16", "float32"):
        return f"stages hand on no {cell.compute_dtype}"
    if cell.feature_map is not None:
        return "there is a feature map"
    for name in ("conv_activation", "output_gate"):
        if getattr(cell, name) not in (None, keras.activations.silu):
            return f"`{name}` is not 'silu'"
    for dense in denses:
        if type(dense) is not keras.layers.Dense or dense.lora_enabled or dense.quantization_mode:
            return f"layer '{dense.path}' is more than a product and a bias"
    return None


def mix(cell, sequences, starts):
    """The outputs of an `HLA` layer, before dropout, from its start."""
    from keras_hla.kernels.fusion import Recorder

    recorder = Recorder()
    with AutocastScope(None):  # as each stage casts, or does not
        x = recorder.tensor(sequences)
        return recorder.evaluate(record_mixer(recorder, cell, x, sequences, starts))


def record_mixer(recorder, cell, x, sequences, starts):
    """Notes the stages of an `HLA` layer on `x`, and returns what stands for the result.

    Args:
        recorder: a `Recorder`.
        cell: the `HLACell`.
        x: what stands for the inputs.
        sequences: a tensor of their shape, and where decays depend on neither, any.
        starts: boolean tensor `(batch, length)`, true where a segment starts, or `None`.
    """
    length, value_heads = sequences.shape[1], (cell.num_key_value_heads, cell.value_dim)
    query_heads = (cell.num_heads, cell.key_dim)
    key_heads = (cell.num_key_value_heads, cell.key_dim)
    query, key, value = recorder.project(
        x,
        (cell.query_dense, query_heads),
        (cell.key_dense, key_heads),
        (cell.value_dense, value_heads),
    )
    if cell.conv_kernel_size is not None:
        parts = zip((query, key, value), cell.projected_sizes, strict=True)
        query, key, value = recorder.convolve(
            list(parts), cell.conv.kernel, cell.conv_activation, starts
        )
    if cell.qk_norm:
        query = recorder.rms_norm(query, cell.query_norm)
        key = recorder.rms_norm(key, cell.key_norm)
    if cell.rope_max_wavelength is None:
        query = recorder.scale(query, cell.scale)
    else:
        cos, sin = map(recorder.tensor, rotation_from_start(length, cell.turns, cell.state_dtype))
        query = recorder.rotate(query, cos, sin, cell.scale)
        key = recorder.rotate(key, cos, sin)
    if cell.decay == "input":
        least = least_log_decay(cell.state_dtype)
        log_decay = recorder.log_decay(x, cell.log_decay.logit_dense, least, starts)
    else:
        log_decay = None if cell.decay is None else cell.log_decay(sequences)
        log_decay = arrange_log_decay(log_decay, length, cell.state_dtype, None, starts)
        log_decay = recorder.tensor(log_decay)
    output = recorder.attend(cell.operator, query, key, value, log_decay)
    if cell.output_norm:
        output = recorder.rms_norm(output, cell.norm)
    if cell.output_gate is not None:
        (gates,) = recorder.project(x, (cell.gate_dense, (cell.num_heads, cell.value_dim)))
        output = recorder.gate(output, gates)
    (output,) = recorder.project(output, (cell.output_dense, (cell.output_size,)))
    return output


def transform(block, sequences, starts):
    """The outputs of an `HLADecoderBlock` without dropout, from its start."""
    from keras_hla.kernels.fusion import Recorder

    recorder = Recorder()
    with AutocastScope(None):
        x = recorder.tensor(sequences)
        normed = recorder.rms_norm(x, block.mixer_norm)
        x = recorder.add(x, record_mixer(recorder, block.cell, normed, sequences, starts))
        x = recorder.add(x, record_mlp(recorder, block, recorder.rms_norm(x, block.mlp_norm)))
        return recorder.evaluate(x)


def record_mlp(recorder, block, x):
    """As `record_mixer`, for the gated MLP of a block."""
    size = (block.gate_dense.units,)
    gates, hidden = recorder.project(x, (block.gate_dense, size), (block.up_dense, size))
    hidden = recorder.gate(hidden, gates)
    (output,) = recorder.project(hidden, (block.down_dense, (block.down_dense.units,)))
    return output
