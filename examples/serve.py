"""Serves a character model over HTTP: a page to write with, and completions as OpenAI has them.

    python serve.py char_lm_output/saved_model --characters char_lm_output/characters.json

The model is a SavedModel, which TensorFlow runs, or a `.keras` file, which the
backend of Keras does (`KERAS_BACKEND`), on a GPU if there is one. Many clients
share each step of the model. A browser finds a page to write with at the address
that is shown. For programs:

    POST   /v1/completions      as OpenAI's, also with "stream": true
    GET    /v1/models

    POST   /sessions            -> {"id": ID}
    POST   /sessions/ID/text    {"text": ..., "length": 200, "temperature": 0.8, "seed": null}
    DELETE /sessions/ID

The answer to a text comes as server-sent events while the model writes:
`data: {"text": "a"}` for each character, then `data: {"done": true}` or
`data: {"error": ...}`. The session keeps the model's state, of constant size, so
that the next text goes on after this one and what was written to it. Temperature 0
takes the most likely character each time. With `--store FOLDER` sessions are in
files, too, and go on after a restart.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Annotated

# What TensorFlow has to say about devices, and about gradients, which serving does without.
logging.getLogger("absl").setLevel("ERROR")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import completions  # noqa: E402
from fastapi import Depends, FastAPI, HTTPException, Request  # noqa: E402
from fastapi.responses import FileResponse, StreamingResponse  # noqa: E402
import keras  # noqa: E402
import pydantic  # noqa: E402
import sessions  # noqa: E402
import uvicorn  # noqa: E402

from keras_hla.export import SavedModelReader  # noqa: E402
from keras_hla.streaming import (  # noqa: E402
    ModelReader,
    Scheduler,
    SchedulerFullError,
    SchedulerThread,
)

MAX_TEXT = 20_000  # characters in one request
MAX_LENGTH = 5_000
MAX_BODY = 12 * MAX_TEXT + 1_000  # bytes: JSON may write a character as two escapes
PATIENCE = 60  # seconds for which a client may take nothing of what is written for it
UNKNOWN = "unknown or expired session; start a new one"


class Wish(pydantic.BaseModel):
    """What a client asks for: the body of a request for text."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    text: str = pydantic.Field(min_length=1, max_length=MAX_TEXT)
    length: int = pydantic.Field(default=200, ge=1, le=MAX_LENGTH)
    temperature: float = pydantic.Field(default=0.8, ge=0, le=100, allow_inf_nan=False)
    seed: int | None = pydantic.Field(default=None, ge=0, lt=2**64)


async def read_wish(request: Request) -> Wish:
    body = await completions.read_body(request, MAX_BODY)
    if body is None:
        raise HTTPException(413, f"the request is longer than {MAX_BODY} bytes")
    try:
        return Wish.model_validate_json(body)
    except pydantic.ValidationError as error:
        # Without the input, which may be long, or not even be text that JSON can hold.
        faults = (f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors())
        raise HTTPException(422, "; ".join(faults)) from None


def make_app(scheduler, characters, known, name):
    @contextlib.asynccontextmanager
    async def lifespan(_):
        yield
        await asyncio.to_thread(scheduler.close)  # which saves the sessions that write
        known.store()

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_exception_handler(completions.ApiError, completions.answer_error)
    app.include_router(completions.make_router(scheduler, characters, name))

    @app.get("/")
    async def page():
        return FileResponse(Path(__file__).with_name("serve.html"))

    @app.post("/sessions", status_code=201)
    async def start():
        key = known.start()
        if key is None:
            raise HTTPException(503, f"all {known.limit} sessions are in use; try again later")
        return {"id": key}

    def get(key):
        conversation = known.get(key)
        if conversation is None:
            raise HTTPException(404, UNKNOWN)
        return conversation

    @app.delete("/sessions/{key}", status_code=204)
    async def end(key: str):
        get(key)
        known.end(key)

    @app.post("/sessions/{key}/text")
    async def write(key: str, wish: Annotated[Wish, Depends(read_wish)]):
        conversation = get(key)
        if conversation.busy:
            raise HTTPException(409, "the session is in use; wait until it has answered")
        after = conversation.saved()
        if conversation.ended:
            raise HTTPException(404, UNKNOWN)
        conversation.held = True
        try:
            stream = await asyncio.to_thread(submit, wish, after)
            conversation.go_on(stream.session)
        except ValueError as error:
            raise HTTPException(422, f"text: {error}") from None
        except SchedulerFullError as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from None
        finally:
            conversation.held = False
        answer = events(conversation, stream, characters)
        return StreamingResponse(answer, media_type="text/event-stream")

    def submit(wish, after):
        options = {"temperature": wish.temperature, "seed": wish.seed, "after": after}
        tokens = characters.encode(wish.text)
        return scheduler.submit(tokens, wish.length, keep=True, **options)

    return app


async def events(conversation, stream, characters):
    """The answer to a text, as server-sent events."""
    conversation.held = True  # until it is stored
    try:
        async for token in stream:
            if conversation.ended:
                break
            yield completions.event({"text": characters.decode(token)})
        if conversation.ended:
            last = {"error": "the session was ended"}
        elif stream.session.finish_reason == "cancelled":
            last = {"error": "the server stops, or waited too long for you"}
        else:
            await asyncio.to_thread(conversation.store)
            last = {"done": True}
    except RuntimeError as error:
        last = {"error": f"the model failed: {error.__cause__}; start a new session"}
    finally:
        stream.cancel()  # if the client went away before the end
        conversation.held = False
    yield completions.event(last)


def read_characters(path):
    characters = json.loads(path.read_text(encoding="utf-8"))
    fits = isinstance(characters, list) and all(
        isinstance(character, str) and len(character) == 1 for character in characters
    )
    if not fits or len(set(characters)) < len(characters):
        raise ValueError("--characters must be a JSON list of different characters")
    return characters


def read_model(path):
    """What reads the tokens: a Keras model, or what TensorFlow runs without Keras."""
    if path.suffix != ".keras":
        return SavedModelReader(path)
    return ModelReader(keras.saving.load_model(path, compile=False))


def compile_steps(scheduler):
    """Has the scheduler do all that it ever does, before clients wait for it."""
    scheduler.submit([0, 0], 1)
    while scheduler.busy:
        scheduler.step()


def main():
    parser = argparse.ArgumentParser(
        description="Serve a character model over HTTP.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, help="folder that keras_hla.export_saved_model wrote, or .keras file")
    add("--characters", type=Path, required=True, help="JSON list: each token's character")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port to listen on")
    add("--rows", type=int, default=32, help="number of texts that are written in one step")
    add("--waiting", type=int, default=256, help="largest number of texts that wait for that")
    add("--expire", type=float, default=600, help="seconds after which an unused session ends")
    add("--sessions", type=int, default=256, help="largest number of sessions at a time")
    add("--store", type=Path, help="folder to store sessions in, for after a restart")
    arguments = parser.parse_args()
    try:
        reader = read_model(arguments.model)
        characters = read_characters(arguments.characters)
        characters = sessions.Characters(characters, reader.vocabulary_size)
        scheduler = Scheduler(
            reader, arguments.rows, max_waiting=arguments.waiting, patience=PATIENCE
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    compile_steps(scheduler)
    address = f"http://{arguments.host}:{arguments.port}"
    print(f"Serving {arguments.model} at {address}. Stop with Ctrl+C.", flush=True)
    known = sessions.Conversations(arguments.sessions, arguments.expire, arguments.store, reader)
    uvicorn.run(
        make_app(SchedulerThread(scheduler), characters, known, arguments.model.stem),
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        timeout_graceful_shutdown=2,
    )


if __name__ == "__main__":
    main()
