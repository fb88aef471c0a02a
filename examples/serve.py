"""Serves an exported character model over HTTP, with TensorFlow alone: no Keras, no keras_hla.

    python serve.py char_lm_output/saved_model --characters char_lm_output/characters.json

A browser finds a page to write with at the address that is shown. For programs:

    POST   /sessions            -> {"id": ID}
    POST   /sessions/ID/text    {"text": ..., "length": 200, "temperature": 0.8, "seed": null}
    DELETE /sessions/ID

The answer to a text comes as server-sent events while the model writes:
`data: {"text": "a"}` for each character, then `data: {"done": true}` or
`data: {"error": ...}`. The session keeps the model's state, of constant size, so
that the next text goes on after this one and what was written to it. Temperature 0
takes the most likely character each time.

Export under TensorFlow: what JAX exports is compiled for each new number of
sessions in a step and length of a text, while all sessions wait.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
from pathlib import Path
import secrets
import sys
import time
from typing import Annotated

# What TensorFlow has to say about devices, and about gradients, which serving does without.
logging.getLogger("absl").setLevel("ERROR")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# To import any of these is an error from here on.
sys.modules.update(dict.fromkeys(("keras", "tf_keras", "keras_hla")))

from fastapi import Depends, FastAPI, HTTPException, Request  # noqa: E402
from fastapi.responses import FileResponse, StreamingResponse  # noqa: E402
import numpy as np  # noqa: E402
import pydantic  # noqa: E402
import sessions  # noqa: E402
import uvicorn  # noqa: E402

MAX_TEXT = 20_000  # characters in one request
MAX_LENGTH = 5_000
MAX_BODY = 12 * MAX_TEXT + 1_000  # bytes: JSON may write a character as two escapes
UNKNOWN = "unknown or expired session; start a new one"


class Wish(pydantic.BaseModel):
    """What a client asks for: the body of a request for text."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    text: str = pydantic.Field(min_length=1, max_length=MAX_TEXT)
    length: int = pydantic.Field(default=200, ge=1, le=MAX_LENGTH)
    temperature: float = pydantic.Field(default=0.8, ge=0, le=100, allow_inf_nan=False)
    seed: int | None = pydantic.Field(default=None, ge=0, lt=2**64)


async def read_wish(request: Request) -> Wish:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"the request is longer than {MAX_BODY} bytes")
    try:
        return Wish.model_validate_json(body)
    except pydantic.ValidationError as error:
        # Without the input, which may be long, or not even be text that JSON can hold.
        faults = (f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors())
        raise HTTPException(422, "; ".join(faults)) from None


class Sessions:
    """The sessions by their ids. Those unused for `expire` seconds are forgotten."""

    def __init__(self, limit, expire):
        self.limit = limit
        self.expire = expire
        self._sessions: dict[str, sessions.Session] = {}

    def add(self, session):
        self._sweep()
        if len(self._sessions) >= self.limit:
            raise HTTPException(503, f"all {self.limit} sessions are in use; try again later")
        key = secrets.token_urlsafe(16)
        self._sessions[key] = session
        return key

    def get(self, key):
        self._sweep()
        if key not in self._sessions:
            raise HTTPException(404, UNKNOWN)
        return self._sessions[key]

    def remove(self, key):
        self.get(key).ended = True
        self._sweep()

    def _sweep(self):
        oldest = time.monotonic() - self.expire
        self._sessions = {
            key: session
            for key, session in self._sessions.items()
            if not session.ended and (session.busy or session.used > oldest)
        }


def make_app(model, limit, expire):
    batcher = sessions.Batcher(model)
    known = Sessions(limit, expire)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        yield
        batcher.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.get("/")
    async def page():
        return FileResponse(Path(__file__).with_name("serve.html"))

    @app.post("/sessions", status_code=201)
    async def start():
        return {"id": known.add(sessions.Session(model.initial_state))}

    @app.delete("/sessions/{key}", status_code=204)
    async def end(key: str):
        known.remove(key)

    @app.post("/sessions/{key}/text")
    async def write(key: str, wish: Annotated[Wish, Depends(read_wish)]):
        session = known.get(key)
        if session.busy:
            raise HTTPException(409, "the session is in use; wait until it has answered")
        try:
            session.unread += model.encode(wish.text)
        except ValueError as error:
            raise HTTPException(422, f"text: {error}") from None
        events: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()
        request = sessions.Request(
            session,
            wish.length,
            wish.temperature,
            np.random.default_rng(wish.seed),
            emit=lambda event: loop.call_soon_threadsafe(events.put_nowait, event),
        )
        batcher.submit(request)
        return StreamingResponse(stream(request, events), media_type="text/event-stream")

    return app


async def stream(request, events):
    try:
        event = {"text": ""}
        while "text" in event:
            event = await events.get()
            yield f"data: {json.dumps(event)}\n\n"
    finally:
        request.cancelled = True  # if the client went away before the end


def read_characters(path):
    characters = json.loads(path.read_text(encoding="utf-8"))
    fits = isinstance(characters, list) and all(
        isinstance(character, str) and len(character) == 1 for character in characters
    )
    if not fits or len(set(characters)) < len(characters):
        raise ValueError("--characters must be a JSON list of different characters")
    return characters


def main():
    parser = argparse.ArgumentParser(
        description="Serve an exported character model over HTTP.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("saved_model", type=Path, help="folder that keras_hla.export_saved_model wrote")
    add("--characters", type=Path, required=True, help="JSON list: each token's character")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port to listen on")
    add("--expire", type=float, default=600, help="seconds after which an unused session ends")
    add("--sessions", type=int, default=256, help="largest number of sessions at a time")
    arguments = parser.parse_args()
    try:
        characters = read_characters(arguments.characters)
        model = sessions.LanguageModel(str(arguments.saved_model), characters)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    app = make_app(model, arguments.sessions, arguments.expire)
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        timeout_graceful_shutdown=2,
    )


if __name__ == "__main__":
    main()
