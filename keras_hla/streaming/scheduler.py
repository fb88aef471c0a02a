"""Continuous batching: sessions that join and leave a running batch."""

from collections import deque
from collections.abc import Sequence
import time
from typing import Any

import keras
import numpy as np

from keras_hla.checks import check_number, check_positive_int
from keras_hla.streaming.drawing import Drawing, check_prompt
from keras_hla.streaming.model_reader import ModelReader
from keras_hla.streaming.row_batch import RowBatch
from keras_hla.streaming.session import SavedSession, Session, resumed
from keras_hla.streaming.token_reader import TokenReader
from keras_hla.types import Tensor


class SchedulerFullError(RuntimeError):
    """Too many sessions wait for a row: try again later."""


class Scheduler:
    """Writes many sequences at a time, which come and go (continuous batching).

    A batch of a fixed number of rows is stepped, one token for each session in it.
    Sessions join and leave between steps. Prompts are read beside it, one piece per
    step, so that a long one does not hold up those that write. With the same seed a
    session has the tokens that `keras_hla.generate` draws for its prompt alone,
    whatever the others do.

    It runs in the thread that calls it. `SchedulerThread` is for several threads.

    Args:
        model: Model that `keras_hla.generate` takes, or a `TokenReader`, such as
            `keras_hla.export.SavedModelReader`.
        rows: Number of sessions in a step.
        piece_length: Number of tokens of a prompt that are read at a time. Shorter
            pieces are padded to it.
        max_waiting: Largest number of sessions that wait for a row. `submit` raises
            a `SchedulerFullError` beyond.
        max_untaken: Number of tokens of a session that nobody has taken. With so many
            it leaves its row to others. It waits for a row again when half of
            them have been taken.
        patience: Seconds after which such a session is cancelled, or `None`.

    Raises:
        ValueError: if an argument is not among its allowed values.

    Example:

    >>> tokens = keras.Input((None,), dtype="int32", name="tokens")
    >>> x = keras.layers.Embedding(256, 32)(tokens)
    >>> x = keras_hla.layers.HLADecoderBlock(num_heads=2, key_dim=16)(x)
    >>> model = keras.Model(tokens, keras.layers.Dense(256)(x))
    >>> scheduler = keras_hla.streaming.Scheduler(model, rows=2)
    >>> sessions = [scheduler.submit([n], max_new_tokens=5, seed=n) for n in range(3)]
    >>> while scheduler.busy:
    ...     news = scheduler.step()
    >>> [len(session.take()) for session in sessions]
    [5, 5, 5]
    """

    def __init__(
        self,
        model: keras.Model | TokenReader,
        rows: int = 16,
        piece_length: int = 64,
        max_waiting: int = 256,
        max_untaken: int = 256,
        patience: float | None = None,
    ) -> None:
        check_positive_int("rows", rows)
        check_positive_int("piece_length", piece_length)
        check_positive_int("max_waiting", max_waiting)
        check_positive_int("max_untaken", max_untaken)
        if patience is not None:
            check_number("patience", patience, "None or a number > 0", lambda x: x > 0)
        self.reader = model if isinstance(model, TokenReader) else ModelReader(model)
        self._batch = RowBatch(self.reader, rows)
        self._free = list(range(rows))
        self._piece_length = piece_length
        self._max_waiting = max_waiting
        self._max_untaken = max_untaken
        self._patience = patience
        self._waiting: deque[Session] = deque()
        self._reading: deque[Session] = deque()
        self._full: list[Session] = []

    @property
    def busy(self) -> bool:
        """Whether there is something to do for `step`."""
        working = self._waiting or self._reading or len(self._batch)
        return bool(working) or any(self._has_room(s) or self._is_late(s) for s in self._full)

    def submit(
        self,
        prompt: Any,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_tokens: int | Sequence[int] = (),
        seed: int | None = None,
        inputs: dict[str, Tensor] | None = None,
        after: SavedSession | None = None,
        keep: bool = False,
    ) -> Session:
        """Adds a session.

        Args:
            prompt: Sequence of integers, not empty.
            max_new_tokens: As in `keras_hla.generate`, as are the others up to `seed`.
            inputs: Dictionary of the other inputs of the model, without the batch axis.
            after: Session that the prompt goes on with, in place of a new sequence.
            keep: Whether the session has its states, as `saved`, when it has ended.

        Returns:
            The session, which waits for a row.

        Raises:
            ValueError: if an argument is not among its allowed values.
            SchedulerFullError: if too many sessions wait.
        """
        size = self.reader.vocabulary_size
        unread = check_prompt(prompt, size).astype("int32")
        drawing = Drawing(size, max_new_tokens, temperature, top_k, top_p, stop_tokens, seed)
        if after is None:
            states = self.reader.start(inputs)
        elif inputs is not None:
            raise ValueError("Argument `inputs` must be None where `after` has them already.")
        else:
            after.check(self.reader)
            states, unread = after.states, np.concatenate([after.unread, unread])
        (generator,) = drawing.generators(1)
        return self._add(Session(drawing, generator, max_new_tokens, unread, states, keep))

    def suspend(self, session: Session) -> SavedSession:
        """Ends a session, and returns what `resume` needs to go on with it.

        Args:
            session: Session of this scheduler that has not ended.

        Returns:
            The `SavedSession`. Its tokens that have not been taken stay with `session`.

        Raises:
            ValueError: if the session has ended.
        """
        if session.status == "ended":
            raise ValueError(
                "Argument `session` must not have ended: it did, with the reason "
                f"'{session.finish_reason}'."
            )
        return self._end(session, "suspended")

    def resume(self, saved: SavedSession, keep: bool = False) -> Session:
        """Adds a session that goes on as the suspended one would have.

        Args:
            saved: What `suspend` returned, maybe in another process.
            keep: As in `submit`.

        Returns:
            The new session, which waits for a row.

        Raises:
            ValueError: if it is of another model, or had written all its tokens.
            SchedulerFullError: if too many sessions wait.
        """
        saved.check(self.reader)
        session = resumed(saved, keep)
        if not session._left:
            raise ValueError("Argument `saved` must have tokens to write. Received: none left")
        return self._add(session)

    def cancel(self, session: Session) -> None:
        """Ends a session, if it has not ended.

        Args:
            session: Session of this scheduler.
        """
        if session.status != "ended":
            self._end(session, "cancelled")

    def step(self) -> list[Session]:
        """Reads a piece of a prompt, and writes one token in each row.

        Returns:
            The sessions that have new tokens, or have ended.
        """
        ended = self._look_after_full()
        ended += self._admit()
        ended += self._read_piece()
        return ended + self._write()

    def _add(self, session):
        if len(self._waiting) + len(self._full) >= self._max_waiting:
            raise SchedulerFullError(f"{self._max_waiting} sessions wait already; try again later")
        self._waiting.append(session)
        return session

    def _has_room(self, session):
        return len(session._tokens) <= self._max_untaken // 2

    def _is_late(self, session):
        waited = time.monotonic() - session._full_since
        return self._patience is not None and waited > self._patience

    def _look_after_full(self):
        """Sessions whose tokens have been taken wait for a row again, before the others."""
        late = [s for s in self._full if not self._has_room(s) and self._is_late(s)]
        for session in late:
            self._end(session, "cancelled")
        for session in [s for s in self._full if self._has_room(s)]:
            self._full.remove(session)
            self._waiting.appendleft(session)
            session.status = "waiting"
        return late

    def _admit(self):
        ended = []
        while self._waiting and self._free:
            session = self._waiting.popleft()
            session._row, session.status = self._free.pop(), "reading"
            self._reading.append(session)
            ended += self._advance(session, self._begin)
        return ended

    def _read_piece(self):
        """Reads a piece of one prompt, of which others then come first."""
        if not self._reading:
            return []
        session = self._reading[0]
        self._reading.rotate(-1)
        return self._advance(session, self._read)

    def _advance(self, session, function):
        """Calls a function of a session that reads. All but its last token are read so.

        Returns:
            A list of the session if it failed, and so has ended.
        """
        try:
            function(session)
            if len(session._unread) == 1:  # which is read with the batch
                self._batch.put(session._row, session)
                self._reading.remove(session)
                session.status = "writing"
        except Exception as error:
            self._end(session, "error", error)
            return [session]
        return []

    def _begin(self, session):
        session._states = self.reader.from_host(session._states)

    def _read(self, session):
        piece = session._unread[:-1][: self._piece_length]
        tokens = np.zeros((1, self._piece_length), "int32")
        mask = np.zeros(tokens.shape, bool)
        tokens[0, -len(piece) :], mask[0, -len(piece) :] = piece, True
        session._states = self.reader.read(tokens, mask, session._states)
        session._unread = session._unread[len(piece) :]

    def _write(self):
        if not len(self._batch):
            return []
        try:
            drawn = self._batch.step()
        except Exception as error:
            sessions = self._batch.clear()  # whose states are not to be trusted
            for session in sessions:
                self._end(session, "error", error)
            return sessions
        for session, token in drawn:
            if isinstance(token, Exception):
                self._end(session, "error", token)
            elif reason := session._add(token):
                self._end(session, reason)
            elif len(session._tokens) >= self._max_untaken:
                self._leave(session, keep=True)
                session.status, session._full_since = "full", time.monotonic()
                self._full.append(session)
        return [session for session, _ in drawn]

    def _end(self, session, reason, error=None):
        keep = error is None and (session._keep or reason == "suspended")
        self._leave(session, keep)
        session.saved = session._to_saved(self.reader.fingerprint) if keep else None
        session._states, session.error = None, error
        session.finish_reason, session.status = reason, "ended"
        return session.saved

    def _leave(self, session, keep):
        """Takes a session out of where it is. Its states are arrays then, if they are kept."""
        if session.status == "writing":
            (self._batch.take if keep else self._batch.drop)(session._row)
        else:
            places = {"waiting": self._waiting, "reading": self._reading, "full": self._full}
            places[session.status].remove(session)
        if session._row is not None:
            self._free.append(session._row)
            session._row = None
            session._states = self.reader.to_host(session._states) if keep else None
