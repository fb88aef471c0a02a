"""The cost of generating one token: from a state, from the whole prefix, or from a cache.

A language model of two `HLADecoderBlock`s generates from its state, near the beginning of a stream
and far from it. The same model reads the whole prefix again for each token. A model of two blocks
of causal attention of the same sizes generates with a key-value cache, all of which each token
reads. Batch 1, float32. The memory is that of the states, or of the caches.
"""

import keras
from keras import layers, ops
import numpy as np

from benchmarks import runtime, timing
from benchmarks.cached_attention import CachedModel
from benchmarks.report import Row
import keras_hla
from keras_hla.backend.compiling import compiled, compiled_scan

VOCABULARY, WIDTH, HEADS, HIDDEN, BLOCKS = 256, 256, 4, 512, 2
CALL = 32  # tokens per call of a compiled loop
PIECE = 1000  # tokens of a piece, before the position that is measured
LONGEST_PREFIX = 2048  # that is read again for each token
LOOP, SINGLE = "token of a loop", "token of a call"


def measure(contexts, tokens, options):
    """Returns a row for each context of attention, and for positions of HLA up to `tokens`."""
    keras.utils.set_random_seed(0)
    model = language_model()
    rows = list(from_states(model, tokens, options.seconds))
    short = (context for context in contexts if context <= LONGEST_PREFIX)
    rows += [from_prefix(model, context, options.seconds) for context in short]
    return rows + [from_cache(context, options.seconds) for context in contexts]


def language_model():
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = layers.Embedding(VOCABULARY, WIDTH)(tokens)
    for _ in range(BLOCKS):
        x = keras_hla.layers.HLADecoderBlock(HEADS, WIDTH // HEADS, HIDDEN)(x)
    x = layers.RMSNormalization()(x)
    return keras.Model(tokens, layers.Dense(VOCABULARY, name="logits")(x))


def from_states(model, tokens, seconds):
    """Yields a row at 1,000, 10,000, ... tokens."""
    stream = keras_hla.streaming_model(model)
    names = stream.state_names

    def read(tokens, states):
        outputs = stream.step({"tokens": tokens, **dict(zip(names, states, strict=True))})
        return outputs["logits"][:, -1], tuple(outputs[name] for name in names)

    def step(state, entries):
        logits, states = read(state[0][:, None], state[1:])
        token = ops.cast(ops.argmax(logits, axis=-1), "int32")
        return token, (token, *states)

    piece = compiled(read, stream.variables)
    scan = compiled_scan(step, stream.variables, "int32")
    states = tuple(stream.initial_state(1).values())
    random = np.random.default_rng(0)
    for n in range(1, tokens // PIECE + 1):
        text = random.integers(0, VOCABULARY, (1, PIECE)).astype("int32")
        _, states = piece(ops.convert_to_tensor(text), states)
        position = n * PIECE
        if position in (1_000, 10_000, 100_000, 1_000_000):
            token = ops.zeros((1,), "int32")
            calls = {
                LOOP: (scan, ((token, *states), (ops.arange(CALL),)), CALL),
                SINGLE: (scan, ((token, *states), (ops.arange(1),)), 1),
            }
            row = _timed(f"HLA from its state, after {position:,} tokens", calls, seconds)
            row.megabytes = sum(ops.convert_to_numpy(s).nbytes for s in states) / 2**20
            if not all(np.isfinite(ops.convert_to_numpy(s)).all() for s in states):
                row.give_up(ValueError("the states are not finite"), failed=True)
            yield row


def from_prefix(model, context, seconds):
    """Each token reads the whole prefix."""
    forward = compiled(lambda x: model(x, training=False)[:, -1], model.variables)
    calls = {SINGLE: (forward, (ops.zeros((1, context), "int32"),), 1)}
    return _timed(f"HLA, the whole prefix of {context:,} tokens again", calls, seconds)


def from_cache(context, seconds):
    model = CachedModel(VOCABULARY, WIDTH, HEADS, HIDDEN, BLOCKS)
    caches, token = model.caches(context), ops.zeros((1,), "int32")
    loop = ops.arange(max(context - CALL, 0), context)
    calls = {
        LOOP: (model.write, (token, caches, loop), len(loop)),
        SINGLE: (model.write, (token, caches, loop[-1:]), 1),
    }
    row = _timed(f"attention, cache of {context:,} tokens", calls, seconds)
    row.megabytes = sum(ops.convert_to_numpy(x).nbytes for x in caches) / 2**20
    return row


def _timed(name, calls, seconds):
    """A row with the time per token of each of `(function, arguments, number of tokens)`."""
    backend = runtime.current()

    def sample(function, arguments, count):
        def milliseconds():
            sets = runtime.calls(backend, [arguments])
            return [x / count for x in backend.time_calls(function, sets)]

        return milliseconds

    row = Row("one token of two blocks of width 256", name)
    found = timing.in_turns({key: sample(*call) for key, call in calls.items()}, seconds)
    for column, times in found.items():
        if isinstance(times, Exception):
            row.give_up(times, failed=name.startswith("HLA"))
            break
        row.times[column] = times
    return row
