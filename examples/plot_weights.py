"""The weights with which each operator adds up the values, as pictures.

    python plot_weights.py --backend jax --output weights.png

One head. All panels have the same queries and keys: random, and smooth in time,
so that neighbours are alike. A row is an output, a column a value, and the
colour the weight: white is zero. Each panel has its own symmetric scale, as
weights of third order are far larger than those of first order; it is that of
the square root, so that the small weights of the first outputs show, too.
"""

import argparse
import os

import matplotlib as mpl

mpl.use("Agg")  # A file, and no window.
from matplotlib import colors
from matplotlib import pyplot as plt

parser = argparse.ArgumentParser(
    description="Plot the weight matrices of the operators, side by side.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
parser.add_argument("--output", default="weights.png", help="PNG file to write")
parser.add_argument("--length", type=int, default=64, help="number of tokens")
parser.add_argument("--decay", type=float, default=1.0, help="decay per token, in (0, 1]")
parser.add_argument("--dim", type=int, default=8, help="size of queries and keys")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()
os.environ["KERAS_BACKEND"] = arguments.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402  # Keras reads the backend when it is imported.
import numpy as np  # noqa: E402

import keras_hla  # noqa: E402

PANELS = (
    ("linear: $W$", {"operator": "linear"}),
    ("hla2: $(W W^T) \\odot L$", {"operator": "hla2"}),
    ("hla2, masked=False: $q_t^T S_t q_j$", {"operator": "hla2", "masked": False}),
    ("ahla: $W W$", {"operator": "ahla"}),
    ("hla3: $((W W^T) \\odot L) W$", {"operator": "hla3"}),
    ("hla3_published: Algorithm 3", {"operator": "hla3_published"}),
)


def smooth_vectors(random, length, dim):
    """Random vectors whose features drift, `(1, length, 1, dim)`, of length one on average."""
    width = max(length / 16, 1)
    distance = (np.arange(length)[:, None] - np.arange(length)) / width
    vectors = np.exp(-(distance**2) / 2) @ random.standard_normal((length, dim))
    vectors /= np.sqrt(np.mean(vectors**2) * dim)
    return vectors[None, :, None, :].astype("float32")


def square_root(largest):
    """A symmetric colour scale up to `largest`, by the square root of the size."""

    def forward(x):
        return np.sign(x) * np.sqrt(np.abs(x))

    def inverse(x):
        return x * np.abs(x)

    return colors.FuncNorm((forward, inverse), -largest, largest)


def plot():
    random = np.random.default_rng(arguments.seed)
    query, key = (smooth_vectors(random, arguments.length, arguments.dim) for _ in range(2))
    log_decay = None if arguments.decay == 1 else float(np.log(arguments.decay))

    figure, axes = plt.subplots(2, 3, figsize=(13, 8.4), layout="constrained")
    for axis, (title, options) in zip(axes.flat, PANELS, strict=True):
        weights = keras_hla.ops.attention_weights(query, key, log_decay=log_decay, **options)
        weights = keras.ops.convert_to_numpy(weights)[0, 0]
        largest = np.abs(weights).max()
        image = axis.imshow(weights, cmap="RdBu_r", norm=square_root(largest))
        axis.axline((0.5, -0.5), slope=1, color="gray", linewidth=0.5)
        axis.set_title(title)
        axis.set_xlabel("value $j$")
        axis.set_ylabel("output $t$")
        ticks = largest * np.array([-1, -0.25, 0, 0.25, 1])
        figure.colorbar(image, ax=axis, shrink=0.85, ticks=ticks, format="%.3g")
        print(f"{title}: weights up to {largest:.3g} in size")
    figure.suptitle(
        f"Weights of value $j$ in output $t$, decay {arguments.decay:g}, no normalisation"
    )
    figure.savefig(arguments.output, dpi=120)
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    plot()
