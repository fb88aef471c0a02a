"""A character language model of HLA layers: train, write as a stream, export, serve.

    python char_lm.py --backend tensorflow

Trains on the sources of Python's standard library, or on the text of your
choice, for a few minutes on a CPU. On text that none of them has seen, the
model is compared with classical n-gram models. Then it writes text of its own,
one character at a time, from a state of constant size; and it is exported as a
SavedModel, which runs without Keras.
"""

import argparse
import json
import math
import os
from pathlib import Path
import subprocess
import sys
import time


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Train a character language model of HLA layers, write with it, export it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    backends = ("tensorflow", "jax", "torch")
    add("--backend", choices=backends, default="tensorflow", help="what Keras runs on")
    add("--text", type=Path, help="UTF-8 file to learn; None is Python's standard library")
    add("--steps", type=int, default=900, help="number of training steps")
    add("--length", type=int, default=128, help="length of the training sequences")
    add("--output", type=Path, default="char_lm_output", help="folder to write to")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    arguments = parser.parse_args()
    for name in ("steps", "length"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be positive")
    if arguments.text and not arguments.text.is_file():
        parser.error(f"--text: there is no file {arguments.text}")
    return arguments


ARGUMENTS = parse_arguments()
# All of these are read when Keras or its backend are imported.
os.environ["KERAS_BACKEND"] = ARGUMENTS.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The threads of torch, if they waited actively, would hold each other up on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import keras  # noqa: E402
from keras import layers  # noqa: E402
import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from schedule import warmup_cosine  # noqa: E402
from text import (  # noqa: E402
    RandomWindows,
    encode,
    ngram_bits,
    standard_library,
    vocabulary,
    windows,
)

import keras_hla  # noqa: E402
from keras_hla.layers import HLADecoderBlock  # noqa: E402

CORPUS_SIZE = 4_000_000
HELD_OUT = 0.05
# Longer than the training sequences: what the model learns holds beyond their length.
HELD_OUT_LENGTH = 512
HELD_OUT_WINDOWS = 80
MIN_SHARE = 1e-5  # rarer characters are read as the replacement character

WIDTH = 128
NUM_BLOCKS = 2
NUM_HEADS = 4
HIDDEN = 256

EPOCHS = 6  # not passes over the text: parts of the training, with a report after each
BATCH_SIZE = 8
LEARNING_RATE = 1e-2

PROMPT_LENGTH = 200
SAMPLE_LENGTH = 400
TEMPERATURE = 0.8


def load_text():
    """Returns the text to learn and the text that is held out."""
    if ARGUMENTS.text:
        text = ARGUMENTS.text.read_text(encoding="utf-8", errors="replace")
        source = str(ARGUMENTS.text)
    else:
        text, names = standard_library(CORPUS_SIZE)
        source = f"{len(names)} modules of Python's standard library, {names[0]} to {names[-1]}"
    needed = math.ceil((max(ARGUMENTS.length, HELD_OUT_LENGTH) + 1) / HELD_OUT)
    if len(text) < needed:
        sys.exit(
            f"The text is too short: {len(text):,} characters ({source}). "
            f"Training sequences of {ARGUMENTS.length} need {needed:,}."
        )
    cut = int(len(text) * (1 - HELD_OUT))
    print(f"Text: {source}")
    print(f"  {cut:,} characters to learn, the last {len(text) - cut:,} held out")
    return text[:cut], text[cut:]


def measure_baselines(tokens, held_out, starts, vocabulary_size):
    """Bits per character of n-gram models for the characters on which HLA is measured."""
    bits = ngram_bits(tokens, held_out, order=3, vocabulary_size=vocabulary_size)
    targets = starts[:, None] + 1 + np.arange(HELD_OUT_LENGTH)
    return {f"order {n}": float(bits[n][targets].mean()) for n in (0, 3)}


def make_model(vocabulary_size):
    """The model, from tokens to logits."""
    # The embedding, transposed, is also the projection to the logits. These start near zero.
    embedding = layers.ReversibleEmbedding(
        vocabulary_size,
        WIDTH,
        embeddings_initializer=keras.initializers.RandomNormal(stddev=WIDTH**-0.5),
        name="embedding",
    )
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = embedding(tokens)
    for _ in range(NUM_BLOCKS):
        x = HLADecoderBlock(NUM_HEADS, WIDTH // NUM_HEADS, HIDDEN)(x)
    x = embedding(layers.RMSNormalization()(x), reverse=True)
    # Layers name the outputs of a SavedModel.
    return keras.Model(tokens, layers.Identity(name="logits")(x))


def bits_per_character(targets, logits):
    nats = keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)
    return nats / math.log(2)


class Report(keras.callbacks.Callback):
    """Records the losses, and compares the model with the baselines after each epoch."""

    def __init__(self, baselines):
        super().__init__()
        self.baselines = baselines
        self.train, self.held_out = [], []

    def on_train_batch_end(self, batch, logs=None):
        # Keras gives the mean since the epoch began; what this batch added is its own loss.
        before = self.total if batch else 0
        self.total = logs["loss"] * (batch + 1)
        self.train.append(self.total - before)

    def on_epoch_end(self, epoch, logs=None):
        self.held_out.append((len(self.train), logs["val_loss"]))
        others = ", ".join(f"{name} {bits:.3f}" for name, bits in self.baselines.items())
        print(f"  held-out bits per character: HLA {logs['val_loss']:.3f}, {others}", flush=True)


def train(model, tokens, held_out, report):
    epochs = min(EPOCHS, ARGUMENTS.steps)
    steps = ARGUMENTS.steps // epochs
    model.compile(
        # From so little text, Muon learns clearly more than Adam.
        keras.optimizers.Muon(warmup_cosine(LEARNING_RATE, epochs * steps), weight_decay=0.01),
        loss=bits_per_character,
        # XLA, on a CPU too, where Keras leaves it out by default under TensorFlow.
        jit_compile=ARGUMENTS.backend != "torch",
    )
    model.fit(
        RandomWindows(tokens, ARGUMENTS.length, BATCH_SIZE, steps, ARGUMENTS.seed),
        epochs=epochs,
        validation_data=held_out,
        validation_batch_size=BATCH_SIZE,
        # The progress bar comes first, so that its line ends before the report's begins.
        callbacks=[keras.callbacks.ProgbarLogger(), report],
        verbose=1 if sys.stdout.isatty() else 2,
    )


def plot(report, path):
    """Draws the learning curve."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    steps = np.arange(len(report.train)) + 1
    axes.plot(steps, report.train, alpha=0.4, label="HLA, training batches")
    axes.plot(*zip(*report.held_out, strict=True), "o-", label="HLA, held out")
    for (name, bits), style in zip(report.baselines.items(), (":", "--"), strict=True):
        axes.axhline(bits, color="black", linestyle=style, label=f"n-grams of {name}, held out")
    axes.set(xlabel="training step", ylabel="bits per character")
    axes.legend()
    figure.savefig(path, dpi=120)


def write(model, characters, prompt):
    """Reads the prompt at once, then generates from the state, character by character."""
    print(f"Prompt, from the held-out text:\n{prompt}")
    print(f"Continuation by the model, at temperature {TEMPERATURE}:")
    pieces = keras_hla.generate_stream(
        model,
        encode(prompt, characters),
        SAMPLE_LENGTH,
        temperature=TEMPERATURE,
        seed=ARGUMENTS.seed,
        decode=lambda tokens: "".join(characters[token] for token in tokens),
    )
    times, lengths = [], []
    for text in pieces:
        print(text, end="", flush=True)
        times.append(time.perf_counter())
        lengths.append(len(text))
    blocks = [layer for layer in model.layers if isinstance(layer, HLADecoderBlock)]
    numbers = sum(math.prod(size) for block in blocks for size in block.cell.state_size)
    rate = sum(lengths[1:]) / (times[-1] - times[0])  # without the first piece, which compiles
    print(f"\nState: {4 * numbers:,} bytes at any length of the text.")
    print(f"Speed: {rate:,.0f} characters/s.")


def export(model, keras_file, saved_model):
    model.save(keras_file)
    if ARGUMENTS.backend == "torch":  # from which Keras writes no SavedModel
        run_python("-m", "keras_hla.export", keras_file, saved_model)
    else:
        keras_hla.export_saved_model(model, saved_model)


def check_saved_model(model, held_out, saved_model, logits_file):
    """Compares the model with the SavedModel, which a process without Keras runs."""
    arrays = {}
    for length in (1, 100, HELD_OUT_LENGTH):
        tokens = held_out[None, :length]
        logits = model.predict_on_batch(tokens)
        arrays |= {f"tokens_{length}": tokens, f"logits_{length}": logits}
    np.savez(logits_file, **arrays)
    print("SavedModel, run with TensorFlow and without Keras, against the Keras model:")
    run_python(Path(__file__).with_name("serve_saved_model.py"), saved_model, logits_file)


def run_python(*arguments):
    """Runs a second Python process, and stops this one if it fails."""
    sys.stdout.flush()
    environment = os.environ | {"KERAS_BACKEND": "tensorflow"}
    process = subprocess.run([sys.executable, *map(str, arguments)], env=environment, check=False)
    if process.returncode:
        sys.exit("The second Python process failed, see above.")


def main():
    begin = time.perf_counter()
    keras.utils.set_random_seed(ARGUMENTS.seed)
    folder = ARGUMENTS.output
    folder.mkdir(parents=True, exist_ok=True)

    text, held_out_text = load_text()
    characters = vocabulary(text, MIN_SHARE)
    tokens, held_out = encode(text, characters), encode(held_out_text, characters)
    starts = np.linspace(0, len(held_out) - HELD_OUT_LENGTH - 1, HELD_OUT_WINDOWS).astype(int)
    baselines = measure_baselines(tokens, held_out, starts, len(characters))
    print(f"  {len(characters)} different characters")
    print(f"N-gram models, bits per character on {starts.size * HELD_OUT_LENGTH:,} held out:")
    for name, bits in baselines.items():
        print(f"  {name}: {bits:.3f}")

    model = make_model(len(characters))
    print(f"HLA model on {ARGUMENTS.backend}: {model.count_params():,} parameters")
    print("Training, losses in bits per character:")
    report = Report(baselines)
    train(model, tokens, windows(held_out, starts, HELD_OUT_LENGTH), report)
    curve = folder / "learning_curve.png"
    plot(report, curve)

    prompt = held_out_text[held_out_text.find("\n\n") + 2 :][:PROMPT_LENGTH]
    write(model, characters, prompt)

    keras_file, saved_model = folder / "model.keras", folder / "saved_model"
    characters_file = folder / "characters.json"
    characters_file.write_text(json.dumps(list(characters)), encoding="utf-8")
    export(model, keras_file, saved_model)
    logits_file = folder / "logits.npz"
    check_saved_model(model, held_out, saved_model, logits_file)

    print(f"Written in {time.perf_counter() - begin:.0f} seconds:")
    print(f"  {curve}: losses over the training steps")
    print(f"  {keras_file}: the model, for keras.saving.load_model")
    print(f"  {saved_model}: the model, for TensorFlow alone")
    print(f"  {characters_file}: the characters of the tokens, for serve.py")
    print(f"  {logits_file}: tokens and logits, for serve_saved_model.py to check it with")


if __name__ == "__main__":
    main()
