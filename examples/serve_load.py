"""Many clients at a time write with a server that this script starts, and check each answer.

    python serve_load.py char_lm_output/saved_model --characters char_lm_output/characters.json

Each client holds conversations of two texts in a session and must receive what a
session gave that had the server to itself. With `--restart` the server is
killed and started again in the middle: then the clients must see clear errors, and
still no wrong text. The exit status is 0 if all is so.
"""

import argparse
import asyncio
from collections import Counter
import contextlib
import json
from pathlib import Path
import socket
import subprocess
import sys
import time

import httpx
import numpy as np

CONVERSATIONS = 10  # different ones
UNKNOWN = "unknown or expired session"


class RequestError(Exception):
    """A request that got no whole answer, and why."""


class Server:
    """A server on a free port of this computer. What it has to say goes to this one's output."""

    def __init__(self, arguments):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        serve = Path(__file__).with_name("serve.py")
        self.command = [sys.executable, serve, arguments.saved_model, "--port", str(port)]
        self.command += ["--characters", arguments.characters]
        self.command += ["--sessions", str(2 * arguments.clients)]

    def start(self):
        self.process = subprocess.Popen(self.command)

    def kill(self):
        self.process.kill()
        self.process.wait()

    async def ready(self, client):
        while self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                await client.get("/")
                return
            await asyncio.sleep(0.1)
        sys.exit("The server has stopped.")


async def send(client, method, path, wish=None):
    """Returns the server's answer to a request: parsed, or for a text the text."""
    try:
        async with client.stream(method, path, json=wish) as response:
            if wish is None or response.status_code >= 400:
                answer = json.loads(await response.aread() or "null")
                if response.status_code >= 400:
                    raise RequestError(f"{response.status_code} {answer['detail']}")
                return answer
            text = ""
            async for line in response.aiter_lines():
                event = json.loads(line.removeprefix("data: ") or "{}")
                if "done" in event:
                    return text
                if "error" in event:
                    raise RequestError(event["error"])
                text += event.get("text", "")
            raise RequestError("the answer ended early")
    except httpx.TransportError as error:
        raise RequestError(f"connection: {type(error).__name__}") from None


async def start(client):
    return (await send(client, "POST", "/sessions"))["id"]


async def write(client, key, wish):
    return await send(client, "POST", f"/sessions/{key}/text", wish)


def conversation(number, length):
    """The two requests of a conversation, of a length of their own."""
    seeds = 2 * number, 2 * number + 1
    texts = f"def f_{number}(" * (1 + number % 4), f"\n# {number}\n"
    length = length * (5 + number) // CONVERSATIONS
    return [
        {"text": text, "length": length, "seed": seed}
        for text, seed in zip(texts, seeds, strict=True)
    ]


class Load:
    """Counts what the clients meet while `running`."""

    def __init__(self, client, wishes, expected):
        self.client = client
        self.wishes = wishes
        self.expected = expected
        self.running = True
        self.latencies = []
        self.characters = 0
        self.wrong = 0
        self.failures = Counter()

    async def request(self, key, number, part):
        begin = time.perf_counter()
        text = await write(self.client, key, self.wishes[number][part])
        self.latencies.append(time.perf_counter() - begin)
        self.characters += len(text)
        self.wrong += text != self.expected[number][part]

    async def run(self, number):
        """One client, who starts a new session only where the server asks for it."""
        key, part = None, 0
        while self.running:
            try:
                if key is None:
                    key, part = await start(self.client), 0
                await self.request(key, number, part)
                part += 1
                if part == 2:
                    await send(self.client, "DELETE", f"/sessions/{key}")
                    key = None
            except RequestError as error:
                self.failures[str(error)] += 1
                if UNKNOWN in str(error):
                    key = None
                else:
                    await asyncio.sleep(0.5)


async def measure(server, arguments):
    wishes = [conversation(n, arguments.length) for n in range(CONVERSATIONS)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        await server.ready(client)
        begin, expected = time.perf_counter(), []
        for pair in wishes:
            key = await start(client)
            expected.append([await write(client, key, wish) for wish in pair])
            await send(client, "DELETE", f"/sessions/{key}")
        rate = sum(len(text) for pair in expected for text in pair) / (time.perf_counter() - begin)
        print(f"One client alone: {rate:.0f} characters/s", flush=True)

        load = Load(client, wishes, expected)
        begin = time.perf_counter()
        clients = [
            asyncio.create_task(load.run(i % CONVERSATIONS)) for i in range(arguments.clients)
        ]
        await asyncio.sleep(arguments.seconds / 2)
        if arguments.restart:
            server.kill()
            server.start()
        await asyncio.sleep(arguments.seconds / 2)
        load.running = False
        await asyncio.gather(*clients)
        return load, time.perf_counter() - begin


def report(load, seconds, clients):
    failed = load.failures.total()
    print(f"{clients} clients, {seconds:.0f} seconds")
    print(f"  requests for text answered: {len(load.latencies)}")
    print(f"  wrong answers: {load.wrong}")
    print(f"  failed requests: {failed}")
    for reason, count in load.failures.most_common():
        print(f"    {count:5d} {reason}")
    if load.latencies:
        median, most = np.percentile(load.latencies, (50, 99))
        print(f"  latency of a whole answer: median {median:.2f} s, 99 % {most:.2f} s")
    print(f"  characters/s, all clients: {load.characters / seconds:.0f}")


def main():
    parser = argparse.ArgumentParser(
        description="Put load on a server of an exported character model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("saved_model", type=Path, help="folder that keras_hla.export_saved_model wrote")
    add("--characters", type=Path, required=True, help="JSON list: each token's character")
    add("--clients", type=int, default=50, help="number of clients at a time")
    add("--seconds", type=float, default=60, help="how long they send requests")
    add("--length", type=int, default=40, help="characters of an answer, on average")
    add("--restart", action="store_true", help="kill the server in the middle, and start it again")
    arguments = parser.parse_args()
    for name in ("clients", "seconds", "length"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be positive")

    server = Server(arguments)
    server.start()
    try:
        load, seconds = asyncio.run(measure(server, arguments))
    finally:
        server.kill()
    report(load, seconds, arguments.clients)
    clear = all("connection: " in r or UNKNOWN in r for r in load.failures)
    if load.wrong or not clear or not load.latencies:
        sys.exit("There was a wrong answer, or an unclear failure, or no answer.")
    if load.failures and not arguments.restart:
        sys.exit("Requests failed, though the server was not restarted.")


if __name__ == "__main__":
    main()
