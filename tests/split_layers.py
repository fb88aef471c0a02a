"""Layers on parts of a sequence, by the loop of their cells, and on one device.

`split_sequence.py` evaluates them.
"""

import functools

import keras
from keras import ops

from keras_hla import distribution, layers

FEATURES = 6


def call(case, arrays, state, context_parallel=None):
    """The output of the layer of a case on its own part, and its states."""
    layer = build_case(case)
    distribution.split_sequence(layer, context_parallel)
    weights, inputs = separated(arrays)
    if "token_ids" not in inputs:
        arguments = (inputs.pop("sequences"),)
        inputs |= {} if state is None else {"initial_state": state}
    else:
        arguments, inputs = (inputs,), {}
    fixed = [x.value for x in layer.non_trainable_variables]
    found, _ = layer.stateless_call(weights, fixed, *arguments, **inputs)
    return (found[0], list(found[1:])) if isinstance(found, tuple) else (found, [])


def loop(case, arrays, state):
    """The same by the cell of the layer, one token of the whole sequence after the other."""
    layer = build_case(case)
    weights, inputs = separated(arrays)
    batch, length = inputs["sequences"].shape[:2]
    mask = inputs.get("mask", ops.ones((batch, length), "bool"))
    starts = ops.convert_to_tensor(case["starts"])
    x = ops.where(mask[..., None], inputs["sequences"], 0)
    state = layer.get_initial_state(batch) if state is None else list(state)

    def token(carry, inputs):
        *before, last = carry
        x, is_unmasked, is_start = inputs

        def at(rows, value, other):
            return ops.where(ops.reshape(rows, (-1, *[1] * (len(value.shape) - 1))), value, other)

        forgotten = [  # the position goes on
            at(is_start & (name != "position"), ops.zeros_like(x), x)
            for name, x in zip(layer.cell.state_names, before, strict=True)
        ]
        (output, after), _ = layer.cell.stateless_call(weights, seeds, x, forgotten)
        both = zip((*after, output), (*before, last), strict=True)
        after = [at(is_unmasked, x, y) for x, y in both]
        return tuple(after), after[-1]

    seeds = [x.value for x in layer.cell.non_trainable_variables]
    first = (*state, ops.zeros_like(x[:, 0]))
    (*state, last), outputs = ops.scan(
        token, first, [ops.swapaxes(y, 0, 1) for y in (x, mask, starts)]
    )
    if layer.zero_output_for_mask:
        outputs = ops.where(ops.swapaxes(mask, 0, 1)[..., None], outputs, 0)
    output = ops.swapaxes(outputs, 0, 1) if layer.return_sequences else last
    return output, state if layer.return_state else []


def separated(arrays):
    """The list of weights, and the dictionary of the inputs."""
    names = sorted(name for name in arrays if name.startswith("weight"))
    return [arrays[name] for name in names], {
        name: x for name, x in arrays.items() if name not in names
    }


def build_case(case):
    kind, options = case["layer"]
    return build(kind, **options)


@functools.cache
def build(kind, **options):
    """The layer of this name, or a functional model."""
    if kind == "model":
        return model(**options)
    layer = getattr(layers, kind)(**options)
    layer.build((None, None, FEATURES))
    return layer


def model(dtype=None):
    """From tokens to features; it masks tokens of zero, and has a model inside of it."""
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    x = keras.layers.Embedding(11, FEATURES, mask_zero=True, dtype=dtype)(tokens)
    x = layers.HLADecoderBlock(3, 4, dtype=dtype)(x)
    between = keras.Input((None, FEATURES), dtype=dtype)
    mixed = layers.HLA(3, 4, operator="ahla", dtype=dtype)(between)
    mixer = keras.Model(between, mixed)
    mixer.supports_masking = True  # or Keras warns that the mask ends there
    return keras.Model({"token_ids": tokens}, keras.layers.Add(dtype=dtype)([x, mixer(x)]))
