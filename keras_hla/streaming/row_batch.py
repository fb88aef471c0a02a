"""Rows that are stepped together, each for another session."""

import functools

from keras import ops
import numpy as np

from keras_hla.backend.compiling import compiled
from keras_hla.streaming.sampling import sample
from keras_hla.streaming.session import Session

_NO_TOKEN = "The model gave logits that hold NaN, or are all minus infinity."


class RowBatch:
    """A batch of fixed size, whose step is compiled once. What a row draws depends on it alone.

    Args:
        reader: the `TokenReader`.
        size: number of rows.
    """

    def __init__(self, reader, size):
        self._reader = reader
        self._sessions: list[Session | None] = [None] * size
        self._samplers = {}  # compiled, by the number of candidates
        self._states = None
        self.clear()

    def __len__(self):
        return sum(session is not None for session in self._sessions)

    def clear(self):
        """Takes all sessions out, and returns them."""
        sessions = [session for session in self._sessions if session is not None]
        self._sessions = [None] * len(self._sessions)
        self._states = self._reader.from_host(self._reader.initial_state(len(self._sessions)))
        return sessions

    def put(self, row, session):
        """Gives a row to a session whose states are tensors. They are the batch's from here on."""
        self._states = self._reader.put(self._states, row, session._states)
        self._sessions[row], session._states = session, None

    def take(self, row):
        """Takes a session out, with its states."""
        session, self._sessions[row] = self._sessions[row], None
        session._states = self._reader.take(self._states, row)

    def drop(self, row):
        """Takes a session out, whose states are not needed any more."""
        self._sessions[row] = None

    def step(self):
        """Reads the unread token of each session, and draws the next.

        Returns:
            A list of pairs of a session and its token, or the exception in place of a token.
        """
        tokens = np.zeros(len(self._sessions), "int32")
        active = [(row, s) for row, s in enumerate(self._sessions) if s is not None]
        for row, session in active:
            (tokens[row],) = session._unread
        logits, self._states = self._reader.step(tokens, self._states)
        drawn = self._draw(logits, active)
        return [
            (s, int(drawn[row]) if drawn[row] >= 0 else ValueError(_NO_TOKEN)) for row, s in active
        ]

    def _draw(self, logits, active):
        size = len(self._sessions)
        uniform, share = np.zeros(size, "float32"), np.ones((size, 1), "float32")
        inverse, drawn = np.ones((2, size, 1), "float32"), np.zeros(size, "int32")
        rows: dict = {}  # by the number of candidates, for which samplers differ
        for row, session in active:
            drawing = session._drawing
            uniform[row] = session._generator.random(dtype="float32")
            inverse[:, row, 0], share[row] = drawing.inverse, drawing.share
            rows.setdefault(drawing.candidates, []).append(row)
        tensors = [ops.convert_to_tensor(x) for x in (logits, uniform, inverse, share)]
        for candidates, of_these in rows.items():
            tokens = self._sampler(candidates)(*tensors)
            drawn[of_these] = ops.convert_to_numpy(tokens)[of_these]
        return drawn

    def _sampler(self, candidates):
        if candidates not in self._samplers:
            draw = functools.partial(sample, top_k=candidates)
            self._samplers[candidates] = compiled(draw, [])
        return self._samplers[candidates]
