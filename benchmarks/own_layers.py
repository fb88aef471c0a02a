"""`HLA` and `HLADecoderBlock`, checked against the cell and portable copies in float32."""

from functools import partial

import keras
from keras import ops
import numpy as np

from benchmarks import language_model, reference, runtime
from benchmarks.trainees import Announced, Trainee, keras_step, policy, width
from keras_hla.layers import HLA, HLADecoderBlock

TOKENS = 64  # at which HLA is checked against the loop of its cell
VARIANTS = {
    "": {},  # the defaults
    ", plain": {"decay": None, "conv_kernel_size": None},
    ", decay": {"decay": "input", "conv_kernel_size": None},
    ", decay, conv, gate": {"decay": "input", "conv_kernel_size": 4, "output_gate": "silu"},
}


def layers(case, which):
    del case
    return [
        _trainee("HLA", variant, _layer, operator, implementation, arguments)
        for operator, implementation in which.asked()
        for variant, arguments in VARIANTS.items()
    ]


def blocks(case, which):
    del case
    return [_trainee("HLADecoderBlock", "", _block, *asked) for asked in which.asked()]


def models(case, which):
    del case
    return [_trainee("HLADecoderBlock", "", _model, *asked) for asked in which.asked()]


def _trainee(layer, variant, build, operator, implementation, *arguments):
    asked = "" if implementation == "auto" else f", {implementation}"
    name = f"{layer} ({operator}{variant}{asked})"
    return Trainee(name, partial(build, operator, implementation, *arguments), ours=True)


def _layer(operator, implementation, arguments, case):
    layer = HLA(
        case.heads,
        case.dim,
        operator=operator,
        implementation=implementation,
        dtype=policy(case),
        **arguments,
    )
    return _step(layer, layer, case)


def _block(operator, implementation, case):
    block = _make_block(operator, implementation, case)
    return _step(block, block.mixer, case)


def _make_block(operator, implementation, case):
    return HLADecoderBlock(
        case.heads, case.dim, operator=operator, implementation=implementation, dtype=policy(case)
    )


def _step(layer, mixer, case):
    layer.build((case.batch, case.length, width(case)))
    announced = _announced(mixer, case)
    return keras_step(layer, announced, partial(_errors, layer, case, announced))


def _model(operator, implementation, case, jit):
    make_block = partial(_make_block, operator, implementation, case)
    training, blocks = language_model.of_keras(make_block, case, jit)
    return training._replace(announced=_announced(blocks[0].mixer, case))


def _announced(mixer, case):
    """The choice of `auto` for inputs of the shape, which the kernels that run must confirm."""
    x = ops.zeros((case.batch, case.length, width(case)), mixer.compute_dtype)
    implementation, reason = mixer.implementation_for(x)
    return Announced(f"{implementation} ({reason})", _sign(), implementation == "triton")


def _sign():
    """The prefix of the names of the operator's kernels: Triton's, or JAX's calls of them."""
    return {"torch": "forward_kernel", "jax": "triton_kernel_call"}.get(keras.config.backend(), "")


def _errors(layer, case, announced, call, arguments, jit):
    """Relative errors: of a float32 portable copy against its cell, and of the timed step."""
    copy = _portable_copy(layer, case)
    errors = {"output": _difference_from_cell(copy, case)}
    if (announced.present, case.dtype, jit) == (False, "float32", "auto"):  # which is the copy
        return errors
    backend = runtime.current()
    inputs, _, cotangent = arguments
    # Without the gradients of the first outputs: sums of few products, which may be near zero, and
    # whose norm then makes rounding large.
    cotangent = backend.to_numpy(cotangent).astype("float32")
    cotangent[:, : min(TOKENS, case.length // 2)] = 0
    step = keras_step(copy, Announced("portable"))
    of_copy, copied = backend.training(step.function, "auto"), [inputs[0], *step.weights]
    output, (dinput, *dweights) = _run(of_copy, copied, cotangent, "float32")
    found, (found_dinput, *found_dweights) = _run(call, inputs, cotangent, case.dtype)
    errors["output at the shape"] = reference.relative_error(found, output)
    errors["dinput"] = reference.relative_error(found_dinput, dinput)
    errors["dweights"] = max(map(reference.relative_error, found_dweights, dweights))
    return errors


def _portable_copy(layer, case):
    config = {**layer.get_config(), "dtype": "float32", "implementation": "portable"}
    copy = type(layer).from_config(config)
    copy.build((case.batch, case.length, width(case)))
    copy.set_weights(layer.get_weights())
    return copy


def _run(call, inputs, cotangent, dtype):
    backend = runtime.current()
    output, gradients = call(inputs, [], backend.tensor(cotangent, dtype))
    return backend.to_numpy(output), [backend.to_numpy(x) for x in gradients]


def _difference_from_cell(layer, case):
    """The relative difference of outputs from those of the loop of Keras over the cell."""
    backend = runtime.current()
    shape = (1, min(TOKENS, case.length), width(case))
    x = np.random.default_rng(1).standard_normal(shape).astype("float32")
    loop = keras.layers.RNN(layer.cell, return_sequences=True, dtype="float32")

    def run(layer, x):
        x = backend.tensor(x.astype("float32"), "float32")
        return backend.to_numpy(backend.forward(layer, "off")([x], []))

    if isinstance(layer, HLA):
        expected = run(loop, x)
    else:
        norms = layer.mixer_norm.scale, layer.mlp_norm.scale
        kernels = (dense.kernel for dense in (layer.gate_dense, layer.up_dense, layer.down_dense))
        weights = (ops.convert_to_numpy(v).astype("float64") for v in (*norms, *kernels))
        expected = reference.block(x.astype("float64"), partial(run, loop), *weights)
    return reference.relative_error(run(layer, x), expected)
