"""Which options of a block make it learn a text: the measurements behind its defaults.

    python block_options.py --backend jax

Trains one small character model per set of options, all with the same text,
steps, learning rate and seeds, and prints held-out bits per character, at the
length of training and beyond it.
"""

import argparse
import math
import os

parser = argparse.ArgumentParser(
    description="Train the same model with different options of HLADecoderBlock.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
parser.add_argument("--options", nargs="+", help="which sets of options; all if not given")
parser.add_argument("--steps", type=int, default=600, help="number of training steps")
parser.add_argument("--seeds", type=int, default=2, help="number of runs of each")
arguments = parser.parse_args()
os.environ["KERAS_BACKEND"] = arguments.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402  # Keras reads the backend when it is imported.
import numpy as np  # noqa: E402
from schedule import warmup_cosine  # noqa: E402
from text import RandomWindows, encode, standard_library, vocabulary, windows  # noqa: E402

from keras_hla.layers import HLADecoderBlock  # noqa: E402

NOTHING = {"decay": None, "conv_kernel_size": None}
OPTIONS = {
    "rotary": {},
    "rotary, gate": {"output_gate": "silu"},
    "rotary, conv": {"conv_kernel_size": 4},
    "decay": {"decay": "input", "rope_max_wavelength": None},
    "rotary, decay": {"decay": "input"},
    "rotary, multiscale": {"decay": "multiscale"},
    "rotary, decay, gate": {"decay": "input", "output_gate": "silu"},
    "rotary, decay, conv": {"decay": "input", "conv_kernel_size": 4},
    "rotary, decay, conv, gate": {
        "decay": "input",
        "conv_kernel_size": 4,
        "output_gate": "silu",
    },
    "rotary, decay, conv, gate, qk_norm": {
        "decay": "input",
        "conv_kernel_size": 4,
        "output_gate": "silu",
        "qk_norm": True,
    },
}
WIDTH, NUM_BLOCKS, NUM_HEADS = 128, 2, 4
BATCH_SIZE, LENGTH = 8, 128
LONG = 1024


def make_model(vocabulary_size, options):
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(vocabulary_size, WIDTH)(tokens)
    for _ in range(NUM_BLOCKS):
        x = HLADecoderBlock(NUM_HEADS, WIDTH // NUM_HEADS, **{**NOTHING, **options})(x)
    x = keras.layers.RMSNormalization()(x)
    return keras.Model(tokens, keras.layers.Dense(vocabulary_size)(x))


def train(model, tokens, seed):
    steps = arguments.steps
    schedule = warmup_cosine(3e-3, steps)
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=0.01, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=arguments.backend != "torch",
    )
    model.fit(RandomWindows(tokens, LENGTH, BATCH_SIZE, steps, seed), verbose=0)


def held_out_bits(model, held_out, length):
    starts = np.linspace(0, len(held_out) - length - 1, 32 * LONG // length).astype(int)
    nats = model.evaluate(*windows(held_out, starts, length), batch_size=BATCH_SIZE, verbose=0)
    return nats / math.log(2)


def main():
    text, _ = standard_library(4_000_000)
    cut = len(text) * 95 // 100
    characters = vocabulary(text[:cut], 1e-5)
    tokens, held_out = encode(text[:cut], characters), encode(text[cut:], characters)
    print(f"{arguments.steps} steps on {arguments.backend}; held-out bits per character, each seed")
    print(f"{'':36} {'weights':>8}  {LENGTH} tokens, {LONG} tokens")
    for name in arguments.options or OPTIONS:
        results = []
        for seed in range(arguments.seeds):
            keras.utils.clear_session()
            keras.utils.set_random_seed(seed)
            model = make_model(len(characters), OPTIONS[name])
            train(model, tokens, seed)
            results.append([held_out_bits(model, held_out, n) for n in (LENGTH, LONG)])
        columns = (
            "  ".join(f"{bits:.3f}" for bits in column) for column in zip(*results, strict=True)
        )
        print(f"{name:36} {model.count_params():8,}  {', '.join(columns)}", flush=True)


if __name__ == "__main__":
    main()
