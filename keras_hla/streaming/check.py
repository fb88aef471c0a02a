"""Whether a model can be read piece by piece: each of its operations is tried."""

import inspect

import keras
from keras import tree
import numpy as np

from keras_hla.backend.compiling import compiled_for_one_call, stateless, traced
from keras_hla.layers.hla import HLA
from keras_hla.layers.hla_decoder_block import HLADecoderBlock
from keras_hla.layers.state_scope import StateScope
from keras_hla.streaming.model_call import ModelCall
from keras_hla.streaming.signal import ROWS, Signal, signal_of

# An operation is tried with one of these numbers of steps and one step more. They are prime, so
# that no period of positions goes unnoticed; and the last, alone, must not miss those before it.
_LENGTHS = (13, 31, 101, 601)
_MOST_ELEMENTS, _MOST_PRODUCTS = 2**22, 2**30  # in the longest trial that is worth its time


def check_streams(model):
    """Raises a `ValueError` that names the layer by which a model cannot be streamed.

    A model can be if each of its operations can, tried by itself on random tensors: it gives
    for two pieces, with the states between them, what it gives for the whole.

    Returns:
        The `StateScope` of a call, which has met the `HLA` layers of the model.
    """
    call = ModelCall(model)
    if not call.sequences:
        raise ValueError(
            "Argument `model` must have an input of a sequence, as in `keras.Input((None,))`. "
            f"Received: inputs of shapes {[x.shape for x in call.inputs.values()]}"
        )
    inputs = {
        name: Signal(
            (ROWS, *(n or 1 for n in x.shape[1:])), x.dtype, 1 if name in call.sequences else None
        )
        for name, x in call.inputs.items()
    }
    _Trial().visit(call.model, call.arrange_inputs(inputs))
    rng = np.random.default_rng(0)
    pieces = {
        name: keras.ops.convert_to_tensor(signal.draw(rng, 1)[0], signal.dtype)
        for name, signal in inputs.items()
    }
    return traced(call, pieces)[1]


class _Trial:
    """Visits the operations of a model, in order, and tries each."""

    def __init__(self):
        self._rng = np.random.default_rng(0)
        self._done = {}  # outputs of our own layers, of which many may be alike

    def visit(self, operation, *args, **kwargs):
        """The signals that an operation gives for signals among its arguments."""
        graph, flat = _graph(operation), tree.flatten(args)
        named = any(x is not None for x in tree.flatten(kwargs))
        if graph is not None and not named and len(graph.inputs) == len(flat):
            return graph._run_through_graph(
                flat, operation_fn=lambda inner: lambda *a, **k: self.visit(inner, *a, **k)
            )
        signals = [x for x in tree.flatten((args, kwargs)) if isinstance(x, Signal)]
        if type(operation) not in (HLA, HLADecoderBlock):
            return self._try(operation, args, kwargs, signals)
        config = operation.get_config()
        for name in ("name", "seed", "trainable"):
            del config[name]
        key = repr((type(operation), config, args, kwargs))
        if key not in self._done:
            self._done[key] = self._try(operation, args, kwargs, signals)
        return self._done[key]

    def _try(self, operation, args, kwargs, signals):
        run = _function(operation, args, kwargs, self._rng)
        length = _length(operation, signals)
        pieces = map(list, zip(*(x.draw(self._rng, length) for x in signals), strict=True))
        try:
            outputs = run(*pieces)
        except Exception as error:
            # Keras puts another in its place, with all arguments of the call.
            reason = error.__context__ if error.__suppress_context__ else error
            raise _refusal(operation, f"which cannot read a piece: {reason}") from error
        varies = any(x.varies for x in signals)
        outputs = [signal_of(*x, length, varies) for x in zip(*outputs, strict=True)]
        if None in outputs:
            raise _refusal(
                operation,
                "whose outputs for a piece of a sequence are not those that it has in the whole",
            )
        return outputs


def _refusal(operation, reason):
    return ValueError(
        "A model that streams is made of `HLA` layers, their blocks, and layers that act on "
        f"each time step alone. Received: layer '{operation.name}', {reason}"
    )


def _graph(operation):
    """The graph of operations that an operation is, or `None`."""
    kind = type(operation)
    if kind.call is keras.Sequential.call and getattr(operation, "inputs", None):
        return ModelCall(operation).model
    functional = isinstance(operation, keras.Function)
    return operation if functional and kind.call.__qualname__ == "Functional.call" else None


def _function(operation, args, kwargs, rng):
    """`f(whole, first, last)`: lists of the outputs for lists of arrays in the place of signals.

    Its weights differ from those of the operation: one that is zero hides nothing then.
    """
    variables = [v for v in getattr(operation, "variables", []) if "float" in v.dtype]
    values = [v.value for v in variables]
    shifts = [rng.random(v.shape, "float32") for v in variables]
    if "training" in inspect.signature(operation.call).parameters:
        kwargs = kwargs | {"training": False}

    def call(arrays, states=None):
        arrays = iter(arrays)
        filled_args, filled_kwargs = tree.map_structure(
            lambda x: _tensor(next(arrays), x.dtype) if isinstance(x, Signal) else x,
            (args, kwargs),
        )
        with StateScope(states) as scope:
            outputs = operation(*filled_args, **filled_kwargs)
        return tree.flatten(outputs), scope.states

    def call_with_pieces(whole, first, last):
        whole, _ = call(whole)
        first, states = call(first)
        return whole, first, call(last, states)[0]

    with_values = stateless(call_with_pieces, variables)

    # Compiled as one, since JAX takes longer to compile operation after operation.
    @compiled_for_one_call
    def run(values, shifts, *pieces):
        shifted = [x + 0.1 * _tensor(s, x.dtype) for x, s in zip(values, shifts, strict=True)]
        return with_values(shifted, *pieces)

    return lambda *pieces: run(values, shifts, *pieces)


def _tensor(array, dtype):
    return keras.ops.cast(keras.ops.convert_to_tensor(array), dtype)


def _parts(operation):
    layer = isinstance(operation, keras.layers.Layer)
    return operation._flatten_layers() if layer else [operation]


def _has_states(operation):
    return any(isinstance(x, HLA) for x in _parts(operation))


def _length(operation, signals):
    """The length of a trial: long, but for large layers; and beyond the reach of convolutions."""
    reach = sum(
        (np.max(x.kernel_size) - 1) * np.max(x.dilation_rate)
        for x in _parts(operation)
        if hasattr(x, "kernel_size") and hasattr(x, "dilation_rate")
    )
    elements = max((x.step_size for x in signals), default=1)
    products = max(
        elements, sum(int(np.prod(v.shape)) for v in getattr(operation, "variables", []))
    )
    longest = min(_MOST_ELEMENTS // elements, _MOST_PRODUCTS // products) // ROWS
    fitting = [n for n in _LENGTHS[1:] if n <= longest and not _has_states(operation)]
    return max([_LENGTHS[0], int(reach) + 1, *fitting])
