"""What a token costs that is generated: from a state, from the whole prefix, or from a cache.

    python streaming_cost.py --backend jax

A language model of two `HLADecoderBlock`s writes from its state; the same model
reads all that was written before each token; and a model of two blocks of causal
attention of the same sizes writes with a key-value cache, which every token reads
as a whole. Then the state is streamed for a million tokens: time and memory along
the way, and how far the outputs are from a recurrence in float64.
"""

import argparse
import os
import statistics
import time

parser = argparse.ArgumentParser(
    description="Measure generation with HLA, beside recomputation and key-value caches.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
parser.add_argument("--tokens", type=int, default=1000, help="number of tokens to generate")
parser.add_argument(
    "--contexts", type=int, nargs="+", default=[128, 512, 2048, 8192], help="lengths of caches"
)
parser.add_argument("--stream", type=int, default=1_000_000, help="number of tokens to stream")
arguments = parser.parse_args()
os.environ["KERAS_BACKEND"] = arguments.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402  # Keras reads the backend when it is imported.
from keras import layers, ops  # noqa: E402
from measure import resident_memory  # noqa: E402
import numpy as np  # noqa: E402

import keras_hla  # noqa: E402
from keras_hla.backend import compiled, compiled_scan  # noqa: E402

VOCABULARY, WIDTH, HEADS, HIDDEN, BLOCKS = 256, 256, 4, 512, 2
CALL = 32  # tokens per call of a compiled loop
REPEATS = 5


def language_model():
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = layers.Embedding(VOCABULARY, WIDTH)(tokens)
    for _ in range(BLOCKS):
        x = keras_hla.layers.HLADecoderBlock(HEADS, WIDTH // HEADS, HIDDEN)(x)
    return keras.Model(tokens, layers.Dense(VOCABULARY)(layers.RMSNormalization()(x)))


class CachedAttention(layers.Layer):
    """A block of attention and gated MLP, for one token with the keys and values before it."""

    def build(self, shape):
        self.norms = [layers.RMSNormalization() for _ in range(2)]
        sizes = {"qkv": 3 * WIDTH, "out": WIDTH, "gate": HIDDEN, "up": HIDDEN, "down": WIDTH}
        self.dense = {name: layers.Dense(size, use_bias=False) for name, size in sizes.items()}
        for norm in self.norms:
            norm.build((None, WIDTH))
        for name, dense in self.dense.items():
            dense.build((None, HIDDEN if name == "down" else WIDTH))

    def call(self, x, cache, position):
        """Tensor `(1, width)`, cache `(2, heads, context, dim)`; the same, with the token in it."""
        q, k, v = ops.split(self.dense["qkv"](self.norms[0](x)), 3, axis=-1)
        q, k, v = (ops.reshape(y, (HEADS, 1, WIDTH // HEADS)) for y in (q, k, v))
        cache = write(cache, position, ops.stack([k, v]))
        scores = q @ ops.swapaxes(cache[0], 1, 2) * (WIDTH // HEADS) ** -0.5
        scores = ops.where(ops.arange(cache.shape[2]) <= position, scores, -1e9)
        read = ops.softmax(scores) @ cache[1]
        x = x + self.dense["out"](ops.reshape(read, (1, WIDTH)))
        y = self.norms[1](x)
        return x + self.dense["down"](ops.silu(self.dense["gate"](y)) * self.dense["up"](y)), cache


def write(cache, position, token):
    if arguments.backend == "torch":  # in place, as XLA does by itself
        return cache.index_copy_(2, ops.cast(position[None], "int64"), token)
    return ops.slice_update(cache, (0, 0, position, 0), token)


def median_time(function, repeats=REPEATS):
    function()  # compiles
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def generation_time(model):
    """Seconds per token from the state."""
    prompt = np.arange(64) % VOCABULARY
    seconds = median_time(
        lambda: keras_hla.generate(
            model, prompt, arguments.tokens, temperature=0, tokens_per_call=CALL
        ),
        repeats=3,
    )
    return seconds / arguments.tokens


def recomputation_time(model):
    """Seconds per token, if all before it is read again: the mean over the prefixes' lengths."""
    forward = compiled(lambda x: model(x, training=False)[:, -1], model.variables)
    lengths = [arguments.tokens * share // 10 for share in (1, 3, 5, 7, 9)]
    prefixes = [ops.zeros((1, length), "int32") for length in lengths]
    return statistics.mean(
        median_time(lambda x=x: ops.convert_to_numpy(forward(x))) for x in prefixes
    )


def cache_time(context):
    """Seconds per token of the model of attention, with a cache of that many tokens."""
    embedding, head = layers.Embedding(VOCABULARY, WIDTH), layers.Dense(VOCABULARY)
    blocks = [CachedAttention() for _ in range(BLOCKS)]
    embedding.build()
    head.build((None, WIDTH))
    for block in blocks:
        block.build(None)

    def step(state, entries):
        token, *caches = state
        x, new = embedding(token), []
        for block, cache in zip(blocks, caches, strict=True):
            x, updated = block.call(x, cache, entries[0])
            new.append(updated)
        token = ops.cast(ops.argmax(head(x), axis=-1), "int32")
        return token, (token, *new)

    variables = [v for layer in (embedding, head, *blocks) for v in layer.variables]
    draw = compiled_scan(step, variables, "int32")
    caches = [ops.zeros((2, HEADS, context, WIDTH // HEADS)) for _ in blocks]
    positions = ops.arange(context - CALL, context)
    token = ops.zeros((1,), "int32")
    state = (token, *caches)
    return median_time(lambda: ops.convert_to_numpy(draw(state, (positions,))[0])) / CALL


def stream(count, block=1000):
    """Streams the operator token by token; prints time, memory and distance from float64."""
    heads, dim = 2, 16
    rng = np.random.default_rng(0)

    def step(state, token):
        output, state = keras_hla.ops.attention_step(*token, list(state), log_decay=-0.01)
        return output, tuple(state)

    read = compiled_scan(step, [])
    state = (ops.zeros((1, heads, dim, dim)),) * 2
    S, F = np.zeros((2, heads, dim, dim))
    decay, blocks, worst = np.exp(-0.01), -(-count // block), 0.0
    seconds = []
    shown = {max(2, blocks * share // 100) for share in (0, 10, 50, 100)}
    for n in range(blocks):
        arrays = rng.standard_normal((3, block, 1, heads, dim)).astype("float32") / dim**0.5
        begin = time.perf_counter()
        outputs, state = read(state, tuple(map(ops.convert_to_tensor, arrays)))
        outputs = ops.convert_to_numpy(outputs)
        seconds.append(time.perf_counter() - begin)
        exact = np.empty((block, heads, dim))
        for t, (q, k, v) in enumerate(zip(*arrays[:, :, 0].astype("float64"), strict=True)):
            S = decay * S + k[:, :, None] * k[:, None]
            F = decay**2 * F + (S @ q[..., None]) * v[:, None]
            exact[t] = (q[:, None] @ F)[:, 0]
        difference = np.sqrt(np.mean((outputs[:, 0] - exact) ** 2) / np.mean(exact**2))
        worst = np.maximum(worst, difference)  # which keeps NaN
        if n + 1 in shown:
            recent = statistics.median(seconds[max(1, n // 2) : n + 1]) / block
            print(
                f"  {(n + 1) * block:9,d} tokens: {1e3 * recent:.4f} ms per token, "
                f"{resident_memory():,.0f} MB, difference from float64 {difference:.1e}",
                flush=True,
            )
    print(f"  largest difference of a block: {worst:.1e}; all outputs are finite")
    if not np.isfinite(worst):
        raise SystemExit("Outputs are not finite.")


def main():
    keras.utils.set_random_seed(0)
    model = language_model()
    print(f"Two blocks of width {WIDTH} on {arguments.backend}, milliseconds per token:")
    state = 1e3 * generation_time(model)
    again = 1e3 * recomputation_time(model)
    print(f"  HLA from its state:                     {state:8.3f}")
    print(f"  HLA, the whole prefix again each time:  {again:8.3f}   {again / state:.1f} times")
    for context in arguments.contexts:
        cached = 1e3 * cache_time(context)
        print(
            f"  attention, cache of {context:6,d} tokens:      {cached:8.3f}   "
            f"{cached / state:.1f} times",
            flush=True,
        )
    print(f"The operator from its state, token by token, up to {arguments.stream:,}:")
    stream(arguments.stream)


if __name__ == "__main__":
    main()
