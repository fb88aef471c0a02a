"""Sessions that share a running batch: each has the tokens that it has alone."""

import asyncio
from collections import Counter
import gc
import os
import threading
import time
import weakref

import keras
import numpy as np
import pytest
from scripts import run_python

from keras_hla import generate, layers
from keras_hla.streaming import (
    ModelReader,
    SavedSession,
    Scheduler,
    SchedulerFullError,
    SchedulerThread,
)

SESSIONS = int(os.environ.get("SCHEDULER_SESSIONS", "60"))
VOCABULARY = 30
PIECE = 16


def make_model(**options):
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    start = keras.initializers.RandomNormal(stddev=1.0)
    x = keras.layers.Embedding(VOCABULARY, 16, embeddings_initializer=start)(tokens)
    # Large weights, so that what is drawn depends on all that was before.
    large = keras.initializers.RandomNormal(stddev=0.3)
    x = layers.HLADecoderBlock(2, 8, kernel_initializer=large, name="block", **options)(x)
    return keras.Model(tokens, keras.layers.Dense(VOCABULARY, name="logits")(x))


@pytest.fixture(scope="module")
def reader():
    """What has compiled a model, for all tests. It keeps no states."""
    keras.utils.set_random_seed(0)
    return ModelReader(make_model())


@pytest.fixture(scope="module")
def alone(reader):
    """The tokens that `generate` draws for a prompt, by itself."""
    return lambda prompt, count, **options: generate(
        reader._model, prompt, count, tokens_per_call=8, **options
    ).tolist()


@pytest.fixture
def scheduler(reader):
    return Scheduler(reader, rows=4, piece_length=PIECE, max_waiting=20)


def run(scheduler):
    while scheduler.busy:
        scheduler.step()


def draw_sessions(count):
    """Arguments of sessions: prompts of up to three pieces, and all ways to draw."""
    rng = np.random.default_rng(0)
    for n in range(count):
        # Of few lengths as `generate` compiles for them.
        length = rng.integers(PIECE + 1, 3 * PIECE) if n % 4 else 1
        prompt = rng.integers(0, VOCABULARY, length)
        options = {
            "temperature": (0.8, 0, 1.0, 1.5)[n // 2 % 4],
            "top_k": (None, None, 5)[n % 3],
            "top_p": (None, 0.9)[n % 2],
            "stop_tokens": ((), (3, 7))[n % 5 == 0],
            "seed": n,
        }
        yield (prompt, int(rng.integers(1, 40))), options


def check_each_alone(sessions, alone):
    for arguments, options, session, tokens in sessions:
        assert tokens == alone(*arguments, **options), (arguments, options)
        ends = tokens[-1] in options["stop_tokens"]
        assert session.finish_reason == ("stop" if ends else "length")
        assert (session.error, session.saved) == (None, None)


def test_sessions_come_and_go(scheduler, alone):
    rng, to_do, sessions = np.random.default_rng(1), [*draw_sessions(SESSIONS)], []
    together = Counter()
    while to_do or scheduler.busy:
        for _ in range(min(rng.integers(0, 3), len(to_do))):
            arguments, options = to_do[0]
            try:
                session = scheduler.submit(*arguments, **options)
            except SchedulerFullError:
                break
            sessions.append((arguments, options, session, []))
            del to_do[0]
        news = scheduler.step()
        for _, _, session, tokens in sessions:
            new = session.take()
            assert len(new) <= (session in news)
            tokens.extend(new)
        together[sum(x[2].status == "writing" for x in sessions)] += 1
    assert max(together) == 4
    assert len(together) == 5
    check_each_alone(sessions, alone)


def test_writers_write_while_a_long_prompt_is_read(scheduler, alone):
    rng = np.random.default_rng(0)
    short = scheduler.submit([1], 60, seed=1)
    scheduler.step()
    assert len(short.take()) == 1
    prompts = [rng.integers(0, VOCABULARY, 20 * PIECE + 3), rng.integers(0, VOCABULARY, 5)]
    long, other = (scheduler.submit(x, 3, seed=2) for x in prompts)
    for _ in range(20):
        assert short in scheduler.step()
        assert len(short.take()) == 1
    assert long.status == "reading"
    run(scheduler)
    assert short.take() == alone([1], 60, seed=1)[21:]
    assert [x.take() for x in (long, other)] == [alone(x, 3, seed=2) for x in prompts]


def test_a_short_prompt_does_not_wait_for_a_long_one(scheduler):
    scheduler.submit(np.ones(100 * PIECE, "int32"), 1)
    short = scheduler.submit(np.ones(PIECE, "int32"), 1)
    for _ in range(3):
        scheduler.step()
    assert short.status == "ended"


def test_further_inputs(rng):
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    condition = keras.Input((8,), name="condition")
    x = keras.layers.Embedding(VOCABULARY, 8)(tokens) + condition[:, None]
    logits = keras.layers.Dense(VOCABULARY, kernel_initializer="orthogonal")
    model = keras.Model([tokens, condition], logits(layers.HLA(2, 4)(x)))
    conditions = 9 * rng.standard_normal((3, 8)).astype("float32")
    scheduler = Scheduler(model, rows=2, piece_length=4)
    sessions = [scheduler.submit([1, 2], 5, 0, inputs={"condition": x}) for x in conditions]
    run(scheduler)
    written = [session.take() for session in sessions]
    for x, new in zip(conditions, written, strict=True):
        expected = generate(model, [1, 2], 5, 0, inputs={"condition": x}, tokens_per_call=5)
        assert new == expected.tolist()
    assert written[0] != written[1]
    for wrong in (None, {"other": 1}, {"condition": conditions}):
        with pytest.raises(ValueError, match="`inputs"):
            scheduler.submit([1], 5, inputs=wrong)


def test_cancelled_sessions_leave(scheduler, alone):
    prompts = [[n] * (1, 40)[n % 2] for n in range(8)]
    sessions = [scheduler.submit(prompt, 30, seed=n) for n, prompt in enumerate(prompts)]
    for _ in range(5):
        scheduler.step()
    assert {x.status for x in sessions} == {"waiting", "reading", "writing"}
    for status in ("waiting", "reading", "writing"):
        session = next(x for x in sessions if x.status == status)
        scheduler.cancel(session)
        scheduler.cancel(session)  # again is no error
        assert (session.status, session.finish_reason) == ("ended", "cancelled")
        sessions.remove(session)
    run(scheduler)
    for session in sessions:
        n = session._drawing.seed
        assert session.take() == alone(prompts[n], 30, seed=n)


def test_a_full_queue_is_an_error(reader):
    scheduler = Scheduler(reader, rows=1, piece_length=PIECE, max_waiting=2)
    first, _ = (scheduler.submit([1], 5) for _ in range(2))
    with pytest.raises(SchedulerFullError, match="2 sessions wait already"):
        scheduler.submit([1], 5)
    scheduler.step()
    scheduler.submit([1], 5)
    with pytest.raises(SchedulerFullError):
        scheduler.submit([1], 5)
    run(scheduler)
    assert len(first.take()) == 5


def test_who_takes_no_tokens_leaves_the_row_to_others(reader, alone):
    scheduler = Scheduler(reader, rows=1, piece_length=PIECE, max_untaken=6)
    slow = scheduler.submit([1, 2], 20, seed=0)
    other = scheduler.submit([3], 5, seed=1)
    run(scheduler)
    assert (slow.status, other.status) == ("full", "ended")
    tokens = []
    while slow.status != "ended":
        assert len(slow._tokens) <= 6
        tokens += slow.take()
        run(scheduler)
    assert tokens + slow.take() == alone([1, 2], 20, seed=0)
    assert other.take() == alone([3], 5, seed=1)


def test_patience_ends(reader):
    scheduler = Scheduler(reader, rows=1, piece_length=PIECE, max_untaken=2, patience=0.05)
    session = scheduler.submit([1, 2], 20)
    run(scheduler)
    assert session.status == "full"
    time.sleep(0.1)
    assert scheduler.busy
    assert scheduler.step() == [session]
    assert session.finish_reason == "cancelled"
    assert not scheduler.busy


def test_suspended_sessions_go_on(scheduler, alone, tmp_path):
    prompts = [np.arange(n) % VOCABULARY for n in (1, 3, 3 * PIECE, 3 * PIECE, 5, 6)]
    expected = [alone(x, 20, seed=3, temperature=0.9) for x in prompts]
    sessions = [scheduler.submit(x, 20, seed=3, temperature=0.9) for x in prompts]
    for _ in range(4):
        scheduler.step()
    assert {x.status for x in sessions} == {"waiting", "reading", "writing"}
    begun = [x.take() for x in sessions]
    saved = [scheduler.suspend(x) for x in sessions]
    assert not scheduler.busy
    assert sessions[0].finish_reason == "suspended"
    with pytest.raises(ValueError, match="must not have ended"):
        scheduler.suspend(sessions[0])
    for n, x in enumerate(saved):
        x.save(tmp_path / f"{n}.session")
    loaded = [SavedSession.load(tmp_path / f"{n}.session") for n in range(len(saved))]
    resumed = [scheduler.resume(x) for x in (*saved, *loaded)]
    run(scheduler)
    assert [begun[n % 6] + x.take() for n, x in enumerate(resumed)] == [*expected, *expected]


ELSEWHERE = """
import sys
import torch
import keras
import keras_hla
from keras_hla.streaming import SavedSession, Scheduler

scheduler = Scheduler(keras.saving.load_model(sys.argv[1]), rows=2)
session = scheduler.resume(SavedSession.load(sys.argv[2]))
while scheduler.busy:
    scheduler.step()
print("tokens", session.take())
"""


def test_in_another_process(reader, scheduler, alone, tmp_path):
    session = scheduler.submit([1, 2, 3], 20, seed=5)
    for _ in range(8):
        scheduler.step()
    begun = session.take()
    scheduler.suspend(session).save(tmp_path / "session.npz")
    reader._model.save(tmp_path / "model.keras")
    output = run_python(
        *("-c", ELSEWHERE, tmp_path / "model.keras", tmp_path / "session.npz"),
        backend=keras.config.backend(),
    )
    rest = alone([1, 2, 3], 20, seed=5)[len(begun) :]
    assert 0 < len(begun) < 20
    assert f"tokens {rest}" in output


def test_files_of_no_session_are_refused(scheduler, tmp_path):
    path = tmp_path / "session.npz"
    scheduler.suspend(scheduler.submit([1], 9)).save(path)
    whole = path.read_bytes()
    for content in (b"", b"PK", whole[:-30], whole[:100], b"[1, 2]"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"file that `SavedSession\.save` wrote"):
            SavedSession.load(path)
    np.savez(path, other=1)
    with pytest.raises(ValueError, match=r"file that `SavedSession\.save` wrote"):
        SavedSession.load(path)


def test_sessions_of_another_model_are_refused(scheduler):
    session = scheduler.submit([1], 9)
    scheduler.step()
    saved = scheduler.suspend(session)
    weights = scheduler.reader._model.get_weights()
    keras.utils.set_random_seed(1)
    for options in ({}, {"operator": "ahla"}, {"decay": "input"}):
        other = make_model(**options)
        if options == {"operator": "ahla"}:  # which has the very weights
            other.set_weights(weights)
        with pytest.raises(ValueError, match="goes on with the model"):
            Scheduler(other).resume(saved)
        with pytest.raises(ValueError, match="goes on with the model"):
            Scheduler(other).submit([1], 3, after=saved)
    same = make_model()
    same.set_weights(weights)
    Scheduler(same).resume(saved)


def test_a_sequence_goes_on_with_another_prompt(scheduler, alone):
    first = scheduler.submit([1, 2, 3], 10, temperature=0, keep=True)
    run(scheduler)
    written = first.take()
    second = scheduler.submit([4, 5], 10, temperature=0, after=first.saved)
    run(scheduler)
    assert second.take() == alone([1, 2, 3, *written, 4, 5], 10, temperature=0)
    with pytest.raises(ValueError, match="none left"):
        scheduler.resume(first.saved)
    with pytest.raises(ValueError, match="`inputs` must be None"):
        scheduler.submit([1], 1, after=first.saved, inputs={})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "`prompt`"),
        ({"prompt": [VOCABULARY]}, "`prompt`"),
        ({"prompt": [[1]]}, "`prompt`"),
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"temperature": -1}, "`temperature`"),
        ({"top_k": 0}, "`top_k`"),
        ({"top_p": 2}, "`top_p`"),
        ({"seed": -1}, "`seed`"),
        ({"stop_tokens": -1}, "`stop_tokens`"),
        ({"inputs": {"other": 1}}, "`inputs`"),
    ],
)
def test_errors(scheduler, arguments, message):
    with pytest.raises(ValueError, match=message):
        scheduler.submit(**{"prompt": [1, 2], "max_new_tokens": 3} | arguments)
    assert not scheduler.busy


@pytest.mark.parametrize(
    "options",
    [{"rows": 0}, {"piece_length": 0}, {"max_waiting": 0}, {"max_untaken": 0}, {"patience": 0}],
)
def test_errors_of_the_scheduler(reader, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        Scheduler(reader, **options)


class Failing(ModelReader):
    """Has no logits after token `mute`, and raises at token `broken`."""

    mute = broken = -1

    def step(self, tokens, states):
        if self.broken in tokens:
            raise RuntimeError("no step")
        logits, states = super().step(tokens, states)
        mute = keras.ops.convert_to_tensor((tokens == self.mute)[:, None])
        return keras.ops.where(mute, np.nan, logits), states

    def read(self, tokens, mask, states):
        if self.broken in tokens:
            raise RuntimeError("no piece")
        return super().read(tokens, mask, states)


def test_a_failing_session_disturbs_no_other(reader, alone):
    failing = Failing(reader._model)
    scheduler = Scheduler(failing, rows=4, piece_length=PIECE)
    expected = alone([1], 20, temperature=0)
    mute, broken = [n for n in range(2, VOCABULARY) if n not in expected][:2]
    failing.mute, failing.broken = mute, broken
    fine = scheduler.submit([1], 20, temperature=0)
    bad = [scheduler.submit(x, 20, keep=True) for x in ([1, mute], [broken, 1])]
    run(scheduler)
    assert fine.take() == expected
    assert [x.finish_reason for x in bad] == ["error", "error"]
    assert "NaN" in str(bad[0].error)
    assert str(bad[1].error) == "no piece"
    assert bad[0].saved is None

    # Where the step of the batch itself fails, those in it end, and the next find a batch as new.
    sessions = [scheduler.submit(x, 20, temperature=0) for x in ([1], [1, broken])]
    run(scheduler)
    assert [str(x.error) for x in sessions] == ["no step"] * 2
    again = scheduler.submit([1], 20, temperature=0)
    run(scheduler)
    assert again.take() == expected


def count_objects():
    gc.collect()
    return len(gc.get_objects())


def test_memory_is_flat(scheduler):
    """No object is left of sessions that have ended, however they did."""

    def live(count):
        kept = weakref.WeakSet()
        for n in range(count):
            session = scheduler.submit([n % 9] * (1 + n % 20), 3, seed=n, keep=n % 2 == 0)
            kept.add(session)
            scheduler.step()
            if n % 5 == 0:
                scheduler.cancel(session)
            del session
        run(scheduler)
        gc.collect()
        assert not kept
        return count_objects()

    live(20)
    before = live(20)
    assert live(200) <= before + 200  # as many as vary from run to run; each session has more


def test_threads_and_slow_consumers(reader, alone):
    """Consumers of several threads, some slow, and one that vanishes."""
    scheduler = Scheduler(reader, rows=2, piece_length=PIECE, max_untaken=4)
    specs = [*draw_sessions(8)]
    results = {}

    def consume(n, thread):
        arguments, options = specs[n]
        stream = thread.submit(*arguments, **options)
        tokens = []
        for token in stream:
            if n % 3 == 0:
                time.sleep(0.01)
            tokens.append(token)
        results[n] = arguments, options, stream.session, tokens

    with SchedulerThread(scheduler) as thread:
        vanished = [thread.submit([1], 10**9).session for _ in range(3)]
        consumers = [threading.Thread(target=consume, args=(n, thread)) for n in range(8)]
        for consumer in consumers:
            consumer.start()
        for consumer in consumers:
            consumer.join(60)
    assert [x.finish_reason for x in vanished] == ["cancelled"] * 3
    assert len(results) == 8
    check_each_alone(results.values(), alone)


def test_asyncio(reader, alone):
    async def consume(thread, n):
        return [token async for token in thread.submit([n], 20, seed=n)]

    async def consume_all(thread):
        return await asyncio.gather(*(consume(thread, n) for n in range(6)))

    with SchedulerThread(Scheduler(reader, rows=4, max_untaken=5)) as thread:
        for _ in range(2):  # two loops, one after the other
            tokens = asyncio.run(consume_all(thread))
            assert tokens == [alone([n], 20, seed=n) for n in range(6)]


def test_streams_end_as_they_are_told_to(reader, alone):
    thread = SchedulerThread(Scheduler(reader, rows=2, max_waiting=2, piece_length=PIECE))
    cancelled, suspended = (thread.submit([1], 10**6, seed=0) for _ in range(2))
    begun = [next(suspended) for _ in range(3)]
    saved = suspended.suspend()
    begun += suspended  # what was written before
    assert suspended.session.finish_reason == "suspended"
    next(cancelled)
    cancelled.cancel()
    assert len([*cancelled]) < 10**6
    assert cancelled.session.finish_reason == "cancelled"
    with pytest.raises(ValueError, match="`prompt`"):
        thread.submit([-1], 1)

    going_on = thread.resume(saved)
    begun += [next(going_on) for _ in range(10)]
    assert begun == alone([1], len(begun), seed=0)
    waiting = [thread.submit([1], 10**6, keep=True) for _ in range(2)]
    with pytest.raises(SchedulerFullError):
        [thread.submit([1], 10**6) for _ in range(3)]
    thread.close()
    thread.close()
    assert {x.session.finish_reason for x in (going_on, *waiting)} == {"cancelled"}
    assert waiting[0].session.saved is not None
    with pytest.raises(RuntimeError, match="closed"):
        thread.submit([1], 1)


def test_a_failed_session_raises_where_it_is_read(reader):
    failing = Failing(reader._model)
    failing.mute = 9
    with SchedulerThread(Scheduler(failing, rows=2)) as thread:
        stream = thread.submit([1, 9], 5)
        with pytest.raises(RuntimeError, match="has failed") as raised:
            next(stream)
        assert "NaN" in str(raised.value.__cause__)
        assert len([*thread.submit([1], 1, temperature=0)]) == 1
