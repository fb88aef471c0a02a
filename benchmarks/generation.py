"""Tokens per second of `generate`, beside a model of attention with a key-value cache.

    python -m benchmarks.generation --backend torch --out build/generation

The default is a model of the size of GPT-2, greedy, with prompts of 512 tokens. "first call" is
the time of the first call of `generate` in a process, which compiles, for one token; "first token"
that of a later one, which reads the prompts; "step" that of one token of each sequence of the
batch. The peer is compiled in the same way as HLA, and its caches have a fixed size.
"""

import csv
import os
from pathlib import Path
import sys
import time

from benchmarks.arguments import names, parser

CALL = 32  # tokens per call of a compiled loop
LEAST = 5  # calls that are timed
VOCABULARY = 50_257


def parse(argv):
    command = parser("benchmarks.generation", __doc__)
    add = command.add_argument
    add("--backend", choices=("tensorflow", "jax", "torch"), required=True)
    add("--batches", type=names, default=["1", "64"], help="sizes of batches (default: 1,64)")
    add("--contexts", type=names, default=["512", "2048"], help="lengths of prompts, and of caches")
    add(
        "--implementations",
        type=names,
        default=["auto"],
        help="of auto,portable,triton (default: auto)",
    )
    add("--peers", type=names, default=["attention"], help="attention, or none")
    add("--blocks", type=int, default=12)
    add("--heads", type=int, default=12, help="heads of 64 features (default: 12)")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--seconds", type=float, default=2.0, help="seconds for each time (default: 2)")
    add("--out", type=Path, default=Path("build/generation"), help="folder of the CSV file")
    arguments = command.parse_args(argv)
    for name in ("batches", "contexts"):
        setattr(arguments, name, [int(x) for x in getattr(arguments, name)])
    return arguments


def make_model(arguments, implementation):
    import keras  # once the backend is chosen

    from keras_hla.layers import HLADecoderBlock

    keras.utils.set_random_seed(0)
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, 64 * arguments.heads)(tokens)
    for _ in range(arguments.blocks):
        x = HLADecoderBlock(arguments.heads, 64, implementation=implementation)(x)
    x = keras.layers.RMSNormalization()(x)
    return keras.Model(tokens, keras.layers.Dense(VOCABULARY)(x))


def of_hla(arguments, implementation):
    """Yields rows of a model that generates from its states."""
    import numpy as np

    import keras_hla
    from keras_hla.streaming.drawing import Drawing
    from keras_hla.streaming.writer import writer_of

    model, first = make_model(arguments, implementation), None
    random = np.random.default_rng(0)
    for batch in arguments.batches:
        for context in arguments.contexts:
            prompts = random.integers(0, VOCABULARY, (batch, context))

            def read(prompts=prompts):
                return keras_hla.generate(model, prompts, 1, temperature=0, tokens_per_call=1)

            first_call = seconds_of(read)
            writer = writer_of(model)
            drawing = Drawing(VOCABULARY, CALL, 0, None, None, (), 0)
            state = writer.read(prompts, {})
            entries = (
                np.zeros((CALL, batch), "float32"),
                *(np.array([x] * CALL, "float32") for x in (drawing.inverse, drawing.share)),
            )

            def draw(writer=writer, state=state, entries=entries, drawing=drawing):
                return writer.draw(state, entries, drawing.candidates)

            yield row(
                f"HLA, {implementation}",
                batch,
                context,
                median_time(draw, arguments.seconds) / CALL,
                median_time(read, arguments.seconds),
                first_call if first is None else None,
                implementation_of(model, batch),
            )
            first = first or first_call


def implementation_of(model, batch):
    """What computes a token of the model, and why."""
    from keras import ops

    from keras_hla.layers import HLADecoderBlock
    from keras_hla.layers.state_scope import StateScope

    block = next(x for x in model.layers if isinstance(x, HLADecoderBlock))
    token = ops.zeros((batch, 1, block.cell.query_dense.kernel.shape[0]), block.compute_dtype)
    with StateScope(), without_gradients():
        return ": ".join(block.mixer.implementation_for(token))


def without_gradients():
    import contextlib

    import keras

    if keras.config.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def of_attention(arguments):
    """Yields rows of a model of attention, the cache of which holds the context."""
    from keras import ops

    from benchmarks.cached_attention import CachedModel
    from keras_hla.layers import HLADecoderBlock

    width = 64 * arguments.heads
    hidden = HLADecoderBlock(arguments.heads, 64).mlp_size(width)
    model = CachedModel(VOCABULARY, width, arguments.heads, hidden, arguments.blocks)
    for batch in arguments.batches:
        for context in arguments.contexts:
            token, caches = ops.zeros((batch,), "int32"), model.caches(context, batch)
            positions = ops.arange(context - min(CALL, context), context)

            def draw(token=token, caches=caches, positions=positions):
                return ops.convert_to_numpy(model.write(token, caches, positions))

            step = median_time(draw, arguments.seconds) / len(positions)
            yield row("attention, cached", batch, context, step, None, None, "compiled loop")


def row(name, batch, context, step, first_token, first_call, implementation):
    return {
        "model": name,
        "batch": batch,
        "context": context,
        "step ms": 1e3 * step,
        "tokens per second": batch / step,
        "first token ms": None if first_token is None else 1e3 * first_token,
        "first call s": first_call,
        "implementation": implementation,
    }


def seconds_of(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def median_time(function, seconds):
    """The median time of calls after three that may compile, or record."""
    for _ in range(3):
        function()
    times: list[float] = []
    while len(times) < LEAST or sum(times) < seconds:
        times.append(seconds_of(function))
    return sorted(times)[len(times) // 2]


def measure(arguments):
    for implementation in arguments.implementations:
        yield from of_hla(arguments, implementation)
    if "attention" in arguments.peers:
        yield from of_attention(arguments)


def main(argv=None):
    arguments = parse(argv)
    os.environ["KERAS_BACKEND"] = arguments.backend
    import keras

    from benchmarks import runtime

    keras.config.set_dtype_policy(arguments.dtype)
    print(f"{arguments.backend} on {runtime.current().device_name()}, {arguments.dtype}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"generation_{arguments.backend}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = None
        for found in measure(arguments):
            shown = {k: f"{x:,.4g}" if isinstance(x, float) else x for k, x in found.items()}
            print("  ".join(f"{k} {x}" for k, x in shown.items() if x is not None), flush=True)
            writer = writer or csv.DictWriter(file, found, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(found)
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
