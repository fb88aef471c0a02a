"""A language model writes on: the prompt in parallel, then token by token from its states."""

import keras
from keras import ops
import numpy as np

from keras_hla.backend import compiled, compiled_scan
from keras_hla.checks import check_number, check_positive_int
from keras_hla.streaming.model_call import ModelCall
from keras_hla.streaming.sampling import sample
from keras_hla.streaming.streaming_model import streaming_model

# A prompt is read in pieces whose lengths are powers of two up to this: few to compile, and a
# bound on memory.
_LONGEST_PIECE = 1024


def generate(
    model,
    prompt,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    stop_tokens=(),
    seed=None,
    tokens_per_call=32,
):
    """Continues sequences of tokens with a language model.

    The prompt is read in parallel; then a compiled loop draws token by token. Its
    memory depends neither on the length of the prompt nor on the number of new
    tokens.

    Args:
        model: Model that `keras_hla.streaming_model` takes, from integer tokens
            `(batch, length)` to logits `(batch, length, vocabulary)`.
        prompt: The tokens to continue: a sequence of integers, or a list of them,
            of different lengths, each of which is continued on its own. No prompt
            is empty.
        max_new_tokens: Largest number of tokens to draw for each.
        temperature: Number `>= 0` by which logits are divided. 0 always takes the
            likeliest token.
        top_k: Draw from this many of the likeliest tokens. `None` is all.
        top_p: Draw from the likeliest tokens that together have this probability,
            in (0, 1]. `None` is all.
        stop_tokens: Integers. A continuation ends with the first of these.
        seed: Integer. With the same seed the same tokens are drawn on a backend,
            whatever else is in the batch. `None` draws others each time.
        tokens_per_call: Number of tokens drawn per call of the compiled loop.

    Returns:
        The new tokens, an int32 array, or a list of them for a list of prompts.

    Raises:
        ValueError: if an argument is outside of what it may be, or the model
            gives NaN.

    Example:

    >>> tokens = keras.Input((None,), dtype="int32", name="tokens")
    >>> x = keras.layers.Embedding(256, 32)(tokens)
    >>> x = keras_hla.layers.HLADecoderBlock(num_heads=2, key_dim=16)(x)
    >>> model = keras.Model(tokens, keras.layers.Dense(256)(x))
    >>> keras_hla.generate(model, [72, 105], max_new_tokens=5, seed=0).shape
    (5,)
    """
    pieces = list(
        generate_stream(
            model,
            prompt,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stop_tokens,
            seed=seed,
            tokens_per_call=tokens_per_call,
        )
    )
    if _is_single(prompt):
        return np.concatenate(pieces)
    return [np.concatenate(row) for row in zip(*pieces, strict=True)]


def generate_stream(
    model,
    prompt,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    stop_tokens=(),
    seed=None,
    tokens_per_call=8,
    decode=None,
):
    """Yields what `generate` returns, piece by piece as it is drawn.

    Args:
        model: As in `generate`, as are the other arguments up to `seed`.
        tokens_per_call: Largest number of tokens of a piece.
        decode: Function from an int32 array, the new tokens of a piece, to text.

    Yields:
        The new tokens since the last piece, an int32 array, or the text that
        `decode` makes of them; for a list of prompts a list of these, empty for
        those that have ended.

    Example:

    ```python
    for text in keras_hla.generate_stream(model, prompt, 500, decode=tokenizer.decode):
        print(text, end="", flush=True)
    ```
    """
    writer = _writer(model)
    prompts = writer.check_prompt(prompt)
    check_positive_int("max_new_tokens", max_new_tokens)
    check_positive_int("tokens_per_call", tokens_per_call)
    check_number("temperature", temperature, "a number >= 0", lambda x: x >= 0)
    check_positive_int("top_k", top_k, optional=True)
    if top_p is not None:
        check_number("top_p", top_p, "None or a number in (0, 1]", lambda x: 0 < x <= 1)
    if temperature == 0:
        top_k = 1
    elif top_p is not None and top_k is None:
        top_k = writer.vocabulary_size
    top_k = None if top_k is None else min(top_k, writer.vocabulary_size)
    options = (top_k, float(temperature or 1), float(top_p or 1))
    pieces = writer.write(prompts, max_new_tokens, options, stop_tokens, seed, tokens_per_call)
    return _deliver(pieces, _is_single(prompt), decode or (lambda tokens: tokens))


def _deliver(pieces, single, decode):
    for piece in pieces:
        yield decode(piece[0]) if single else [decode(tokens) for tokens in piece]


def _is_single(prompt):
    return len(prompt) > 0 and np.ndim(prompt[0]) == 0


def _writer(model):
    # Kept with the model, for what it has compiled. Not as an attribute, which Keras would track.
    if "_keras_hla_writer" not in vars(model):
        vars(model)["_keras_hla_writer"] = _Writer(model)
    return vars(model)["_keras_hla_writer"]


class _Writer:
    """The compiled functions that continue sequences with a model."""

    def __init__(self, model):
        call = ModelCall(model)
        inputs, outputs = list(call.inputs.values()), keras.tree.flatten(model.output)
        tokens, logits = inputs[0], outputs[0]
        if not (
            (len(inputs), len(outputs)) == (1, 1)
            and (len(tokens.shape), len(logits.shape)) == (2, 3)
            and "int" in tokens.dtype
        ):
            raise ValueError(
                "Argument `model` must have one input, integer tokens (batch, length), and one "
                "output, logits (batch, length, vocabulary). Received: inputs "
                f"{[(x.shape, x.dtype) for x in inputs]}, outputs {[x.shape for x in outputs]}"
            )
        self.vocabulary_size = logits.shape[-1]
        self._stream = streaming_model(model)
        self._tokens_name, self._logits_name = next(iter(call.inputs)), call.output_names[0]
        self._variables = model.variables
        self._read = compiled(self._read_piece, self._variables)
        self._loops = {}  # compiled, by `top_k` and batch size

    def check_prompt(self, prompt):
        """The list of the prompts as arrays."""
        prompts = [np.asarray(x) for x in ([prompt] if _is_single(prompt) else prompt)]
        if not prompts:
            raise ValueError("Argument `prompt` must hold at least one token. Received: none")
        for x in prompts:
            valid = x.ndim == 1 and x.size and np.issubdtype(x.dtype, np.integer)
            if not (valid and x.min() >= 0 and x.max() < self.vocabulary_size):
                raise ValueError(
                    "Argument `prompt` must be a sequence of integers from 0 to "
                    f"{self.vocabulary_size - 1}, not empty, or a list of such. Received: {x}"
                )
        return prompts

    def write(self, prompts, max_new_tokens, options, stop_tokens, seed, tokens_per_call):
        """Yields lists of the new tokens of each prompt."""
        top_k, temperature, top_p = options
        generators = np.random.default_rng(seed).spawn(len(prompts))
        logits, states = self._read_prompts(prompts)
        live = np.ones(len(prompts), bool)
        names = self._stream.state_names
        state = (logits, *(states[name] for name in names))
        draw = self._loop(top_k, len(prompts))
        for begin in range(0, max_new_tokens, tokens_per_call):
            uniform = np.stack([g.random(tokens_per_call, "float32") for g in generators])
            options = (np.full(tokens_per_call, x, "float32") for x in (temperature, top_p))
            inputs = tuple(map(ops.convert_to_tensor, (uniform.T, *options)))
            tokens, state = draw(state, inputs)
            valid = ops.logical_not(ops.any(ops.isnan(state[0]), axis=-1))
            tokens = ops.convert_to_numpy(tokens).T[:, : max_new_tokens - begin]
            if not np.all(ops.convert_to_numpy(valid) | ~live):
                raise ValueError("The model gave logits that are NaN.")
            piece = []
            for row in range(len(prompts)):
                new = tokens[row] if live[row] else tokens[row, :0]
                ends = np.flatnonzero(np.isin(new, list(stop_tokens)))
                if ends.size:
                    new, live[row] = new[: ends[0] + 1], False
                piece.append(new)
            yield piece
            if not live.any():
                return

    def _read_prompts(self, prompts):
        """The logits after the prompts, `(batch, vocabulary)`, and the states."""
        longest = max(x.size for x in prompts)
        size = min(_LONGEST_PIECE, 1 << (longest - 1).bit_length())
        length = -(-longest // size) * size
        tokens = np.zeros((len(prompts), length), "int32")
        mask = np.zeros(tokens.shape, bool)
        for row, prompt in enumerate(prompts):  # at the end, so that all have it at one place
            tokens[row, length - prompt.size :] = prompt
            mask[row, length - prompt.size :] = True
        states = self._stream.initial_state(len(prompts))
        for begin in range(0, length, size):
            piece = (ops.convert_to_tensor(x[:, begin : begin + size]) for x in (tokens, mask))
            logits, states = self._read(*piece, states)
        return logits, states

    def _read_piece(self, tokens, mask, states):
        inputs = {self._tokens_name: tokens, "mask": mask} | states
        outputs = self._stream.step(inputs)
        logits = outputs.pop(self._logits_name)
        return ops.cast(logits[:, -1], "float32"), outputs

    def _loop(self, top_k, batch_size):
        """The compiled function that draws tokens, one after the other."""
        names = self._stream.state_names

        def step(state, entries):
            logits, *values = state
            uniform, temperature, top_p = entries
            token = sample(logits, uniform, temperature, top_p, top_k)
            states = dict(zip(names, values, strict=True))
            logits, states = self._read_piece(token[:, None], None, states)
            return token, (logits, *(states[name] for name in names))

        key = (top_k, batch_size)
        if key not in self._loops:
            self._loops[key] = compiled_scan(step, self._variables, "int32")
        return self._loops[key]
