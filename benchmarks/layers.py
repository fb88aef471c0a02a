"""The training step of one layer: `HLA` beside Keras' own attention and recurrence.

Forward and backward, with the gradients of the input and of all weights, without an optimizer. The
width of the layer is heads times dim, that of the input as well.
"""

import keras
import numpy as np

from benchmarks import memory, reference, runtime, timing
from benchmarks.report import Row

TOKENS = 64  # at which HLA is held to the loop of its cell
TOLERANCE = {"float32": 1e-2, "bfloat16": 5e-2, "float16": 5e-2}
ATTENTION = "MultiHeadAttention"


def measure(case, operators, options):
    """Returns a row for each layer, on one case."""
    backend = runtime.current()
    title = f"layer, {case}"
    rows, samples = {}, {}
    for name in names(case, operators):
        row = rows[name] = Row(title, name)
        ours = name.startswith("HLA")
        try:
            layer = build(name, case)
            if ours:
                row.errors["output"] = _difference_from_cell(layer, case)
                if row.refuse(TOLERANCE[case.dtype]):
                    continue
            call, arguments = training_step(layer, case, options.jit)
            row.megabytes = backend.added_memory(call, arguments)
            if row.megabytes is None and options.process_memory:
                small = (name, case.short(), options.jit)
                row.megabytes = memory.added(fresh_step, small, (name, case, options.jit))
        except Exception as error:  # whatever a peer raises is why it has no time
            row.give_up(error, failed=ours)
            continue
        sets = runtime.calls(backend, [arguments])
        samples[name] = lambda call=call, sets=sets: backend.time_calls(call, sets)
    for name, times in timing.in_turns(samples, options.seconds).items():
        if isinstance(times, Exception):
            rows[name].give_up(times, failed=name.startswith("HLA"))
        else:
            rows[name].times["training step"] = times
    return list(rows.values())


def names(case, operators):
    decay = ", decay" if case.decay else ""
    ours = [f"HLA ({operator}{decay})" for operator in operators]
    return [*ours, ATTENTION, f"{ATTENTION}, flash", "GRU"]


def build(name, case):
    """The layer of a name, with its weights."""
    from keras_hla.layers import HLA

    dtype = case.dtype if case.dtype == "float32" else f"mixed_{case.dtype}"
    width = case.heads * case.dim
    if name.startswith("HLA"):
        operator = name.removeprefix("HLA (").removesuffix(")").removesuffix(", decay")
        options = {"decay": "input"} if case.decay else {}
        layer = HLA(
            case.heads,
            case.dim,
            value_dim=case.value_dim,
            operator=operator,
            dtype=dtype,
            **options,
        )
    elif name.startswith(ATTENTION):
        layer = keras.layers.MultiHeadAttention(
            case.heads,
            case.dim,
            value_dim=case.value_dim,
            flash_attention=True if name.endswith("flash") else None,
            dtype=dtype,
        )
    else:
        layer = keras.layers.GRU(width, return_sequences=True, dtype=dtype)
    shape = (case.batch, case.length, width)
    layer.build(*[shape] * (2 if name.startswith(ATTENTION) else 1))
    return layer


def training_step(layer, case, jit):
    """The function and its arguments; what it returns is for `time_calls`."""
    backend = runtime.current()
    variables = layer.trainable_variables

    def function(x, *weights):
        with keras.StatelessScope(state_mapping=zip(variables, weights, strict=True)):
            if isinstance(layer, keras.layers.MultiHeadAttention):
                return layer(x, x, use_causal_mask=True)
            return layer(x)

    shape = (case.batch, case.length, case.heads * case.dim)
    x, cotangent = np.random.default_rng(0).standard_normal((2, *shape), "float32")
    inputs = [backend.tensor(x, "float32"), *(v.value for v in variables)]
    # Under TensorFlow cuDNN's GRU is no part of XLA: Keras does not compile it either.
    jit = jit if layer.supports_jit or jit == "on" else "off"
    call = backend.training(function, jit)
    return call, (inputs, [], backend.tensor(cotangent, layer.compute_dtype))


def fresh_step(name, case, jit):
    """One step as a function without arguments, in a process that has not built the layer."""
    call, arguments = training_step(build(name, case), case, jit)
    backend = runtime.current()
    return lambda: backend.time_calls(call, [arguments])


def _difference_from_cell(layer, case):
    """The relative difference of the layer's outputs from the loop of Keras over its cell."""
    shape = (1, min(TOKENS, case.length), case.heads * case.dim)
    x = np.random.default_rng(1).standard_normal(shape).astype("float32")
    backend = runtime.current()
    x = backend.tensor(x, "float32")
    loop = keras.layers.RNN(layer.cell, return_sequences=True, dtype=layer.dtype_policy)
    expected = backend.to_numpy(loop(x))
    return reference.relative_error(backend.to_numpy(layer(x)), expected)
