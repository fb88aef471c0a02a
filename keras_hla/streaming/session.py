"""A sequence that a `Scheduler` writes, and what is stored of one."""

from collections import deque
import dataclasses
import json
from typing import Any
import zipfile

import numpy as np

from keras_hla.checks import check_shape
from keras_hla.streaming.drawing import Drawing
from keras_hla.streaming.token_reader import TokenReader
from keras_hla.types import StrPath


class SavedSession:
    """What a model knows of a sequence, and how it goes on: in memory, or in a file.

    `Scheduler.suspend` returns it, and sessions with `keep=True` have it as `saved`
    when they have ended.

    Args:
        states: Dictionary of the states of one row, as arrays.
        unread: The tokens that the states do not yet include.
        fingerprint: That of the model.
        drawing: Dictionary of the options of `Scheduler.submit`, and the number of
            tokens `left`, and the state of the `generator` of random numbers.
    """

    def __init__(
        self,
        states: dict[str, np.ndarray],
        unread: np.ndarray,
        fingerprint: str,
        drawing: dict[str, Any],
    ) -> None:
        self.states = states
        self.unread = unread
        self.fingerprint = fingerprint
        self.drawing = drawing

    def save(self, path: StrPath) -> None:
        """Writes a file, by `numpy.savez`.

        Args:
            path: The file. It gets no other suffix.
        """
        about = {"fingerprint": self.fingerprint, "drawing": self.drawing}
        text = json.dumps(about, default=lambda number: number.item())  # of NumPy
        arrays: Any = {f"state/{name}": x for name, x in self.states.items()}
        with open(path, "wb") as file:  # by whose name NumPy adds no suffix
            np.savez(file, about=np.array(text), unread=self.unread, **arrays)

    @classmethod
    def load(cls, path: StrPath) -> "SavedSession":
        """Returns what `save` wrote.

        Args:
            path: The file.

        Returns:
            The `SavedSession`.

        Raises:
            ValueError: if `save` did not write the file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            about, unread = json.loads(str(arrays.pop("about"))), arrays.pop("unread")
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"Argument `path` must be a file that `SavedSession.save` wrote. Received: {path}"
            ) from error
        states = {name.removeprefix("state/"): x for name, x in arrays.items()}
        return cls(states, unread, **about)

    def check(self, reader: TokenReader) -> None:
        """Checks that these are states of the model that a reader has.

        Args:
            reader: The `TokenReader` that is to go on with them.

        Raises:
            ValueError: if they are of another model.
        """
        if self.fingerprint != reader.fingerprint:
            raise ValueError(
                "A session goes on with the model that it was written with: the weights, the "
                "options of the layers and the names of the states must be the same. Received: "
                f"a session of the model {self.fingerprint[:12]}..., for the model "
                f"{reader.fingerprint[:12]}..."
            )
        for name, (shape, _) in reader.states.items():
            check_shape(f"saved.states['{name}']", self.states[name], (1, *shape))


class Session:
    """A sequence that a `Scheduler` writes. `Scheduler.submit` makes it.

    Attributes:
        status: `"waiting"` for a row, `"reading"` the prompt, `"writing"`, `"full"`
            while too many of its tokens have not been taken, `"ended"`.
        finish_reason: When it has ended, `"length"`, `"stop"` (at a stop token),
            `"cancelled"`, `"suspended"` or `"error"`; `None` before.
        error: The exception that ended it, or `None`.
        saved: When it has ended and was to be kept, a `SavedSession`; or `None`.
    """

    def __init__(
        self,
        drawing: Drawing,
        generator: np.random.Generator,
        left: int,
        unread: np.ndarray,
        states: dict[str, np.ndarray],
        keep: bool,
    ) -> None:
        self.status: str = "waiting"
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.saved: SavedSession | None = None
        self._drawing = drawing
        self._generator = generator
        self._left = left  # number of tokens to draw
        self._unread = unread
        self._states: Any = states  # arrays while it waits, tensors while it reads, then `None`
        self._keep = keep
        self._row: int | None = None
        self._tokens: deque[int] = deque()
        self._full_since = 0.0

    def take(self) -> list[int]:
        """Returns the tokens that were written since the last call.

        Another thread than that of `Scheduler.step` may call it.

        Returns:
            The list of tokens.
        """
        taken = []
        while self._tokens:
            taken.append(self._tokens.popleft())
        return taken

    def _add(self, token):
        """Takes in a token that was drawn. Returns the reason if it was the last."""
        self._tokens.append(token)
        self._unread = np.array([token], "int32")
        self._left -= 1
        if token in self._drawing.stops:
            return "stop"
        return None if self._left else "length"

    def _to_saved(self, fingerprint):
        drawing = {
            **dataclasses.asdict(self._drawing),
            "stop_tokens": self._drawing.stops,
            "left": self._left,
            "generator": self._generator.bit_generator.state,
        }
        return SavedSession(self._states, self._unread, fingerprint, drawing)


def resumed(saved, keep):
    """The session that goes on as the saved one would have."""
    options = dict(saved.drawing)
    left, state = options.pop("left"), options.pop("generator")
    drawing = Drawing(**options)
    (generator,) = drawing.generators(1)
    generator.bit_generator.state = state
    return Session(drawing, generator, left, saved.unread, saved.states, keep)
