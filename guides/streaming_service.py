"""# A streaming service

A service watches the events of many machines, and tells for each event how surprising it is. The
events come a few at a time, from all machines mixed, and never end. In this guide you build such a
service: one model, a small state for each machine, and batches made of whatever has just arrived.
Then you export the model, and run the same streams with TensorFlow alone.

**Why a state.** A model that has to read the whole history again for each new event gets slower
with each of them. Attention with a cache keeps a key and a value for every event that it has ever
seen. An `HLA` layer keeps a state of constant size, and reads new events from there.
"""

"""
## Setup

`KERAS_BACKEND` chooses TensorFlow, JAX or PyTorch, before Keras is imported. The last part, the
export, needs TensorFlow to be installed, whichever backend the model runs on.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # or "jax" or "torch"

import subprocess
import sys
import time

import keras
import numpy as np

import keras_hla

keras.utils.set_random_seed(0)

WIDTH = 32  # features of an event
LENGTH = 64  # events of a training sequence
NUM_SEQUENCES = 2048
BATCH_SIZE = 32
EPOCHS = 3
HISTORIES = (100, 10_000)  # events after which the time of a step is measured

"""
## Events, and a model of them

A machine works in cycles: it starts, feeds and cuts as many times as a job takes, cleans itself,
and stops. There are five events:
"""

EVENTS = ["start", "feed", "cut", "clean", "stop"]
START, FEED, CUT, CLEAN, STOP = range(len(EVENTS))


def machine_log(length, rng):
    """The events of a machine, `(length,)`."""
    log = []
    while len(log) < length:
        log += [START, *[FEED, CUT] * rng.integers(1, 6), CLEAN, STOP]
    return np.array(log[:length], "int32")


rng = np.random.default_rng(0)
logs = np.stack([machine_log(LENGTH + 1, rng) for _ in range(NUM_SEQUENCES)])
print(" ".join(EVENTS[event] for event in logs[0, :16]), "...")

"""
The model predicts the next event from all events so far. It is a language model with five words.
Where its length is open (`None`), and each layer is an `HLA` layer, a block of it, or acts on each
event alone, it can be streamed.

The input and the output have names here. They become the names by which the streaming model, and
later the exported one, are called.
"""

events = keras.Input((None,), dtype="int32", name="events")
x = keras.layers.Embedding(len(EVENTS), WIDTH)(events)
x = keras_hla.layers.HLADecoderBlock(num_heads=2, key_dim=WIDTH // 2, name="block")(x)
x = keras.layers.RMSNormalization()(x)
x = keras.layers.Dense(len(EVENTS), activation="softmax", name="probabilities")(x)
model = keras.Model(events, x)
model.compile("adam", "sparse_categorical_crossentropy")
model.fit(logs[:, :-1], logs[:, 1:], batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=2)

"""
## From a model of sequences to a model of pieces

`keras_hla.streaming_model` makes a second model, which shares the weights. Its inputs are a *piece*
of the sequence, of one event or more, and the states before it; its outputs are those of the piece,
and the states after it. With `masked=True` it also takes a mask, for pieces of different lengths in
one batch, as they will come here.
"""

stream = keras_hla.streaming_model(model, masked=True)
states = stream.initial_state(batch_size=1)
for name, state in states.items():
    print(f"{name}: {tuple(state.shape)}")

"""
`S` and `F` are what the layer has summed of the past. `window` holds the last three events for the
short convolution, and `position` counts the events for the rotary embedding. Their names are those
of the layers, and the first axis is the batch: one row for each machine.

Read in pieces, a log gives what it gives as a whole.
"""

log = machine_log(100, rng)[None]
whole = model.predict_on_batch(log)
pieces = []
for begin, end in ((0, 1), (1, 40), (40, 100)):
    piece = log[:, begin:end]
    outputs = stream.predict_on_batch(
        {"events": piece, "mask": np.ones_like(piece, bool), **states}
    )
    states = {name: outputs[name] for name in stream.state_names}
    pieces.append(outputs["probabilities"])
difference = np.abs(np.concatenate(pieces, axis=1) - whole).max()
print(f"in pieces and as a whole: probabilities differ by {difference:.1e}")
assert difference < 1e-4

"""
## Sessions

A *session* is what the service keeps of a machine: the states after its last event, and the
probabilities that the model gave for the next one. They are a few arrays.

In `Service.read` each step of the work is a few lines:

1. Pieces are padded to one length, and a mask tells the events from the padding. The length and the
   number of rows are rounded up to powers of two, because a backend may compile the model anew for
   each new shape, and so there are few shapes.
2. The states of the sessions are put together, row by row, to a batch.
3. One call of the model reads all pieces.
4. The rows are taken apart, and each session keeps its own.

`step` is the function that calls the model, from arrays to arrays, by name. The service does not
ask whether it is Keras or something else that computes. That will be useful for the export.
"""


def round_up(number):
    """The next power of two."""
    return 1 << (number - 1).bit_length()


class Service:
    """Scores events of many machines. States are kept as arrays of batch size 1."""

    def __init__(self, step, initial_state):
        self.step = step
        self.initial_state = initial_state
        self.sessions = {}

    def read(self, arrived):
        """Reads the events that have arrived.

        Args:
            arrived: Dictionary from the name of a machine to a list of its new events, one
                or more.

        Returns:
            For each machine the surprise at each new event, in bits.
        """
        shape = round_up(len(arrived)), round_up(max(map(len, arrived.values())))
        events = np.zeros(shape, "int32")
        mask = np.zeros(shape, bool)
        for row, new in enumerate(arrived.values()):
            events[row, : len(new)] = new
            mask[row, : len(new)] = True
        sessions = [self.sessions.get(name) or self.new_session() for name in arrived]
        sessions += [self.new_session()] * (shape[0] - len(arrived))
        states = {
            name: np.concatenate([states[name] for states, _ in sessions])
            for name in self.initial_state
        }
        outputs = self.step({"events": events, "mask": mask, **states})
        surprises = {}
        for row, (name, new) in enumerate(arrived.items()):
            # What the model expected before each event: at first what the session remembers.
            _, expected = sessions[row]
            predicted = outputs["probabilities"][row, : len(new)]
            before = np.concatenate([expected[None], predicted[:-1]])
            surprises[name] = -np.log2(before[np.arange(len(new)), new] + 1e-9)
            # Copies: a view would keep the arrays of the whole batch in memory.
            states = {key: outputs[key][row : row + 1].copy() for key in self.initial_state}
            self.sessions[name] = states, predicted[-1].copy()
        return surprises

    def new_session(self):
        """Before the first event all events are equally likely."""
        return self.initial_state, np.full(len(EVENTS), 1 / len(EVENTS), "float32")


"""
Two machines send events, in pieces of different lengths. The second one has a fault: it stops
without cleaning.
"""

zeros = {name: keras.ops.convert_to_numpy(state) for name, state in stream.initial_state(1).items()}
service = Service(stream.predict_on_batch, zeros)
arrivals = [
    {"A": [START, FEED, CUT], "B": [START]},
    {"A": [FEED, CUT, CLEAN], "B": [FEED, CUT, FEED, CUT]},
    {"A": [STOP], "B": [STOP]},
    {"B": [START, FEED], "C": [START, FEED, CUT]},
]
for arrived in arrivals:
    for name, surprises in service.read(arrived).items():
        scored = zip(arrived[name], surprises, strict=True)
        print(name, ", ".join(f"{EVENTS[event]} {bits:.1f}" for event, bits in scored))

"""
Events that always come next have a surprise near zero. After `cut` both `feed` and `clean` are
possible, so both surprise a little, the rarer `clean` more. The fault stands out. After it the
model is unsure for a while, since no log of the training has a fault. The first event of each
machine is a surprise too: the service gives all five events the same probability there, which is
2.3 bits.

Sessions do not mix. Whatever else was in the batch, the surprises of a machine are those of its
events alone.
"""

alone = Service(stream.predict_on_batch, zeros)
together = Service(stream.predict_on_batch, zeros)
for arrived in arrivals:
    expected = alone.read({"B": arrived["B"]})["B"]
    difference = np.abs(together.read(arrived)["B"] - expected).max()
    assert difference < 1e-2, difference

"""
## What a session costs

The size of a session, and the time for an event, do not depend on how much it has read.
"""

service = Service(stream.predict_on_batch, zeros)
service.read({"A": [START]})  # compiles
read = 1
for history in HISTORIES:
    while read < history:
        piece = machine_log(min(512, history - read), rng)
        service.read({"A": piece})
        read += len(piece)
    begin = time.perf_counter()
    for _ in range(20):
        service.read({"A": [FEED]})
    milliseconds = (time.perf_counter() - begin) / 20 * 1000
    read += 20
    states, expected = service.sessions["A"]
    size = sum(state.nbytes for state in states.values())
    print(f"after {history:6,} events: {size:,} bytes, {milliseconds:.1f} ms for a new one")

"""
Since a session is a few arrays, it can be saved and loaded: on a restart, or when it moves to
another server. There it goes on as it would have here.
"""

np.savez("session.npz", expected=expected, **states)
elsewhere = Service(stream.predict_on_batch, zeros)
with np.load("session.npz") as saved:
    elsewhere.sessions["A"] = {name: saved[name] for name in zeros}, saved["expected"]
here, there = (s.read({"A": [CUT, CLEAN]})["A"] for s in (service, elsewhere))
assert np.abs(here - there).max() < 1e-2

"""
States belong to the weights with which they were computed. Keep them with their model, and start
new sessions after the model has been trained further.

## Export

A server should not need Keras and the code of the model. A SavedModel holds the computation and the
weights. It has *signatures*, functions with named inputs and outputs: `serving_default` for whole
sequences, `initial_state`, `step` for pieces, and `step_masked` for pieces with a mask.

Under TensorFlow one function writes it. Under another backend save the model as a `.keras` file,
and run a command that writes it with TensorFlow. (From JAX the function works too. But what JAX has
written is compiled anew for each number of rows and length, which a service should avoid.)
"""

if keras.config.backend() == "tensorflow":
    keras_hla.export_saved_model(model, "saved_model")
else:
    model.save("service.keras")
    command = [sys.executable, "-m", "keras_hla.export", "service.keras", "saved_model"]
    subprocess.run(command, check=True)

"""
From here on the service needs TensorFlow alone: neither Keras nor `keras_hla`. The class `Service`
stays as it is, only `step` is another function.
"""

import tensorflow as tf

loaded = tf.saved_model.load("saved_model")
initial_state = loaded.signatures["initial_state"](batch_size=tf.constant(1))
initial_state = {name: state.numpy() for name, state in initial_state.items()}


def step(inputs):
    inputs = {name: tf.constant(x) for name, x in inputs.items()}
    return {name: x.numpy() for name, x in loaded.signatures["step_masked"](**inputs).items()}


exported = Service(step, initial_state)
in_keras = Service(stream.predict_on_batch, zeros)
for arrived in arrivals:
    expected = in_keras.read(arrived)
    for name, surprises in exported.read(arrived).items():
        difference = np.abs(surprises - expected[name]).max()
        assert difference < 1e-2, difference
print("the exported model scores as the Keras model does")

"""
## Where to go from here

- For a language model, `keras_hla.streaming.Scheduler` does all this, and draws the tokens:
  sessions that join and leave a running batch, and can be stored. `examples/serve.py` serves one
  over HTTP, with a page for the browser.
- For other runtimes, `keras_hla.export_onnx` and `keras_hla.export_litert` write files that take
  and return states as well.
- One session alone is simpler with `keras_hla.export_saved_model(model, path, stateful=True)`,
  where the SavedModel keeps the states itself.
"""
