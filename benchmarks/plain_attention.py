"""Attention and its block written in PyTorch or JAX alone, checked against float64 NumPy.

One product for queries, keys and values, the rotation by position, the framework's fused attention
and one product for the output; the block has norms before it and the MLP of `HLADecoderBlock`.
"""

from functools import partial
import importlib

import keras
import numpy as np

from benchmarks import reference, runtime
from benchmarks.trainees import Announced, Step, Trainee, hidden, width


def layers(case, which):
    del case, which
    build = partial(_build, "attention", ("qkv", "out"))
    return [Trainee("fused qkv, rotation, fused attention", build, peer="fused_attention")]


def blocks(case, which):
    del case, which
    names = ("norm", "qkv", "out", "mlp_norm", "gate", "up", "down")
    build = partial(_build, "block", names)
    return [Trainee("block of fused qkv, rotation, fused attention", build, peer="fused_block")]


def models(case, which):
    del case, which
    return []


def _build(form, names, case):
    """`form` is "attention" or "block", a function of the framework's file."""
    plain = importlib.import_module(f"benchmarks.plain_{keras.config.backend()}")
    backend = runtime.current()
    arrays = _weights(names, case)
    angles = [backend.tensor(x, case.dtype) for x in reference.angles(case.length, case.dim)]

    def function(x, *weights):
        inputs = (plain.cast(y, case.dtype) for y in (x, *weights))
        cosines, sines = (y[: x.shape[1]] for y in angles)
        return getattr(plain, form)(*inputs, cosines, sines)

    return Step(
        function,
        [backend.tensor(x, "float32") for x in arrays],
        Announced(*plain.announced()),
        partial(_errors, form, names, case),
    )


def _weights(names, case):
    """Arrays of normal numbers that keep the size of what they multiply."""
    sizes = {"qkv": (width(case), 3 * width(case)), "down": (hidden(case), width(case))}
    sizes |= dict.fromkeys(("gate", "up"), (width(case), hidden(case)))
    rng = np.random.default_rng(2)
    arrays = []
    for name in names:
        if name.endswith("norm"):
            arrays.append(1 + 0.1 * rng.standard_normal(width(case)))
        else:
            rows, columns = sizes.get(name, (width(case), width(case)))
            arrays.append(rng.standard_normal((rows, columns)) * rows**-0.5)
    return [x.astype("float32") for x in arrays]


def _errors(form, names, case, call, arguments, jit):
    """The relative error of outputs on a short case."""
    del call, arguments, jit
    short, backend = case.short(), runtime.current()
    x = np.random.default_rng(3).standard_normal((short.batch, short.length, width(short)))
    weights = _weights(names, short)
    expected = _expected(form, x, weights, reference.angles(short.length, short.dim))
    step = _build(form, names, short)
    forward = backend.forward(step.function, "auto")
    output = forward([backend.tensor(x.astype("float32"), "float32"), *step.weights], [])
    return {"output": reference.relative_error(backend.to_numpy(output), expected)}


def _expected(form, x, weights, angles):
    if form == "attention":
        return reference.attention(x, *weights, *angles)
    norm, qkv, out, *mlp = weights
    return reference.block(x, lambda y: reference.attention(y, qkv, out, *angles), norm, *mlp)
