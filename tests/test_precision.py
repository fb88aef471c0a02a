"""What the operators carry: float64, float16 and bfloat16, very long sequences."""

import contextlib

from backends import compiled, relative_error, run, to_numpy
from definitions import SERIAL, Reference, serial
from family import FORMS, VARIANTS, draw, split
import keras
import numpy as np
import pytest

from keras_hla import ops

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
