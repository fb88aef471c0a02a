"""Whether a model can be read piece by piece: each of its operations is tried."""

import contextlib
import inspect

import keras
from keras import tree
import numpy as np

from keras_hla.backend.compiling import compiled_for_one_call, stateless, traced
from keras_hla.layers.hla import HLA
from keras_hla.layers.hla_decoder_block import HLADecoderBlock
from keras_hla.layers.state_scope import StateScope
from keras_hla.streaming.model_call import ModelCall
from keras_hla.streaming.signal import ROWS, Signal, signal_of, signal_of_shapes

# An operation is tried with one of these numbers of steps and one step more. They are prime, so
# that no period of positions goes unnoticed; and the last, alone, must not miss those before it.
_LENGTHS = (13, 31, 101, 601)
_MOST_ELEMENTS, _MOST_PRODUCTS = 2**22, 2**30  # in the longest trial that is worth its time
# Layers that act on each time step alone, or stream, if they can read a piece.
_KNOWN = (HLA, HLADecoderBlock, keras.layers.Dense, keras.layers.Dropout, keras.layers.Embedding)


def check_streams(model):
    """Raises a `ValueError` that names the layer by which a model cannot be streamed.

    A model can be if each of its operations can. Of some layers that is known. Others are
    tried, each by itself on random tensors: it gives for two pieces, with the states
    between them, what it gives for the whole.

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
    pieces = {name: _tensor(x.draw(rng, 1)[0], x.dtype) for name, x in inputs.items()}
    return traced(call, pieces)[1]


class _Trial:
    """Visits the operations of a model, in order, and tries each."""

    def __init__(self):
        self._rng = np.random.default_rng(0)
        self._known = {}  # outputs of known layers, of which many may be alike

    def visit(self, operation, *args, **kwargs):
        """The signals that an operation gives for signals among its arguments."""
        graph, flat = _graph(operation), tree.flatten(args)
        named = any(x is not None for x in tree.flatten(kwargs))
        if graph is not None and not named and len(graph.inputs) == len(flat):
            return graph._run_through_graph(
                flat, operation_fn=lambda inner: lambda *a, **k: self.visit(inner, *a, **k)
            )
        signals = [x for x in tree.flatten((args, kwargs)) if isinstance(x, Signal)]
        if not _is_known(operation):
            return self._try(operation, args, kwargs, signals)
        config = operation.get_config()
        for name in ("name", "seed", "trainable"):
            config.pop(name, None)
        key = repr((type(operation), config, args, kwargs))
        if key not in self._known:
            self._known[key] = self._trust(operation, args, kwargs, signals)
        return self._known[key]

    def _trust(self, operation, args, kwargs, signals):
        """The signals that a layer gives, from shapes alone."""
        call = _function(operation, args, kwargs)
        with _refusing(operation):
            one, two = (
                traced(
                    lambda *arrays: call(arrays)[0],
                    *(x.draw(self._rng, length - 1)[0] for x in signals),
                )
                for length in (1, 2)
            )
        varies = any(x.varies for x in signals)
        return [signal_of_shapes(x, y, varies) for x, y in zip(one, two, strict=True)]

    def _try(self, operation, args, kwargs, signals):
        run = _with_other_weights(operation, _function(operation, args, kwargs), self._rng)
        length = _length(operation, signals)
        pieces = zip(*(x.draw(self._rng, length) for x in signals), strict=True)
        with _refusing(operation):
            whole, first, last = run(*pieces)
        varies = any(x.varies for x in signals)
        found = [signal_of(*x, length, varies) for x in zip(whole, first, last, strict=True)]
        if None in found:
            raise _refusal(
                operation,
                "whose outputs for a piece of a sequence are not those that it has in the whole",
            )
        return found


@contextlib.contextmanager
def _refusing(operation):
    """Turns exceptions of an operation that is called into refusals of it."""
    try:
        yield
    except Exception as error:
        # Keras puts another in its place, with all arguments of the call.
        reason = error.__context__ if error.__suppress_context__ else error
        raise _refusal(operation, f"which cannot read a piece: {reason}") from error


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


def _is_known(operation):
    """Whether it is known that a layer streams: if it is made of known layers and activations."""
    if type(operation) not in _KNOWN:
        return False
    parts = _parts(operation)
    kinds = {type(x) for x in parts} | {type(x.operator) for x in parts if hasattr(x, "operator")}
    names = "activation", "feature_map", "conv_activation", "output_gate"
    functions = {getattr(x, name, None) for x in parts for name in names} - {None}
    return all(kind in _KNOWN or _is_from(("keras_hla",), kind) for kind in kinds) and all(
        # Other functions of Keras, such as `keras.ops.flip`, may mix time steps.
        inspect.isfunction(x) and _is_from(("keras.src.activations", "keras_hla"), x)
        for x in functions
    )


def _is_from(packages, x):
    return f"{x.__module__}.".startswith(tuple(f"{package}." for package in packages))


def _function(operation, args, kwargs):
    """`f(arrays, states)`: outputs and new states, with arrays in the place of signals."""
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

    return call


def _with_other_weights(operation, call, rng):
    """`f(whole, first, last)`: the outputs for arrays, with other weights than the operation has.

    One that is zero hides nothing then.
    """
    variables = [v for v in getattr(operation, "variables", []) if "float" in v.dtype]
    values = [v.value for v in variables]
    shifts = [rng.random(v.shape, "float32") for v in variables]

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
