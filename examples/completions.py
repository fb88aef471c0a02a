"""`/v1/completions` and `/v1/models`, as clients of language models know them from OpenAI."""

import asyncio
from collections.abc import AsyncIterator
import json
import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
import pydantic

from keras_hla.streaming import SchedulerFullError

MAX_PROMPT = 20_000  # characters or tokens
MAX_TOKENS = 5_000
MAX_BODY = 12 * MAX_PROMPT + 10_000  # bytes: JSON may write a character as two escapes

Stop = Annotated[str, pydantic.Field(min_length=1, max_length=100)]
Prompt = Annotated[str, pydantic.Field(min_length=1, max_length=MAX_PROMPT)]
Tokens = Annotated[list[int], pydantic.Field(min_length=1, max_length=MAX_PROMPT)]

Zero = Annotated[float, pydantic.Field(ge=0, le=0)]


class StreamOptions(pydantic.BaseModel):
    include_usage: bool = False


class Wish(pydantic.BaseModel):
    """The body of a request. What the server cannot do is accepted where it asks for nothing."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    model: str
    prompt: Prompt | Tokens
    max_tokens: int = pydantic.Field(default=16, ge=1, le=MAX_TOKENS)
    temperature: float = pydantic.Field(default=1, ge=0, le=100, allow_inf_nan=False)
    top_p: float = pydantic.Field(default=1, gt=0, le=1)
    seed: int | None = pydantic.Field(default=None, ge=0, lt=2**64)
    stop: Stop | Annotated[list[Stop], pydantic.Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    n: Literal[1] | None = 1
    best_of: Literal[1] | None = 1
    echo: Literal[False] | None = False
    logprobs: None = None
    logit_bias: Annotated[dict[str, Any], pydantic.Field(max_length=0)] | None = None
    presence_penalty: Zero | None = 0
    frequency_penalty: Zero | None = 0
    suffix: None = None


class ApiError(Exception):
    """An error, which the client gets as OpenAI's have it."""

    def __init__(self, status, message, kind="invalid_request_error", param=None, code=None):
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


FULL = ApiError(
    429, "too many requests wait; try again later", "rate_limit_error", code="rate_limit_exceeded"
)


async def answer_error(_, error):
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body, error.status, headers)


async def read_body(request, limit):
    """Returns the body of a request, or `None` if it is longer than the limit."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            return None
    return body


async def read_wish(request):
    body = await read_body(request, MAX_BODY)
    if body is None:
        raise ApiError(413, f"the request is longer than {MAX_BODY} bytes")
    try:
        return Wish.model_validate_json(body)
    except pydantic.ValidationError as error:
        # Without the input, which may be long, or not even be text that JSON can hold.
        fault = error.errors()[0]
        param = str(fault["loc"][0]) if fault["loc"] else None
        raise ApiError(400, f"{param or 'body'}: {fault['msg']}", param=param) from None


async def until_stop(texts: AsyncIterator[str], stops: list[str]) -> AsyncIterator[str | None]:
    """Yields texts up to the first stop string, and `None` at last if there was one.

    The end of a text that may be the beginning of a stop string is held back.
    """
    held = ""
    async for text in texts:
        held += text
        places = [place for stop in stops if (place := held.find(stop)) >= 0]
        if places:
            yield held[: min(places)]
            yield None
            return
        begun = (n for s in stops for n in range(1, len(s)) if held.endswith(s[:n]))
        ready = len(held) - max(begun, default=0)
        yield held[:ready]
        held = held[ready:]
    yield held


class Completion:
    """The answer to a request, while it is written."""

    def __init__(self, wish, count, stream, decode):
        self._wish = wish
        self._prompt_tokens = count
        self._stream = stream
        self._decode = decode
        self._completion_tokens = 0
        self._about = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
        self._about |= {"created": int(time.time()), "model": wish.model}

    async def texts(self):
        """Yields pairs of a text and the reason why it is the last, or `None`."""
        reason, stops = "length", self._wish.stop or []
        stops = [stops] if isinstance(stops, str) else stops
        try:
            async for text in until_stop(self._decoded(), stops):
                if text is None:
                    reason = "stop"
                else:
                    yield text, None
        except RuntimeError as error:
            raise ApiError(500, f"the model failed: {error.__cause__}", "server_error") from None
        finally:
            self._stream.cancel()  # at a stop string, or if the client has gone
        if self._stream.session.finish_reason == "cancelled" and reason == "length":
            raise ApiError(503, "the server stops, or waited too long for you", "server_error")
        yield "", reason

    async def _decoded(self):
        async for token in self._stream:
            self._completion_tokens += 1
            yield self._decode(token)

    def body(self, text, reason):
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}
        return self._about | {"choices": [choice]}

    def usage(self):
        counts = self._prompt_tokens, self._completion_tokens
        names = "prompt_tokens", "completion_tokens", "total_tokens"
        return {"usage": dict(zip(names, (*counts, sum(counts)), strict=True))}

    async def events(self):
        """The answer as server-sent events."""
        try:
            async for text, reason in self.texts():
                if text or reason:
                    yield event(self.body(text, reason))
            options = self._wish.stream_options
            if options is not None and options.include_usage:
                yield event(self._about | {"choices": []} | self.usage())
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield event(error.body)

    async def whole(self, request):
        """The answer in one, or `None` if the client goes away before."""
        written, last = "", None
        async for text, reason in self.texts():
            if await request.is_disconnected():
                return None
            written, last = written + text, reason
        return self.body(written, last) | self.usage()


def event(body):
    return f"data: {json.dumps(body)}\n\n"


def make_router(scheduler, characters, name):
    router = APIRouter(prefix="/v1")
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "keras_hla"}

    def check_name(received):
        if received != name:
            message = f"the model '{received}' does not exist; there is '{name}'"
            raise ApiError(404, message, param="model", code="model_not_found")

    @router.get("/models")
    async def models():
        return {"object": "list", "data": [model]}

    @router.get("/models/{received}")
    async def one_model(received: str):
        check_name(received)
        return model

    @router.post("/completions")
    async def complete(request: Request):
        wish = await read_wish(request)
        check_name(wish.model)
        try:
            tokens = wish.prompt
            tokens = characters.encode(tokens) if isinstance(tokens, str) else tokens
            options = {"temperature": wish.temperature, "seed": wish.seed}
            options["top_p"] = None if wish.top_p == 1 else wish.top_p
            stream = await asyncio.to_thread(scheduler.submit, tokens, wish.max_tokens, **options)
        except ValueError as error:
            raise ApiError(400, f"prompt: {str(error)[:200]}", param="prompt") from None
        except SchedulerFullError:
            raise FULL from None
        completion = Completion(wish, len(tokens), stream, characters.decode)
        if wish.stream:
            return StreamingResponse(completion.events(), media_type="text/event-stream")
        return await completion.whole(request)

    return router
