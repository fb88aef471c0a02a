"""Time and memory of a training step on a long sequence, by `remat_length`.

    python -m benchmarks.long_sequence --backend jax

One layer of 4 heads of 64 over 256 features, batch 1, float32. Each row is a
fresh process. Its memory is the peak of the whole process, with Keras, the
backend and the data.
"""

import argparse
import os
import time

parser = argparse.ArgumentParser(
    description="Measure the training step of HLA on a long sequence.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
parser.add_argument("--length", type=int, default=65_536)
parser.add_argument("--remat-lengths", type=int, nargs="+", default=[0, 4096, 8192, 16_384])
arguments = parser.parse_args()
os.environ["KERAS_BACKEND"] = arguments.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The allocator of glibc before 2.38 does not reuse memory that torch frees, unless it returns large
# blocks to the system. The processes that are started below read this.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000")

import keras  # noqa: E402  # Keras reads the backend when it is imported.
import numpy as np  # noqa: E402

from benchmarks.memory import in_fresh_process, resident  # noqa: E402
from keras_hla.layers import HLA  # noqa: E402

FEATURES = 256
OPTIONS = {
    "plain": {"decay": None, "conv_kernel_size": None},
    "all options": {"decay": "input", "conv_kernel_size": 4, "output_gate": "silu"},
}


def measure(options, remat_length):
    """Seconds of the second training step, and the peak memory of this process in MB."""
    inputs = keras.Input((arguments.length, FEATURES))
    model = keras.Model(inputs, HLA(4, 64, remat_length=remat_length, **options)(inputs))
    model.compile("sgd", "mse")
    shape = (1, arguments.length, FEATURES)
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    model.train_on_batch(x, x)
    begin = time.perf_counter()
    model.train_on_batch(x, x)
    return time.perf_counter() - begin, resident("VmHWM")


def main():
    print(f"{arguments.length:,} tokens, training step on {arguments.backend}:")
    for name, options in OPTIONS.items():
        for remat_length in arguments.remat_lengths:
            seconds, peak = in_fresh_process(measure, options, remat_length or None)
            print(
                f"  {name:11}  remat_length={remat_length or None!s:6}  {seconds:6.2f} s"
                f"  {peak:6,.0f} MB peak memory of the process",
                flush=True,
            )


if __name__ == "__main__":
    main()
