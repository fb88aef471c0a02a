"""What continues sequences: the prompt in parallel, then token by token from the states."""

import keras
from keras import ops
import numpy as np

from keras_hla.backend.compiling import compiled, compiled_scan
from keras_hla.backend.tensors import at_least
from keras_hla.checks import check_shape
from keras_hla.streaming.drawing import check_input_names
from keras_hla.streaming.model_call import ModelCall
from keras_hla.streaming.sampling import sample
from keras_hla.streaming.snapshot import Snapshot
from keras_hla.streaming.streaming_model import streaming_model

# A prompt is read in pieces whose lengths are powers of two up to this: few to compile, and a
# bound on memory.
_LONGEST_PIECE = 1024


def writer_of(model):
    """The writer of a model as it is now, which is kept for what it has compiled."""
    if callable(getattr(model, "generate", None)):
        raise ValueError(
            "Argument `model` must not have a method `generate`: call that, `model.generate(...)`. "
            f"Received: {model}"
        )
    writer = getattr(model, "_keras_hla_writer", None)
    if writer is None or not writer.snapshot.matches(model):
        writer = Writer(model)
        vars(model)["_keras_hla_writer"] = writer  # not by `setattr`, or Keras would track it
    return writer


def write(model, prompts, inputs, drawing, tokens_per_call):
    """Yields lists of the new tokens of each prompt."""
    numbers = [np.array([x] * tokens_per_call, "float32") for x in (drawing.inverse, drawing.share)]
    generators = drawing.generators(len(prompts))
    writer = writer_of(model)
    uniform = np.empty((tokens_per_call, len(prompts)), "float32")
    writer.prepare_to_draw((uniform, *numbers), drawing.candidates)
    state = writer.read(prompts, inputs)
    live = np.ones(len(prompts), bool)
    for begin in range(0, drawing.max_new_tokens, tokens_per_call):
        uniform = np.stack([g.random(tokens_per_call, "float32") for g in generators], axis=1)
        # The model may change from piece to piece.
        tokens, state = writer_of(model).draw(state, (uniform, *numbers), drawing.candidates)
        piece = []
        for row, drawn in enumerate(tokens.T[:, : drawing.max_new_tokens - begin]):
            ends = np.flatnonzero(np.isin(drawn, drawing.stops))
            count = ends[0] + 1 if ends.size else len(drawn)
            piece.append(drawn[: count if live[row] else 0])
            live[row] &= not ends.size
        if np.any(np.concatenate(piece) < 0):
            raise ValueError("The model gave logits that hold NaN, or are all minus infinity.")
        yield piece
        if not live.any():
            return


class Writer:
    """The compiled functions that continue sequences with a model, as long as it has these parts.

    Args:
        model: the model.
    """

    def __init__(self, model):
        call = ModelCall(model)
        self.snapshot = Snapshot(model, lambda: vars(model).pop("_keras_hla_writer", None))
        self._tokens_name = _find_tokens(call)
        self._tokens_dtype = call.inputs[self._tokens_name].dtype
        self._logits_name = call.output_names[0]
        self.vocabulary_size = call.model.outputs[0].shape[-1]
        dtype = keras.backend.standardize_dtype(call.model.outputs[0].dtype)
        self.logits_dtype = keras.backend.result_type(dtype, "float32")
        self.constants = {n: x for n, x in call.inputs.items() if n not in call.sequences}
        self.stream = streaming_model(model)
        # What a step takes from the one before, beside the logits.
        self.names = [*self.stream.state_names, *self.constants]
        self.read_piece = compiled(self.trace_piece, self.stream.variables)
        self._loops = {}  # compiled, by `top_k` and batch size

    def check_inputs(self, inputs, count):
        """The further inputs as tensors of the batch.

        Args:
            inputs: dictionary of arrays, or `None`.
            count: number of prompts, or `None` for a single one, whose inputs have no batch axis.
        """
        inputs, batch = check_input_names(inputs, self.constants), {}
        for name, expected in self.constants.items():
            x = ops.convert_to_tensor(inputs[name], expected.dtype)
            single = count is None
            check_shape(f"inputs['{name}']", x, (*[count][single:], *expected.shape[1:]))
            batch[name] = x[None] if single else x
        return batch

    def read(self, prompts, inputs):
        """The tuple of the logits after the prompts, `(batch, vocabulary)`, and what goes on."""
        longest = max(x.size for x in prompts)
        size = min(_LONGEST_PIECE, 1 << (longest - 1).bit_length())
        length = -(-longest // size) * size
        tokens = np.zeros((len(prompts), length), "int32")
        mask = np.zeros(tokens.shape, bool)
        for row, prompt in enumerate(prompts):  # at the end, so that all have it at one place
            tokens[row, length - prompt.size :] = prompt
            mask[row, length - prompt.size :] = True
        states = self.stream.initial_state(len(prompts)) | inputs
        for begin in range(0, length, size):
            piece = (ops.convert_to_tensor(x[:, begin : begin + size]) for x in (tokens, mask))
            logits, states = self.read_piece(*piece, states)
        return logits, *(states[name] for name in self.names)

    def prepare_to_draw(self, entries, top_k):
        """Begins to compile what `draw` needs, if it is new, while the prompts are read.

        Args:
            entries: as in `draw`, of which the shapes matter.
            top_k: as in `sample`.
        """
        count = entries[0].shape[1]
        if (top_k, count) in self._loops:
            return
        state = [keras.KerasTensor((count, self.vocabulary_size), self.logits_dtype)]
        for name in self.names:
            x = self.stream.input[name]
            state.append(keras.KerasTensor((count, *x.shape[1:]), x.dtype))
        self._loop(top_k, count).compile_ahead(tuple(state), entries)

    def draw(self, state, entries, top_k):
        """The next tokens, an array `(entries, batch)`, and the state after them.

        Args:
            state: as `read` returns it.
            entries: tuple of arrays, for each token the last arguments of `sample` but `top_k`.
            top_k: as in `sample`.
        """
        loop = self._loop(top_k, state[0].shape[0])
        tokens, state = loop(state, tuple(map(ops.convert_to_tensor, entries)))
        return ops.convert_to_numpy(tokens), state

    def _loop(self, top_k, count):
        key = (top_k, count)
        if key not in self._loops:
            step = self._step(top_k)
            self._loops[key] = compiled_scan(step, self.stream.variables, "int32")
        return self._loops[key]

    def _step(self, top_k):
        def step(state, entries):
            logits, *values = state
            uniform, inverse, top_p = entries
            token = sample(logits, uniform, inverse, top_p, top_k)
            states = dict(zip(self.names, values, strict=True))
            logits, states = self.trace_piece(at_least(token, 0)[:, None], None, states)
            return token, (logits, *(states[name] for name in self.names))

        return step

    def trace_piece(self, tokens, mask, states):
        """The logits of the last token of each row, and the states after the piece.

        Args:
            tokens: integer tensor of shape `(batch, length)`.
            mask: boolean tensor of the same shape, or `None`.
            states: dictionary of the states before the piece, and of the further inputs.
        """
        tokens = ops.cast(tokens, self._tokens_dtype)
        outputs = self.stream.step({self._tokens_name: tokens, "mask": mask} | states)
        logits = outputs.pop(self._logits_name)[:, -1]
        return ops.cast(logits, self.logits_dtype), states | outputs


def _find_tokens(call):
    """The name of the input of tokens."""
    sequences = [call.inputs[name] for name in call.sequences]
    outputs = call.model.outputs
    # A Sequential model that is built from a shape has an input of floats.
    valid = all("int" in x.dtype or x.dtype in ("float32", "float64") for x in sequences)
    if not valid or [len(x.shape) for x in (*sequences, *outputs)] != [2, 3]:
        received = {name: (x.shape, x.dtype) for name, x in call.inputs.items()}
        raise ValueError(
            "Argument `model` must have one input that is a sequence, integer tokens (batch, "
            "length), and one output, logits (batch, length, vocabulary). Received: inputs "
            f"{received}, outputs {[x.shape for x in outputs]}"
        )
    return call.sequences[0]
