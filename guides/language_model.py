"""# A first language model

A language model reads a text token by token and predicts each next token. In this guide you build
one of `keras_hla` layers, train it on source code that is already on your machine, measure it at
the length it was trained at and beyond, let it write, and save it. It takes a few minutes on a CPU
and asks for nothing but Keras, a backend and `keras_hla`.

**What is new about the layers.** Softmax attention compares each token with all tokens before it,
so the work for the next token grows with the text. Linear attention keeps a *state* instead: a
matrix for each head, to which each token adds a product of its key and its value, and from which a
token reads with its query. The size of the state does not depend on the length of the text.
Higher-order linear attention (HLA) keeps that property, and lets products of *two* earlier tokens
into what is read.
"""

"""
## Setup

Keras runs on TensorFlow, JAX or PyTorch. The environment variable `KERAS_BACKEND` says which one,
and is read when Keras is imported, so it comes first. Everything in this guide works on all three.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # or "jax" or "torch"

import math
from pathlib import Path
import sysconfig
import time

import keras
import numpy as np

import keras_hla

keras.utils.set_random_seed(0)

"""
These are the sizes of the model and of its training. The model is small, so that a CPU trains it in
minutes.
"""

WIDTH = 128  # features of a token
NUM_HEADS = 4
LENGTH = 128  # tokens of a training sequence
BATCH_SIZE = 8
STEPS = 600  # training steps
EVALUATED_LENGTHS = (128, 512, 2048)
EVALUATED_TOKENS = 229_376  # in total, at each of these lengths

"""
## Data

Every Python has a text to learn from: the modules of its standard library. We take the bytes of the
files as tokens. So there are 256 different tokens, and we need no tokenizer.

The last files are held out. The model never sees them in training, so they show what it has learned
rather than what it has memorized.
"""

folder = Path(sysconfig.get_paths()["stdlib"])
text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
tokens = np.frombuffer(text, "uint8").astype("int32")
cut = len(tokens) * 95 // 100
train_tokens, held_out_tokens = tokens[:cut], tokens[cut:]
print(f"{len(train_tokens):,} bytes to learn from, {len(held_out_tokens):,} held out")

"""
A language model learns from all places of a sequence at once: the target at each place is the token
that comes next. So the targets are the inputs, one token later.
"""


def windows(tokens, starts, length):
    """Sequences that begin at `starts`, and the token after each of their tokens."""
    index = np.asarray(starts)[:, None] + np.arange(length)
    return tokens[index], tokens[index + 1]


rng = np.random.default_rng(0)
starts = rng.integers(len(train_tokens) - LENGTH, size=STEPS * BATCH_SIZE)
inputs, targets = windows(train_tokens, starts, LENGTH)
print(f"training sequences {inputs.shape}, targets {targets.shape}")

"""
## Model

An `HLADecoderBlock` is what language models stack: normalization, `HLA` and a residual connection;
then normalization, a gated MLP and a residual connection. `HLA` mixes tokens with the ones before
them, the MLP works on each token alone.

The two blocks differ in their `operator`, the rule by which `HLA` reads the past. `"linear"` is
first-order linear attention, which is good at looking up one earlier token. `"hla2"` is of second
order, and learns language faster at first. Alternating operators do well at both, which is why
`keras_hla.hub.HLABackbone` has them by default.

Two options are on by default, and matter:

- `decay="input"`: the state fades at a rate that the model computes from each token. It lets the
  model forget, and is what keeps it good on texts longer than those of the training.
- `conv_kernel_size=4`: a short convolution shows each token its three neighbours before it.

The input has the shape `(None,)`: the length is open. There is no table of positions that a longer
text could outgrow, because `HLA` applies a rotary embedding, which encodes how far apart two tokens
are.
"""


def make_model():
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(256, WIDTH)(tokens)
    for operator in ("linear", "hla2"):
        block = keras_hla.layers.HLADecoderBlock(NUM_HEADS, WIDTH // NUM_HEADS, operator=operator)
        x = block(x)
    x = keras.layers.RMSNormalization()(x)
    return keras.Model(tokens, keras.layers.Dense(256, name="logits")(x))


model = make_model()
model.summary()

"""
## Training

The loss is the cross-entropy between the predicted and the actual next byte. We divide it by the
natural logarithm of 2, so that it counts *bits per byte*: 8 is a guess among 256 equally likely
bytes, and 2 means that the model would compress the text to a quarter.

The learning rate rises during the first tenth of the training, while the optimizer's statistics are
still rough, and then falls. `clipnorm` bounds the gradients, so that a rare bad batch does no harm.
"""


def bits_per_byte(targets, logits):
    nats = keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)
    return nats / math.log(2)


warmup_steps = STEPS // 10
learning_rate = keras.optimizers.schedules.CosineDecay(
    0.0,
    decay_steps=STEPS - warmup_steps,
    alpha=0.02,
    warmup_target=5e-3,
    warmup_steps=warmup_steps,
)
optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=0.01, clipnorm=1.0)
model.compile(optimizer, bits_per_byte)
begin = time.perf_counter()
model.fit(inputs, targets, batch_size=BATCH_SIZE, verbose=2)
print(f"{STEPS} training steps in {time.perf_counter() - begin:.0f} seconds")

"""
## Evaluation, also beyond the trained length

We cut the same held-out bytes into sequences of different lengths. The first length is that of the
training; the others are longer than anything the model has seen. A model may get better there, as
it knows more of the text, or break down, as it meets something new. This one should not break down:
its state has a fixed size, and fades.
"""

for length in EVALUATED_LENGTHS:
    sequences = windows(held_out_tokens, range(0, EVALUATED_TOKENS, length), length)
    bits = model.evaluate(*sequences, batch_size=BATCH_SIZE, verbose=0)
    print(f"{length:5d} bytes: {bits:.3f} bits per byte")

"""
On a CPU, under TensorFlow, one run printed 2.261 bits per byte for sequences of 128 bytes, 2.235
for 512 and 2.229 for 2,048. At sixteen times the trained length the model is as good as at it.
"""

"""
## Writing

`keras_hla.generate` reads the prompt in parallel, which is called *prefill*. Then a compiled loop
draws one token after the other, each from the state alone. A token costs the same after ten tokens
as after a million, because nothing of the text itself is kept.

A `temperature` below 1 prefers the likelier bytes. A `seed` makes the result repeatable.
"""

prompt = list(b"class Parser:\n    def __init__(self")
written = keras_hla.generate(model, prompt, max_new_tokens=200, temperature=0.7, seed=1)
print(bytes([*prompt, *written]).decode("utf-8", errors="replace"))

"""
Several prompts are continued together, in one batch. They may differ in length. `stop_tokens` ends
a continuation early, here at the end of a line.
"""

prompts = [list(b"import "), list(b"    return self."), list(b"for i in ")]
lines = keras_hla.generate(
    model, prompts, max_new_tokens=40, temperature=0.7, stop_tokens=ord("\n"), seed=1
)
for prompt, line in zip(prompts, lines, strict=True):
    print(repr(bytes([*prompt, *line]).decode("utf-8", errors="replace")))

"""
How large is the state? `keras_hla.streaming_model` makes a model whose states are inputs and
outputs. `generate` uses it, and so can you; the guide *A streaming service* is about it.
"""

states = keras_hla.streaming_model(model).initial_state(batch_size=1)
size = sum(math.prod(state.shape) for state in states.values())
print(f"state: {size:,} float32 elements, at any length of the text")

"""
## Saving and loading

A `.keras` file holds the architecture and the weights. It loads on every backend, whichever one
wrote it. Import `keras_hla` before you load it, so that Keras knows the layers; the loss needs no
such care if the model is loaded for use alone, with `compile=False`.
"""

model.save("language_model.keras")
loaded = keras.saving.load_model("language_model.keras", compile=False)

sample = held_out_tokens[None, :LENGTH]
difference = np.abs(loaded.predict_on_batch(sample) - model.predict_on_batch(sample)).max()
print(f"largest difference between the logits of the two: {difference:.1e}")
assert difference < 1e-4

"""
## Where to go from here

- Train longer, and make the model wider and deeper: both help, up to what your patience allows.
- `keras_hla.hub.HLABackbone` and `HLACausalLM` are this model for users of keras-hub, with a
  tokenizer and `generate` of its own.
- The guide *A streaming service* keeps many texts going at once, and exports the model.
- The guide *Time series with gaps* uses the same layer in place of a GRU.
"""
