"""What HLA costs as the length grows, beside `keras.layers.MultiHeadAttention`.

    python cost.py --backend jax

First the training step (forward and backward, batch 1, float32) of one layer
of 4 heads of 64 over 256 features, per length: both layers are timed in turns
in one process, medians of repeated runs; memory is what the peak of a fresh
process rises by in one step. Then the stream: time per token and size of the
state near the beginning and far from it.
"""

import argparse
import os
import time

FEATURES, NUM_HEADS, HEAD_DIM = 256, 4, 64
PIECE = 1000  # tokens of a piece, on the way to a far position
STEPS = 200  # timed tokens

parser = argparse.ArgumentParser(
    description="Measure HLA beside MultiHeadAttention: time and memory against the length.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
parser.add_argument("--decay", default=None, help="decay of HLA, such as input or multiscale")
parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
parser.add_argument("--tokens", type=int, default=100_000, help="length of the stream")
parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is taken")
parser.add_argument("--jit", action="store_true", help="XLA under TensorFlow on a CPU too")
arguments = parser.parse_args()
os.environ["KERAS_BACKEND"] = arguments.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402  # Keras reads the backend when it is imported.
from measure import added_memory, in_fresh_process, median_times, resident_memory  # noqa: E402
import numpy as np  # noqa: E402

from keras_hla.layers import HLA  # noqa: E402


def training_step(name, length):
    """Returns a function that does one training step with one layer."""
    inputs = keras.Input((length, FEATURES))
    if name == "HLA":
        outputs = HLA(NUM_HEADS, HEAD_DIM, decay=arguments.decay)(inputs)
    else:
        attention = keras.layers.MultiHeadAttention(NUM_HEADS, HEAD_DIM)
        outputs = attention(inputs, inputs, use_causal_mask=True)
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse", jit_compile=arguments.jit or "auto")
    x = np.random.default_rng(0).standard_normal((1, length, FEATURES)).astype("float32")
    return lambda: model.train_on_batch(x, x)


def peak_memory(name, length):
    """MB that one training step adds to a process."""
    training_step(name, 2)()  # loads what any step needs
    return added_memory(training_step(name, length))


def report_training():
    print(f"One training step on {arguments.backend}, milliseconds (and MB of memory):")
    print("  length              HLA   MultiHeadAttention   ratio")
    steps = {
        n: {name: training_step(name, n) for name in ("HLA", "MHA")} for n in arguments.lengths
    }
    memory = {
        (name, n): in_fresh_process(peak_memory, name, n)
        for n in arguments.lengths
        for name in ("HLA", "MHA")
    }
    for length in arguments.lengths:
        t = median_times(steps[length], arguments.repeats)
        print(
            f"{length:8}  {t['HLA']:7.1f} ({memory['HLA', length]:5.0f})"
            f"     {t['MHA']:7.1f} ({memory['MHA', length]:5.0f})  {t['MHA'] / t['HLA']:6.2f}",
            flush=True,
        )
    first, last = min(arguments.lengths), max(arguments.lengths)
    ends = {length: steps[length]["HLA"] for length in (first, last)}
    t = median_times(ends, arguments.repeats)
    print(f"HLA, growth from {first} to {last} tokens, timed in turns: {t[last] / t[first]:.2f}x")


def report_stream():
    layer = HLA(NUM_HEADS, HEAD_DIM, decay=arguments.decay or 0.99, return_state=True)
    sizes = layer.cell.state_size

    def model(length):
        states = [keras.Input(size) for size in sizes]
        inputs = keras.Input((length, FEATURES))
        return keras.Model([inputs, *states], list(layer(inputs, initial_state=states)))

    layer.build((1, None, FEATURES))
    step, piece = model(1), model(PIECE)
    random = np.random.default_rng(0)
    token = random.standard_normal((1, 1, FEATURES)).astype("float32")
    tokens = random.standard_normal((1, PIECE, FEATURES)).astype("float32")
    state = [keras.ops.convert_to_numpy(s) for s in layer.get_initial_state(1)]

    def timed(state):
        times = []
        for _ in range(STEPS):
            begin = time.perf_counter()
            _, *state = step.predict_on_batch([token, *state])
            times.append(1e3 * (time.perf_counter() - begin))
        return np.median(times[STEPS // 4 :]), state

    timed(state)  # compiles
    print(f"Stream on {arguments.backend}, one token at a time:")
    for _ in range(2):
        milliseconds, state = timed(state)
        size = sum(s.nbytes for s in state)
        print(
            f"  to token {int(state[-1][0, 0]):7,}: {milliseconds:.3f} ms per token, "
            f"state {size:,} bytes, process {resident_memory():,.0f} MB"
        )
        while state[-1][0, 0] < arguments.tokens:
            _, *state = piece.predict_on_batch([tokens, *state])


if __name__ == "__main__":
    report_training()
    report_stream()
