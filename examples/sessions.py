"""What a server keeps of its clients' texts: in memory, and in files for after a restart."""

import contextlib
import os
import secrets
import time

from keras_hla.streaming import SavedSession

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Characters:
    """The characters that are the tokens of a model."""

    def __init__(self, characters, size):
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

    def decode(self, token):
        return self.characters[token]


class Conversation:
    """A text that goes on from request to request.

    Args:
        reader: what reads the tokens.
        path: file to store it in, or `None`.
        used: time of the last request.
    """

    def __init__(self, reader, path, used):
        self._reader = reader
        self._path = path
        self._used = used
        self._session = None  # that writes, or has written last
        self._saved = None
        self._stored = path is not None and path.exists()
        self.held = False  # by a request
        self.ended = False

    @property
    def busy(self):
        return self.held or (self._session is not None and self._session.status != "ended")

    @property
    def used(self):
        if self.busy:
            self._used = time.time()
        return self._used

    def go_on(self, session):
        """A session now writes in it."""
        self._session, self._stored, self._used = session, False, time.time()

    def saved(self):
        """What to go on with: a `SavedSession`, or `None` at the beginning or if it has ended."""
        session = self._session
        if session is not None and session.status == "ended":
            self.ended |= session.error is not None  # nobody knows what its states are
            self._saved, self._session = session.saved, None
        elif self._saved is None and self._stored:
            try:
                self._saved = SavedSession.load(self._path)
                self._saved.check(self._reader)
            except (OSError, ValueError):  # a broken file, or one of another model
                self._saved, self.ended = None, True
        return self._saved

    def store(self):
        """Writes the file, unless it is there: at once or not at all."""
        if self._path is None or self._stored or self.ended:
            return
        saved = self.saved()
        if saved is not None and self._session is None:  # or the next one is on its way
            new = self._path.with_suffix(".new")
            saved.save(new)
            os.replace(new, self._path)
            self._stored = True

    def forget(self):
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class Conversations:
    """The conversations by their ids. Those unused for `expire` seconds are forgotten.

    Args:
        limit: largest number of them.
        expire: number of seconds.
        folder: where they are stored, and those of the server before; or `None`.
        reader: what reads their tokens.
    """

    def __init__(self, limit, expire, folder, reader):
        self.limit = limit
        self.expire = expire
        self._folder = folder
        self._reader = reader
        self._conversations: dict[str, Conversation] = {}
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.glob("*.session"):
                used = path.stat().st_mtime
                self._conversations[path.stem] = Conversation(reader, path, used)

    def start(self):
        """Returns the id of a new one, or `None` if there are too many."""
        self._sweep()
        if len(self._conversations) >= self.limit:
            return None
        key = secrets.token_hex(16)
        path = self._folder and self._folder / f"{key}.session"
        self._conversations[key] = Conversation(self._reader, path, time.time())
        return key

    def get(self, key):
        """Returns a conversation, or `None`."""
        self._sweep()
        return self._conversations.get(key)

    def end(self, key):
        self._conversations[key].ended = True
        self._sweep()

    def store(self):
        for conversation in self._conversations.values():
            with contextlib.suppress(OSError):  # of one that the others do not have, maybe
                conversation.store()

    def _sweep(self):
        oldest = time.time() - self.expire
        for key, conversation in list(self._conversations.items()):
            if conversation.ended or conversation.used < oldest:
                del self._conversations[key]
                conversation.forget()
