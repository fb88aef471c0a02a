"""What the operators carry: float64, float16 and bfloat16, very long sequences."""

import contextlib

from backends import compiled, relative_error, run, to_numpy
from definitions import SERIAL, Reference, serial
from family import FORMS, VARIANTS, draw, split
import keras
import numpy as np
import pytest

from keras_hla import layers, ops

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def float64_enabled():
    if keras.config.backend() == "jax":
        import jax

        return jax.enable_x64(True)
    return contextlib.nullcontext()


@every_variant
def test_float64(rng, variant):
    inputs, log_decay = draw(rng, 40, "per_token")
    arrays = [x.astype("float64") for x in (*inputs, log_decay)]
    operator, options = split(variant)
    expected = Reference(serial, operator, arrays[:3], arrays[3], **options)
    with float64_enabled():
        q, k, v, g = (keras.ops.convert_to_tensor(x, "float64") for x in arrays)

        def function(q, k, v, g):
            outputs = []
            for form in FORMS:
                size = {"chunk_size": 16} if form == "chunked" else {}
                stateful = {} if form == "matrix" else {"return_state": True}
                result = ops.higher_order_attention(
                    q, k, v, operator, form, log_decay=g, **size, **stateful, **options
                )
                outputs.append(result if stateful else (result, expected.states))
            return outputs

        for output, states in compiled(function)(q, k, v, g):
            assert keras.backend.standardize_dtype(output.dtype) == "float64"
            assert relative_error(output, expected.output) <= 1e-11
            for a, e in zip(states, expected.states, strict=True):
                assert relative_error(a, e) <= 1e-11


@every_variant
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_inputs_lose_no_more_than_their_rounding(rng, variant, dtype):
    inputs, log_decay = draw(rng, 200, "per_token")
    inputs = [x / 4 for x in inputs]  # which keeps the outputs in the range of float16
    operator, options = split(variant)
    exact = Reference(serial, operator, inputs, log_decay, **options).output
    rounded = [keras.ops.cast(x, dtype) for x in inputs]
    of_rounded = Reference(serial, operator, map(to_numpy, rounded), log_decay, **options).output
    best = keras.ops.cast(keras.ops.convert_to_tensor(of_rounded.astype("float32")), dtype)

    def function(q, k, v):
        return ops.higher_order_attention(q, k, v, operator, log_decay=log_decay, **options)

    output = compiled(function)(*rounded)
    assert output.dtype == rounded[0].dtype
    # Twice the best is what we promise; it is close to once.
    assert relative_error(output, exact) <= 1.1 * relative_error(best, exact)
    assert relative_error(output, of_rounded) <= 1.1 * relative_error(best, of_rounded)


@pytest.mark.parametrize("form", FORMS)
def test_low_precision_in_every_form(rng, form):
    inputs, log_decay = draw(rng, 100, "per_token")
    rounded = [keras.ops.cast(x, "bfloat16") for x in inputs]
    exact = Reference(serial, "hla2", map(to_numpy, rounded), log_decay).output
    best = keras.ops.cast(keras.ops.convert_to_tensor(exact.astype("float32")), "bfloat16")

    def function(q, k, v):
        return ops.higher_order_attention(q, k, v, form=form, log_decay=log_decay)

    output = compiled(function)(*rounded)
    assert relative_error(output, exact) <= 1.01 * relative_error(best, exact)


@pytest.mark.parametrize("operator", ["hla2", "ahla", "hla3"])
def test_65536_tokens(operator):
    """The error of three heads, with decays of 1, 0.99 and 1e-6, grows slowly and stays small."""
    length = 65_536
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((1, length, 3, 8)).astype("float32") for _ in range(3)]
    log_decay = np.log([1.0, 0.99, 1e-6])
    step, columns = SERIAL[operator]
    state = [np.zeros((1, 3, 8, 8)) for _ in columns]
    exact = np.empty((1, length, 3, 8))
    tokens = zip(*(np.moveaxis(x.astype("float64"), 1, 0) for x in inputs), strict=True)
    for t, token in enumerate(tokens):
        exact[:, t], state = step(state, *token, np.exp(log_decay)[:, None, None], 0.0)
    output = to_numpy(
        run(lambda *x: ops.higher_order_attention(*x, operator, log_decay=log_decay), *inputs)
    )
    assert np.all(np.isfinite(output))
    print(f"\n{operator}: relative error of decays 1, 0.99, 1e-6")
    for begin, end in ((0, 1024), (1024, 8192), (8192, length)):
        window = np.s_[:, begin:end]
        errors = [relative_error(output[window][:, :, h], exact[window][:, :, h]) for h in range(3)]
        print(f"  tokens {begin:6} to {end:6}: " + ", ".join(f"{error:.1e}" for error in errors))
        assert max(errors) <= 1e-5


def layer_in_float64(layer, x):
    """What the layer computes, in NumPy and by the definition of its operator."""
    cell = layer.cell
    weights = {w.path.split("/", 2)[-1]: to_numpy(w) for w in cell.weights}
    batch, length, _ = x.shape

    def dense(x, name):
        return x @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def heads(x):
        return x.reshape(batch, length, cell.num_heads, -1)

    def norm(x, name):
        mean = np.mean(x**2, axis=-1, keepdims=True)
        return x / np.sqrt(mean + cell.norm.epsilon) * weights[f"{name}/scale"]

    def rotate(x):
        half = cell.key_dim // 2
        frequency = cell.rope_max_wavelength ** (-np.arange(half) / half)
        angle = np.arange(length)[:, None, None] * frequency
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    kernel = weights["conv/kernel"]
    rows = np.concatenate([dense(x, name) for name in ("query", "key", "value")], axis=-1)
    rows = np.pad(rows, ((0, 0), (len(kernel) - 1, 0), (0, 0)))
    rows = silu(sum(tap * rows[:, i : i + length] for i, tap in enumerate(kernel)))
    q, k, v = map(heads, np.split(rows, 3, axis=-1))
    q = rotate(norm(q, "query_norm") * cell.scale)
    k = rotate(norm(k, "key_norm"))
    decay = 1 / (1 + np.exp(-dense(x, "decay/logit")))
    output = norm(Reference(serial, "hla2", (q, k, v), np.log(decay)).output, "norm")
    return dense(output.reshape(batch, length, -1) * silu(dense(x, "gate")), "output")


def test_a_float64_policy(rng):
    x = rng.standard_normal((2, 30, 16))
    with float64_enabled():
        layer = layers.HLA(
            4, 8, decay="input", conv_kernel_size=3, qk_norm=True, output_gate="silu",
            dtype="float64",
        )  # fmt: skip
        layer.build(x.shape)
        layer.set_weights([0.3 * rng.standard_normal(w.shape) for w in layer.get_weights()])
        output = layer(x)  # an array
        assert keras.backend.standardize_dtype(output.dtype) == "float64"
        assert relative_error(output, layer_in_float64(layer, x)) <= 1e-12
        rnn = keras.layers.RNN(layer.cell, return_sequences=True, unroll=True, dtype="float64")
        assert relative_error(rnn(keras.ops.convert_to_tensor(x)), output) <= 1e-12


def test_a_block_of_a_float64_policy(rng):
    x = rng.standard_normal((2, 12, 16))

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * to_numpy(scale)

    with float64_enabled():
        block = layers.HLADecoderBlock(2, 8, dtype="float64")
        block.build(x.shape)
        block.set_weights([0.3 * rng.standard_normal(w.shape) for w in block.get_weights()])
        y = x + to_numpy(block.mixer(norm(x, block.mixer_norm.scale)))
        hidden = norm(y, block.mlp_norm.scale)
        gate = hidden @ to_numpy(block.gate_dense.kernel)
        hidden = gate / (1 + np.exp(-gate)) * (hidden @ to_numpy(block.up_dense.kernel))
        expected = y + hidden @ to_numpy(block.down_dense.kernel)
        assert relative_error(block(x), expected) <= 1e-12
