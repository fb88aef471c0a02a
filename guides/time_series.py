"""# Time series with gaps

Measured series are ragged: each has its own length, and readings are missing in the middle. Here
you train a model that answers a question about such a series, with `keras_hla.layers.HLA` in the
place where you may have a GRU today. You see how masks pass through the layer, check that a masked
reading changes nothing, and pack short series into full rows so that no time goes into padding.

A GRU reads a series in a loop, one reading after the other. `HLA` keeps a state that each reading
updates, too, but its rule is linear in the state. So it needs no loop: matrix products update the
state with many readings at once.
"""

"""
## Setup

The environment variable `KERAS_BACKEND` chooses TensorFlow, JAX or PyTorch. Keras reads it when it
is imported.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # or "jax" or "torch"

import time

import keras
import numpy as np

import keras_hla

keras.utils.set_random_seed(0)

WIDTH = 32  # features
NUM_HEADS = 2
KEY_DIM = 16
LONGEST = 64  # readings of the longest series in the training
NUM_SERIES = 2048
NUM_TEST_SERIES = 256
EPOCHS = 16
BATCH_SIZE = 64
LONG = 8192  # readings of the series for which the time is measured

"""
## Data

A motor reports its voltage and its current, as deviations from their usual values. Their product
heats the motor, and the motor cools by a tenth from one reading to the next. We ask for the heat
after the last reading. To answer, a model has to multiply the two numbers, and to remember with a
memory that fades.

A fifth of the readings never arrives. An array has to hold something in their places, and after the
end of the shorter series: a value that no reading has, here -999.
"""

MISSING = -999.0
COOLING = 0.9


def make_series(count, longest, rng):
    """Series `(count, longest, 2)` of readings, and the heat `(count, 1)` after each."""
    readings = rng.normal(size=(count, longest, 2)).astype("float32")
    lengths = rng.integers(longest // 4, longest + 1, size=count)
    there = rng.random((count, longest)) < 0.8
    there[:, 0] = True  # no series is empty
    there &= np.arange(longest) < lengths[:, None]
    heat = np.zeros(count)
    for t in range(longest):
        heated = COOLING * heat + readings[:, t].prod(axis=-1)
        heat = np.where(there[:, t], heated, heat)
    readings[~there] = MISSING
    scale = (1 - COOLING**2) ** 0.5  # for a variance of about one
    return readings, (scale * heat[:, None]).astype("float32")


rng = np.random.default_rng(0)
readings, heat = make_series(NUM_SERIES, LONGEST, rng)
test_readings, test_heat = make_series(NUM_TEST_SERIES, LONGEST, rng)
longer_readings, longer_heat = make_series(NUM_TEST_SERIES, 4 * LONGEST, rng)
print(f"{NUM_SERIES} series, {(readings == MISSING).all(-1).mean():.0%} of the places are missing")

"""
## Model

`keras.layers.Masking` marks the places that hold `MISSING`. The mask travels with the tensor
through `Dense` to the layer that mixes the readings, which leaves its state as it is at masked
places.

`return_sequences=False` returns one output for the series, that of its last unmasked reading. For a
GRU it is the default; `HLA` returns all outputs unless told otherwise.

The first `Dense` layers look at each reading alone, and can multiply the two numbers in it. The
mixing layer sums up what they find, and the last layers turn that into the answer. The two models
differ in the mixing layer alone. `HLA` has heads, as attention has, and needs their number and
size. Its defaults suit series: the state fades at a rate that the layer computes from each reading,
and a short convolution shows each reading the three before it.
"""


def answer(x, mixer, **arguments):
    x = keras.layers.Dense(2 * WIDTH, activation="silu")(x)
    x = keras.layers.Dense(WIDTH)(x)
    x = mixer(x, **arguments)
    x = keras.layers.Dense(2 * WIDTH, activation="silu")(x)
    return keras.layers.Dense(1, name="heat")(x)


def make_model(mixer):
    inputs = keras.Input((None, 2), name="readings")
    return keras.Model(inputs, answer(keras.layers.Masking(MISSING)(inputs), mixer))


models = {
    "HLA": make_model(keras_hla.layers.HLA(NUM_HEADS, KEY_DIM, return_sequences=False)),
    "GRU": make_model(keras.layers.GRU(WIDTH)),
}

"""
## Training and evaluation

The error is the mean squared error. The answers have a variance of about one, so a model that has
learned nothing, and always answers with the mean, has an error of about 1.

We also ask for series of up to four times the length of the training. The shapes are open, so this
needs no change of the models.
"""

for name, model in models.items():
    steps = EPOCHS * -(-NUM_SERIES // BATCH_SIZE)
    learning_rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps, alpha=0.02, warmup_target=8e-3, warmup_steps=steps // 10
    )
    model.compile(keras.optimizers.Adam(learning_rate, clipnorm=1.0), "mean_squared_error")
    begin = time.perf_counter()
    model.fit(readings, heat, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=0)
    seconds = time.perf_counter() - begin
    error = model.evaluate(test_readings, test_heat, verbose=0)
    longer_error = model.evaluate(longer_readings, longer_heat, verbose=0)
    print(
        f"{name}: {model.count_params():,} weights, trained in {seconds:.0f} s; "
        f"error {error:.4f}, at up to {4 * LONGEST} readings {longer_error:.4f}"
    )

"""
The GRU learns this task in fewer steps, and is the more accurate one. Where series are as short as
these it is a good choice. The next measurement is about long ones: how long does it take to answer
four series of thousands of readings? The first call compiles, so we measure the second one.
"""

long_readings, _ = make_series(4, LONG, rng)
for name, model in models.items():
    model.predict_on_batch(long_readings)
    begin = time.perf_counter()
    model.predict_on_batch(long_readings)
    print(f"{name}: {time.perf_counter() - begin:.2f} s for four series of up to {LONG:,} readings")

"""
The result depends on the backend. JAX compiles the loop of so small a GRU to fast code. PyTorch
starts several operations for each reading, and the loop takes long. So measure it where you will
run it.

## What a mask does

A masked reading leaves every state of `HLA` as it is. In particular the state does not fade there,
and the masked place is not counted as a position. So a series with gaps gives the same answer as
the same series with the gaps cut out. Let us check that, with a series of the test set.
"""

model = models["HLA"]
with_gaps = test_readings[:1]
without_gaps = with_gaps[:, (with_gaps != MISSING).any(axis=-1)[0]]
expected = model.predict_on_batch(with_gaps)
difference = np.abs(model.predict_on_batch(without_gaps) - expected).max()
print(f"{with_gaps.shape[1]} places, {without_gaps.shape[1]} readings: differ by {difference:.1e}")
assert difference < 1e-4

"""
If missing readings should count as time that passes, do not mask them: give them as zeros, and a
further feature that is 1 where a reading is missing.

`Masking` needs a value that stands for "missing". Where your data comes with a separate mask, make
it an input of the model and pass it to the layer: true for readings that are there. What the other
places hold does not matter then, not even NaN.
"""

inputs = keras.Input((None, 2), name="readings")
mask = keras.Input((None,), dtype="bool", name="mask")
outputs = keras_hla.layers.HLA(NUM_HEADS, KEY_DIM)(inputs, mask=mask)
model_with_mask = keras.Model([inputs, mask], outputs)

there = (with_gaps != MISSING).any(axis=-1)
with_nan = np.where(there[..., None], with_gaps, np.nan)
outputs = model_with_mask.predict_on_batch([with_nan, there])
assert np.isfinite(outputs).all()

"""
## Packed sequences

In a batch of ragged series most places may be padding, and the layer computes there, too. Instead
you can *pack* several series into one row, one after the other, and say by `segment_ids` which
place belongs to which series. Each series, or segment, starts with an empty state, as if it were
alone.

The answers are then at the last place of each segment, so the layer has to return all outputs. The
weights are those that we have trained: a model of the same layers takes them by `set_weights`.
"""

inputs = keras.Input((None, 2), name="readings")
segment_ids = keras.Input((None,), dtype="int32", name="segment_ids")
heat_everywhere = answer(inputs, keras_hla.layers.HLA(NUM_HEADS, KEY_DIM), segment_ids=segment_ids)
packed_model = keras.Model([inputs, segment_ids], heat_everywhere)
packed_model.set_weights(model.get_weights())

several = test_readings[:8]
series = [x[(x != MISSING).any(axis=-1)] for x in several]
lengths = [len(x) for x in series]
row = np.concatenate(series)[None]
row_ids = np.repeat(np.arange(len(series)), lengths)[None].astype("int32")
last_places = np.cumsum(lengths) - 1

answers = packed_model.predict_on_batch([row, row_ids])[0, last_places]
difference = np.abs(answers - model.predict_on_batch(several)).max()
print(f"padded: {several.shape[0] * several.shape[1]} places, packed: {row.shape[1]}")
print(f"the answers differ by {difference:.1e}")
assert difference < 1e-4

"""
To train on packed rows, give the loss a weight of one at the last place of each segment and of zero
elsewhere, by the argument `sample_weight` of `fit`.

## When to take which

- A GRU is a good choice where series are short, or where the answer follows a state that the
  readings *switch*, as a counter or a parity: sums that fade cannot do that, and a GRU can.
- Take `HLA` where the loop of a GRU takes too long, or where you want several layers of it, as in
  language models.
- For classification of whole series, `keras.layers.Bidirectional(HLA(...))` and `HLA(causal=False)`
  read in both directions.
- Series that never end are the subject of the guide *A streaming service*.
"""
