"""What the operators cost beside each other, alone and without a layer.

    python operator_cost.py --backend jax

Forward, and a training step (forward and backward), of the chunked form: batch
1, 4 heads of 64, float32. All are timed in turns in one process, medians of
repeated runs. Then the memory of a training step as the length grows.
"""

import argparse
import os

NUM_HEADS, HEAD_DIM = 4, 64
OPERATORS = ("linear", "hla2", "ahla", "hla3", "hla2_published", "hla3_published")

parser = argparse.ArgumentParser(
    description="Measure the operators beside each other: time, and memory against the length.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS)
parser.add_argument("--length", type=int, default=4096)
parser.add_argument("--repeats", type=int, default=15, help="runs of which the median is taken")
parser.add_argument("--jit", action="store_true", help="XLA under TensorFlow on a CPU too")
arguments = parser.parse_args()
os.environ["KERAS_BACKEND"] = arguments.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402  # Keras reads the backend when it is imported.
from measure import in_fresh_process, median_times, resident_memory  # noqa: E402
import numpy as np  # noqa: E402

from keras_hla.ops import higher_order_attention  # noqa: E402


class Attention(keras.layers.Layer):
    """The operator on inputs that hold queries, keys and values, times one weight for each."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def build(self, shape):
        self.scale = self.add_weight(shape=shape[2:], initializer="ones")

    def call(self, inputs):
        x = inputs * self.scale
        query, key, value = (x[:, :, n] for n in range(3))
        return higher_order_attention(query, key, value, self.operator)


def steps(operator, length):
    """Functions that do one forward pass, and one training step."""
    inputs = keras.Input((length, 3, NUM_HEADS, HEAD_DIM))
    model = keras.Model(inputs, Attention(operator)(inputs))
    model.compile("sgd", "mse", jit_compile=arguments.jit or "auto")
    x = np.random.default_rng(0).standard_normal((1, *inputs.shape[1:])).astype("float32") / 8
    y = np.zeros((1, length, NUM_HEADS, HEAD_DIM), "float32")
    return lambda: model.predict_on_batch(x), lambda: model.train_on_batch(x, y)


def step_memory(operator, lengths):
    """MB that a training step adds to a process, per length, in increasing order."""
    steps(operator, 2)[1]()  # loads what any step needs
    before = resident_memory()
    memory = []
    for length in lengths:
        steps(operator, length)[1]()
        memory.append(resident_memory("VmHWM") - before)
    return memory


def main():
    length = arguments.length
    functions = {operator: steps(operator, length) for operator in arguments.operators}
    forward, training = (
        median_times({name: both[n] for name, both in functions.items()}, arguments.repeats)
        for n in range(2)
    )
    first = arguments.operators[0] if "hla2" not in arguments.operators else "hla2"
    print(f"{length} tokens on {arguments.backend}, milliseconds (and times that of {first}):")
    print("  operator               forward       training step")
    for name in arguments.operators:
        print(
            f"  {name:16} {forward[name]:7.1f} ({forward[name] / forward[first]:.2f})"
            f"     {training[name]:7.1f} ({training[name] / training[first]:.2f})",
            flush=True,
        )
    lengths = [length * n for n in (1, 2, 4)]
    print(f"MB of a training step at {', '.join(map(str, lengths))} tokens:")
    for name in arguments.operators:
        memory = in_fresh_process(step_memory, name, lengths)
        print(f"  {name:16} " + " ".join(f"{m:7.0f}" for m in memory), flush=True)


if __name__ == "__main__":
    main()
