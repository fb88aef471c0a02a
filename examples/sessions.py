"""Sessions of an exported language model, and the thread that steps many of them in one batch."""

from collections import deque
from collections.abc import Callable
import dataclasses
import queue
import threading
import time

import numpy as np
import tensorflow as tf

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_BATCH = 64  # sessions in one step
MAX_PIECE = 256  # tokens of a text read in one step, so that a long text does not hold up others


class LanguageModel:
    """A SavedModel from tokens to logits, as `keras_hla.export_saved_model` writes it."""

    def __init__(self, path, characters):
        self._loaded = tf.saved_model.load(path)  # the signatures do not keep it alive
        signatures = self._loaded.signatures
        missing = {"initial_state", "step", "step_masked"} - set(signatures)
        if missing:
            raise ValueError(f"the SavedModel must have signatures for streams, it lacks {missing}")
        self._step, self._step_masked = signatures["step"], signatures["step_masked"]
        states = signatures["initial_state"](batch_size=tf.constant(1))
        self.initial_state = {name: x.numpy() for name, x in states.items()}
        inputs = set(self._step.structured_input_signature[1]) - set(states)
        outputs = set(self._step.structured_outputs) - set(states)
        if inputs != {"tokens"} or outputs != {"logits"}:
            raise ValueError(
                "the SavedModel must have input 'tokens' and output 'logits', "
                f"it has {sorted(inputs)} and {sorted(outputs)}"
            )
        size = self._step.structured_outputs["logits"].shape[-1]
        if len(characters) != size:
            raise ValueError(f"{len(characters)} characters for logits of {size} tokens")
        self.characters = characters
        self._index = {character: i for i, character in enumerate(characters)}

    def encode(self, text):
        """Returns the tokens of a text. Characters that are no token become the replacement."""
        unknown = set(text) - set(self._index)
        if unknown and REPLACEMENT not in self._index:
            raise ValueError(f"characters that the model does not know: {sorted(unknown)[:10]}")
        default = self._index.get(REPLACEMENT)
        return [self._index.get(character, default) for character in text]

    def step(self, pieces, states):
        """Reads a piece of tokens in each session.

        Args:
            pieces: List of lists of tokens.
            states: For each session the states before its piece, arrays of batch size 1.

        Returns:
            For each session the logits after the piece, and the states after it.
        """
        lengths = np.array([len(piece) for piece in pieces])
        tokens = np.zeros((len(pieces), lengths.max()), "int32")
        mask = np.arange(lengths.max()) < lengths[:, None]
        tokens[mask] = np.concatenate(pieces)
        inputs = {name: np.concatenate([s[name] for s in states]) for name in self.initial_state}
        inputs["tokens"] = tokens
        function = self._step
        if not mask.all():
            inputs["mask"], function = mask, self._step_masked
        outputs = function(**{name: tf.constant(x) for name, x in inputs.items()})
        outputs = {name: x.numpy() for name, x in outputs.items()}
        rows = range(len(pieces))
        logits = outputs.pop("logits")[rows, lengths - 1]
        # Copies, since a slice would keep the arrays of the whole batch.
        return logits, [{name: x[i : i + 1].copy() for name, x in outputs.items()} for i in rows]


@dataclasses.dataclass(eq=False)
class Session:
    """What the model knows of one text: states, and the tokens that they do not yet include."""

    states: dict[str, np.ndarray]
    unread: list[int] = dataclasses.field(default_factory=list)
    busy: bool = False  # the batcher has it
    ended: bool = False
    used: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass(eq=False)
class Request:
    """Characters to write in a session.

    `emit` is called from the batcher's thread with `{"text": character}` for each,
    and at last with `{"done": True}` or `{"error": message}`.
    """

    session: Session
    length: int
    temperature: float
    random: np.random.Generator
    emit: Callable[[dict], None]
    cancelled: bool = False  # by the client's thread
    ended: bool = False

    def end(self, error=None):
        """Gives the session back: a failed one as ended, since its states cannot be trusted."""
        self.ended = True
        self.session.ended |= error is not None
        self.session.used = time.monotonic()
        self.session.busy = False  # before the client hears of it, who may go on at once
        self.emit({"error": error} if error else {"done": True})

    def sample(self, logits):
        if self.temperature == 0:
            return int(np.argmax(logits))
        # The largest of logits with Gumbel noise is a sample of their softmax.
        noise = self.random.gumbel(size=logits.shape)
        return int(np.argmax((logits - logits.max()) / self.temperature + noise))


class Batcher:
    """A thread that steps all sessions with something to read or to write together.

    A session takes one step per turn, new requests join between turns. At most
    `MAX_BATCH` sessions are in a turn, the others come first in the next.
    """

    def __init__(self, model):
        self.model = model
        self._new = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, request):
        """Starts a request. Its session is the batcher's until `request.end`."""
        request.session.busy = True
        self._new.put(request)

    def close(self):
        """Ends all requests, and the thread."""
        self._new.put(None)
        self._thread.join()

    def _run(self):
        waiting = deque()
        while True:
            while not waiting or not self._new.empty():
                request = self._new.get()
                if request is None:
                    for other in waiting:
                        other.end("the server stops")
                    return
                waiting.append(request)
            turn = [waiting.popleft() for _ in range(min(len(waiting), MAX_BATCH))]
            for request in turn:
                if request.session.ended:
                    request.end("the session was ended")
                elif request.cancelled:
                    request.end()
            # An ended request's session may be in another one already: it is not looked at again.
            turn = [request for request in turn if not request.ended]
            # Single tokens apart from texts, to whose length they would be padded.
            texts = [request for request in turn if len(request.session.unread) > 1]
            self._step([request for request in turn if request not in texts])
            self._step(texts)
            waiting.extend(request for request in turn if not request.ended)

    def _step(self, requests):
        if not requests:
            return
        pieces = [request.session.unread[:MAX_PIECE] for request in requests]
        try:
            results = self.model.step(pieces, [request.session.states for request in requests])
        except Exception as error:
            if len(requests) == 1:
                requests[0].end(f"the step failed ({type(error).__name__}); start a new session")
                return
            for request in requests:  # each alone, so that only those fail that are at fault
                self._step([request])
            return
        for request, piece, logits, states in zip(requests, pieces, *results, strict=True):
            self._take(request, len(piece), logits, states)

    def _take(self, request, count, logits, states):
        """Takes in the result of a step, and writes a character if all is read."""
        if not np.isfinite(logits).all():
            request.end("the model's output is not finite; start a new session")
            return
        session = request.session
        session.states = states
        del session.unread[:count]
        if session.unread:
            return
        token = request.sample(logits)
        session.unread = [token]  # read with the next step, maybe of the next request
        request.length -= 1
        request.emit({"text": self.model.characters[token]})
        if request.length == 0:
            request.end()
