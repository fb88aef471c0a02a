"""Many sessions share one SavedModel, from several threads: none notices another."""

from concurrent.futures import ThreadPoolExecutor
import threading

from backends import relative_error
import keras
import numpy as np
import pytest

import keras_hla
from keras_hla.export import SavedModelReader
from keras_hla.streaming import SavedSession, Scheduler

VOCABULARY = 40
SESSIONS = 64
STEPS = 1000
THREADS = 4
# Of few shapes, since what JAX wrote is compiled again for each.
BATCHES = (1, 4, 12)
WIDTHS = (1, 8)
MEAN_LENGTH = 275


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small language model of several operators, and the SavedModel that this backend writes."""
    folder = tmp_path_factory.mktemp("sessions")
    keras.utils.set_random_seed(0)
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    h = keras.layers.Embedding(VOCABULARY, 16)(tokens)
    for operator, decay in (("hla2", None), ("hla3", "input")):
        layer = keras_hla.layers.HLA(2, 8, operator=operator, decay=decay)
        h = h + layer(keras.layers.RMSNormalization()(h))
    model = keras.Model(tokens, keras.layers.Dense(VOCABULARY, name="logits")(h))
    keras_hla.export_saved_model(model, folder / "saved_model")
    return model, folder / "saved_model"


@pytest.fixture(scope="module")
def signatures(written):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(written[1]))
    yield loaded.signatures
    del loaded  # only now: the signatures do not keep it alive


def call(function, **inputs):
    import tensorflow as tf

    return {
        k: x.numpy() for k, x in function(**{k: tf.constant(x) for k, x in inputs.items()}).items()
    }


def initial_state(signatures, batch_size=1):
    return call(signatures["initial_state"], batch_size=np.int32(batch_size))


class Session:
    """A sequence, what is read of it, the states after that and the logits of it."""

    def __init__(self, tokens, states):
        self.tokens = tokens
        self.states = states
        self.read = 0
        self.logits = []

    def take(self, logits, states):
        self.logits.append(logits)
        self.states = states
        self.read += len(logits)


def step(signatures, sessions, lengths, width):
    """Reads the next piece of each session, of lengths up to `width`, in one batch."""
    mask = np.arange(width) < np.array(lengths)[:, None]
    tokens = np.zeros(mask.shape, "int32")
    for row, s, length in zip(tokens, sessions, lengths, strict=True):
        row[:length] = s.tokens[s.read : s.read + length]
    states = {k: np.concatenate([s.states[k] for s in sessions]) for k in sessions[0].states}
    if mask.all():
        outputs = call(signatures["step"], tokens=tokens, **states)
    else:
        outputs = call(signatures["step_masked"], tokens=tokens, mask=mask, **states)
    logits = outputs.pop("logits")
    for i, (session, length) in enumerate(zip(sessions, lengths, strict=True)):
        session.take(logits[i, :length], {k: x[i : i + 1] for k, x in outputs.items()})


def alone(signatures, tokens, width=None):
    """The logits of a sequence in one piece, which is padded if there is a width."""
    session = Session(tokens, initial_state(signatures))
    step(signatures, [session], [len(tokens)], width or len(tokens))
    return session.logits[0]


def test_interleaved_sessions(signatures):
    rng = np.random.default_rng(0)
    everyone = [
        Session(
            rng.integers(0, VOCABULARY, round(MEAN_LENGTH * share)).astype("int32"),
            initial_state(signatures),
        )
        for share in np.linspace(0.1, 1.9, SESSIONS)
    ]
    idle, lock = list(everyone), threading.Lock()
    count = 0

    def draw():
        """Sessions for a step, the length of each one's next piece, and the longest to expect."""
        nonlocal count
        with lock:
            rng.shuffle(idle)
            fitting = [size for size in BATCHES if size <= len(idle) and count < STEPS]
            chosen = idle[: rng.choice(fitting or [0])]
            del idle[: len(chosen)]
            count += bool(chosen)
            width = rng.choice(WIDTHS)
            lowest = rng.choice((1, width))  # all of one length are read without mask
            lengths = rng.integers(lowest, width + 1, len(chosen))
            left = [len(s.tokens) - s.read for s in chosen]
            return chosen, np.minimum(lengths, left), width

    def work():
        while True:
            chosen, lengths, width = draw()
            if not chosen:
                return
            step(signatures, chosen, lengths, width)
            with lock:
                idle.extend(s for s in chosen if s.read < len(s.tokens))

    with ThreadPoolExecutor(THREADS) as pool:
        for worker in [pool.submit(work) for _ in range(THREADS)]:
            worker.result()
    assert count >= STEPS * 0.9
    assert sum(s.read == len(s.tokens) for s in everyone) >= SESSIONS / 3
    for session in everyone:
        assert session.read > 0
        expected = alone(signatures, session.tokens[: session.read], 2 * MEAN_LENGTH)
        assert relative_error(np.concatenate(session.logits), expected) <= 1e-5


@pytest.mark.parametrize("name", ["step", "step_masked"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_spoilt_states_spoil_their_own_row(signatures, rng, name, value):
    tokens = rng.integers(0, VOCABULARY, (5, 30)).astype("int32")
    states = initial_state(signatures, 5)
    for x in states.values():
        x[2] = value
    more = {"mask": np.ones(tokens.shape, "bool")} if name == "step_masked" else {}
    outputs = call(signatures[name], tokens=tokens, **more, **states)
    assert not np.isfinite(outputs["logits"][2]).all()
    for i in (0, 1, 3, 4):
        assert relative_error(outputs["logits"][i], alone(signatures, tokens[i])) <= 1e-5
        assert all(np.isfinite(outputs[k][i]).all() for k in states)


def another_shape(states):
    return {k: np.zeros((*x.shape[:-1], x.shape[-1] + 1), "float32") for k, x in states.items()}


def another_batch(states):
    return {k: np.zeros((3, *x.shape[1:]), "float32") for k, x in states.items()}


def one_session_for_two(states):
    return {k: np.zeros((1, *x.shape[1:]), "float32") for k, x in states.items()}


def another_model(states):
    return {f"other_{k}": x for k, x in states.items()}


def one_missing(states):
    return dict(list(states.items())[1:])


def another_dtype(states):
    return {k: x.astype("float64") for k, x in states.items()}


@pytest.mark.parametrize(
    "wrong",
    [
        another_shape,
        another_batch,
        one_session_for_two,
        another_model,
        one_missing,
        another_dtype,
    ],
)
def test_refuses_wrong_states(signatures, rng, wrong):
    import tensorflow as tf

    tokens = rng.integers(0, VOCABULARY, (1, 20)).astype("int32")
    expected = alone(signatures, tokens[0])
    with pytest.raises((TypeError, ValueError, tf.errors.InvalidArgumentError)):
        call(
            signatures["step"],
            tokens=np.repeat(tokens, 2, 0),
            **wrong(initial_state(signatures, 2)),
        )
    np.testing.assert_array_equal(alone(signatures, tokens[0]), expected)


def run(scheduler):
    while scheduler.busy:
        scheduler.step()


def test_a_scheduler_of_a_saved_model(written, tmp_path):
    model, path = written
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, n) for n in (1, 32, 17, 24, 25, 30)]
    scheduler = Scheduler(SavedModelReader(path), rows=3, piece_length=8)
    sessions = [scheduler.submit(x, 20, seed=n) for n, x in enumerate(prompts)]
    for _ in range(10):
        scheduler.step()
    begun = [x.take() for x in sessions]
    for n, session in enumerate(sessions):
        scheduler.suspend(session).save(tmp_path / f"{n}.npz")

    again = Scheduler(SavedModelReader(path), rows=3, piece_length=8)  # as in another process
    sessions = [again.resume(SavedSession.load(tmp_path / f"{n}.npz")) for n in range(6)]
    run(again)
    for n, prompt in enumerate(prompts):
        alone = keras_hla.generate(model, prompt, 20, seed=n, tokens_per_call=8)
        assert begun[n] + sessions[n].take() == alone.tolist()
    assert all(0 < len(tokens) < 20 for tokens in begun[:2])

    # States of the Keras model may have other names.
    with pytest.raises(ValueError, match="goes on with the model"):
        Scheduler(model).resume(SavedSession.load(tmp_path / "0.npz"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("step", "reset"), "takes and returns states"),
        (("initial_state", "step", "step_masked"), "one output"),
    ],
)
def test_saved_models_that_no_scheduler_can_use(tmp_path, names, message):
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec((None, None), "int32", "tokens")])
    def two_outputs(tokens):
        return {"first": tokens[..., None], "second": tokens[..., None]}

    module = tf.Module()
    function = two_outputs.get_concrete_function()
    tf.saved_model.save(module, str(tmp_path / "model"), dict.fromkeys(names, function))
    with pytest.raises(ValueError, match=message):
        SavedModelReader(tmp_path / "model")
