"""A thread that steps a scheduler, and the streams of tokens by which others read from it."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
import contextlib
import queue
import threading
from typing import Any
import weakref

from keras_hla.streaming.scheduler import Scheduler
from keras_hla.streaming.session import SavedSession, Session

_END = object()
_IDLE = 0.5  # seconds between looks at whose patience has ended, where nothing else is to do


class SchedulerThread:
    """Steps a `Scheduler` in a new thread, for callers in any thread and in asyncio.

    Args:
        scheduler: The scheduler, which nobody else may call from now on.

    Example:

    ```python
    with keras_hla.streaming.SchedulerThread(Scheduler(model, rows=16)) as scheduler:
        for token in scheduler.submit(prompt, max_new_tokens=100, seed=0):
            print(token)
    ```
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._news: dict[Session, _News] = {}
        self._closed = False
        # Of `_closed`, and so of `_commands`. Whoever holds it may collect a stream meanwhile.
        self._lock = threading.RLock()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def __enter__(self) -> "SchedulerThread":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, prompt: Any, max_new_tokens: int, **options: Any) -> "TokenStream":
        """Adds a session.

        Args:
            prompt: Sequence of integers, not empty.
            max_new_tokens: As in `Scheduler.submit`.
            **options: The other arguments of `Scheduler.submit`.

        Returns:
            The stream of the tokens that the session writes.

        Raises:
            ValueError: if an argument is not among its allowed values.
            SchedulerFullError: if too many sessions wait.
            RuntimeError: if the thread is closed.
        """
        return self._add(lambda: self._scheduler.submit(prompt, max_new_tokens, **options))

    def resume(self, saved: SavedSession, keep: bool = False) -> "TokenStream":
        """Adds a session that was suspended, as `Scheduler.resume` does.

        Args:
            saved: What `suspend` returned, maybe in another process.
            keep: As in `Scheduler.submit`.

        Returns:
            The stream of the tokens that the session writes from now on.

        Raises:
            ValueError: if it is of another model, or had written all its tokens.
            SchedulerFullError: if too many sessions wait.
            RuntimeError: if the thread is closed.
        """
        return self._add(lambda: self._scheduler.resume(saved, keep))

    def close(self) -> None:
        """Cancels all sessions, and ends the thread."""
        with self._lock:
            if not self._closed:
                self._commands.put(None)
                self._closed = True
        self._thread.join()

    def _add(self, submit):
        def add():
            session = submit()
            self._news[session] = _News()
            return session, self._news[session]

        return TokenStream(self, *self._call(add).result())

    def _call(self, function: Callable[[], Any]) -> Future:
        """Has the thread call a function, between two steps."""
        future: Future = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("The scheduler is closed.")
            self._commands.put((future, function))
        return future

    def _tell(self, function):
        """As `_call`, where it does not matter whether there is still a thread."""
        with contextlib.suppress(RuntimeError):
            self._call(function)

    def _cancel(self, session):
        if session.status != "ended":
            self._tell(lambda: self._end(session, self._scheduler.cancel))

    def _end(self, session, end):
        result = end(session)
        self._publish([session])
        return result

    def _run(self):
        try:
            while self._follow_commands():
                self._publish(self._scheduler.step())
        finally:
            with self._lock:
                self._closed = True
            while not self._commands.empty():
                if command := self._commands.get():
                    command[0].set_exception(RuntimeError("The scheduler is closed."))
            for session in list(self._news):
                try:
                    self._end(session, self._scheduler.cancel)
                except Exception as error:  # where it has no states any more
                    session.error, session.status = error, "ended"
                    self._publish([session])

    def _follow_commands(self):
        """Calls what others have asked for. Returns whether to go on."""
        with contextlib.suppress(queue.Empty):
            while command := self._commands.get(timeout=0 if self._scheduler.busy else _IDLE):
                future, function = command
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
            return False
        return True

    def _publish(self, sessions):
        for session in sessions:
            news = self._news.get(session)
            if session.status == "ended":
                self._news.pop(session, None)
            if news:
                news.publish()


class TokenStream:
    """The tokens of a session, as they are written: an iterator, and one for `async for`.

    A session whose stream nobody holds any more is cancelled.

    Attributes:
        session: The `Session`, of which `finish_reason` and `saved` tell how it has
            ended, and what there is of it.
    """

    def __init__(self, thread: SchedulerThread, session: Session, news: "_News") -> None:
        self.session = session
        self._thread = thread
        self._news = news
        self._tokens: deque[int] = deque()
        weakref.finalize(self, thread._cancel, session).atexit = False

    def cancel(self) -> None:
        """Ends the session. What it has written can still be read."""
        self._thread._cancel(self.session)

    def suspend(self) -> SavedSession:
        """Ends the session, and returns what `resume` needs to go on with it.

        Returns:
            The `SavedSession`.

        Raises:
            ValueError: if the session has ended.
            RuntimeError: if the thread is closed.
        """
        thread = self._thread
        end = thread._scheduler.suspend
        return thread._call(lambda: thread._end(self.session, end)).result()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        while True:
            self._news.event.clear()
            if (token := self._token()) is _END:
                raise StopIteration
            if token is not None:
                return token
            self._news.event.wait()

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        event = self._news.async_event()
        while True:
            event.clear()
            if (token := self._token()) is _END:
                raise StopAsyncIteration
            if token is not None:
                return token
            await event.wait()

    def _token(self):
        """The next token, `None` if there is none yet, or `_END`."""
        ended = self.session.status == "ended"  # before its last tokens are taken
        if not self._tokens:
            self._tokens.extend(self.session.take())
            if self._tokens and self.session.status == "full":
                self._thread._tell(lambda: None)  # wakes the thread, as there is room now
        if self._tokens:
            return self._tokens.popleft()
        if ended and self.session.error is not None:
            raise RuntimeError("The session has failed.") from self.session.error
        return _END if ended else None


class _News:
    """What a consumer waits for: in its thread, or in its event loop of asyncio."""

    def __init__(self):
        self.event = threading.Event()
        self._async = None  # the loop, and an event there

    def async_event(self):
        loop = asyncio.get_running_loop()
        if self._async is None or self._async[0] is not loop:
            self._async = loop, asyncio.Event()
        return self._async[1]

    def publish(self):
        self.event.set()
        if self._async is not None:
            loop, event = self._async
            with contextlib.suppress(RuntimeError):  # if the loop is closed
                loop.call_soon_threadsafe(event.set)
