"""Whether a model can be read piece by piece: it is tried."""

import keras
import numpy as np

from keras_hla.backend import stateless
from keras_hla.streaming.model_call import ModelCall

# Two pieces. Each begins with a token that is not 0, which some embeddings take for padding.
_TOKENS = np.array([[1, 0, 1, 1, 1, 0], [1, 1, 0, 1, 0, 0]])
_LENGTH, _PIECE = 6, 3


def check_streams(model):
    """Raises a `ValueError` that names the layer by which a model cannot be streamed.

    A model can be if in two pieces, and with the states between them, it gives the
    outputs of the whole.

    Returns:
        The `HLA` layers of the model, once per call, in order.
    """
    layers, same = _try(model)
    if not same:
        name = _first_that_mixes(model) or model.name
        raise ValueError(
            "A model that streams is made of `HLA` layers, their blocks, and layers that act on "
            f"each time step alone. Received: layer '{name}', whose outputs for a piece of a "
            "sequence are not those that it has in the whole"
        )
    return layers


def _try(model):
    """The `HLA` layers, and whether the outputs in pieces are those of the whole."""
    call = ModelCall(model)
    if not call.sequences:
        raise ValueError(
            "Argument `model` must have an input of a sequence, as in `keras.Input((None,))`. "
            f"Received: inputs of shapes {[x.shape for x in call.inputs.values()]}"
        )
    layers: list[keras.layers.Layer] = []

    def run(inputs, states):
        outputs, scope = call(inputs, states)
        layers[:] = scope.layers
        return outputs, scope.states

    # With weights that differ from those of the model: one that is zero hides nothing then.
    rng = np.random.default_rng(0)
    variables = [v for v in model.trainable_variables if "float" in v.dtype]
    values = [
        v.value + keras.ops.cast(0.05 * rng.standard_normal(v.shape), v.dtype) for v in variables
    ]
    attempt = stateless(run, variables)
    inputs = {name: _random(rng, x, name in call.sequences) for name, x in call.inputs.items()}

    def piece(begin):
        return {
            name: x[:, begin : begin + _PIECE] if name in call.sequences else x
            for name, x in inputs.items()
        }

    whole, _ = attempt(values, inputs, None)
    first, states = attempt(values, piece(0), None)
    second, _ = attempt(values, piece(_PIECE), states)
    tolerance = 1e-3 if model.compute_dtype in ("float32", "float64") else 5e-2
    same = all(_same(whole[n], first[n], second[n], tolerance) for n in whole)
    return list(layers), same


def _random(rng, x, is_sequence):
    if x.dtype.startswith(("int", "uint", "bool")):
        tokens = _TOKENS if is_sequence else np.ones((2, 1))
        shape = (2, _LENGTH if is_sequence else x.shape[1], *x.shape[2:])
        tokens = tokens.reshape(tokens.shape + (1,) * (len(shape) - 2))
        return np.broadcast_to(tokens, shape).astype(x.dtype)
    shape = (2, _LENGTH, *x.shape[2:]) if is_sequence else (2, *x.shape[1:])
    return rng.standard_normal(shape).astype(x.dtype)


def _same(whole, first, second, tolerance):
    whole, first, second = (
        np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")))
        for x in (whole, first, second)
    )
    has_time = [x.shape[1:2] for x in (whole, first, second)] == [(_LENGTH,), (_PIECE,), (_PIECE,)]
    pieces = np.concatenate([first, second], axis=1) if has_time else second
    if whole.shape != pieces.shape:
        return False
    return np.max(np.abs(whole - pieces), initial=0) <= tolerance * np.max(np.abs(whole), initial=0)


def _first_that_mixes(model):
    """The name of the first layer or operation of which the output cannot be streamed."""
    model = ModelCall(model).model
    for operation in model.operations:
        if isinstance(operation, keras.Model):
            name = _first_that_mixes(operation)
            if name:
                return name
        elif not _streams(model, operation):
            return operation.name
    return None


def _streams(model, operation):
    try:
        output = operation.output
    except AttributeError:  # It is called more than once, so Keras does not say which is meant.
        return True
    try:
        return _try(keras.Model(model.input, output))[1]
    except Exception:  # Whatever a layer raises for a piece, it has not given the whole's outputs.
        return False
