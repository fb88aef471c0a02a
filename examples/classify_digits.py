"""Sequence classification: handwritten digits, pixel by pixel, by HLA, GRU and attention.

    python classify_digits.py --backend jax

The 1,797 images of 8 x 8 pixels that come with scikit-learn, as sequences of 64
pixels. Four models of about equal size differ in the layer that mixes the
sequence: `Bidirectional(HLA)`, `HLA(causal=False)`, `Bidirectional(GRU)` and
`MultiHeadAttention`. Prints their accuracy on images that none has seen, and
draws the confusion matrices.
"""

import argparse
import os
from pathlib import Path
import time

parser = argparse.ArgumentParser(
    description="Classify handwritten digits, read pixel by pixel.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--seeds", type=int, default=2, help="number of runs of each model")
parser.add_argument("--images", type=int, default=1797, help="how many images to use")
parser.add_argument("--models", nargs="+", help="which of the four; all if not given")
parser.add_argument("--output", type=Path, default="digits.png", help="picture to write")
arguments = parser.parse_args()
os.environ["KERAS_BACKEND"] = arguments.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402  # Keras reads the backend when it is imported.
from keras import layers  # noqa: E402
import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from schedule import warmup_cosine  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score  # noqa: E402
from sklearn.model_selection import train_test_split  # noqa: E402

from keras_hla.layers import HLA  # noqa: E402

LENGTH = 64


class Positions(layers.Layer):
    """Adds a trained vector per position: attention knows the order from nothing else."""

    def build(self, input_shape):
        self.vectors = self.add_weight(shape=input_shape[1:], initializer="random_normal")

    def call(self, inputs):
        return inputs + self.vectors


def bidirectional_hla(x):
    return layers.Bidirectional(
        HLA(4, 8, decay="learned", conv_kernel_size=None), merge_mode="sum"
    )(x)


def full_hla(x):
    return HLA(4, 16, causal=False)(x)


def bidirectional_gru(x):
    return layers.Bidirectional(layers.GRU(x.shape[-1] // 2, return_sequences=True))(x)


def attention(x):
    return layers.MultiHeadAttention(4, 16)(x, x)


MODELS = {  # how sequences are mixed, and the features: a GRU has more weights
    "Bidirectional(HLA)": (bidirectional_hla, 64),
    "HLA(causal=False)": (full_hla, 64),
    "Bidirectional(GRU)": (bidirectional_gru, 60),
    "MultiHeadAttention": (attention, 64),
}


def make_model(mix, width):
    pixels = keras.Input((LENGTH, 1))
    x = Positions()(layers.Dense(width)(pixels))
    x = x + mix(layers.RMSNormalization()(x))
    y = layers.Dense(2 * width, activation="silu")(layers.RMSNormalization()(x))
    x = x + layers.Dense(width)(y)
    x = layers.GlobalAveragePooling1D()(layers.RMSNormalization()(x))
    return keras.Model(pixels, layers.Dense(10)(x))


def train(model, x, y):
    steps = arguments.epochs * -(-len(x) // 32)
    model.compile(
        keras.optimizers.AdamW(warmup_cosine(3e-3, steps), weight_decay=0.01, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(x, y, batch_size=32, epochs=arguments.epochs, verbose=0)


def main():
    images, labels = load_digits(return_X_y=True)
    images, labels = images[: arguments.images], labels[: arguments.images]
    sequences = (images / 16).astype("float32")[..., None]
    x, x_test, y, y_test = train_test_split(
        sequences, labels, test_size=0.25, random_state=0, stratify=labels
    )
    print(f"{len(x)} digits to learn, {len(x_test)} to recognize, {arguments.backend}")
    names = arguments.models or list(MODELS)
    figure, axes = plt.subplots(
        1, len(names), figsize=(4.5 * len(names), 4.8), squeeze=False, layout="constrained"
    )
    for ax, name in zip(axes[0], names, strict=True):
        mix, width = MODELS[name]
        accuracies, begin = [], time.perf_counter()
        for seed in range(arguments.seeds):
            keras.utils.set_random_seed(seed)
            model = make_model(mix, width)
            train(model, x, y)
            found = model.predict(x_test, verbose=0).argmax(axis=-1)
            accuracies.append(accuracy_score(y_test, found))
        seconds = (time.perf_counter() - begin) / arguments.seeds
        each = ", ".join(f"{a:.3f}" for a in accuracies)
        print(
            f"{name:20} {model.count_params():6,} weights: accuracy {np.mean(accuracies):.3f} "
            f"({each}), {seconds:.0f} s per run",
            flush=True,
        )
        ConfusionMatrixDisplay.from_predictions(y_test, found, ax=ax, colorbar=False)
        ax.set_title(f"{name}: {accuracies[-1]:.3f}")
    figure.savefig(arguments.output, dpi=100)
    print(f"Written: {arguments.output}, the confusion matrices of the last runs")


if __name__ == "__main__":
    main()
