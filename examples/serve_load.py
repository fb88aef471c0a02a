"""Many clients at a time write with a server that this script starts, and check each answer.

    python serve_load.py char_lm_output/saved_model --characters char_lm_output/characters.json

Each client holds conversations of two texts in a session and must receive what a
session gave that had the server to itself. Every tenth client is slow to read what
it receives, and every tenth goes away in the middle of each answer: neither may
disturb the others. With `--restart` the server is killed and started again in the
middle, with its sessions in files: then the clients must see clear errors, go on
with their sessions, and still see no wrong text. The exit status is 0 if all is so.
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
import tempfile
import time

import httpx
import numpy as np

CONVERSATIONS = 10  # different ones
SLOW = 0.1  # seconds between the looks of a slow client at its answer


class RequestError(Exception):
    """A request that got no whole answer, and why."""


class Server:
    """A server on a free port of this computer. What it has to say goes to this one's output."""

    def __init__(self, arguments, folder):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        serve = Path(__file__).with_name("serve.py")
        self.command = [sys.executable, serve, arguments.model, "--port", str(port)]
        self.command += ["--characters", arguments.characters, "--rows", str(arguments.rows)]
        # Those of clients that go away stay until they expire.
        self.command += ["--sessions", "100000", "--store", folder]

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


async def send(client, method, path, wish=None, pause=0, most=None):
    """Returns the server's answer to a request: parsed, or for a text the text.

    Args:
        client: the `httpx.AsyncClient`.
        method: that of HTTP.
        path: that of the URL.
        wish: what the body holds, for a text.
        pause: seconds between looks at the answer.
        most: number of characters after which the client goes away.
    """
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
                if len(text) == most:
                    return text
                await asyncio.sleep(pause)
            raise RequestError("the answer ended early")
    except httpx.TransportError as error:
        raise RequestError(f"connection: {type(error).__name__}") from None


async def start(client):
    return (await send(client, "POST", "/sessions"))["id"]


async def write(client, key, wish, **options):
    return await send(client, "POST", f"/sessions/{key}/text", wish, **options)


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
        self.restarted = False
        self.latencies = []
        self.characters = 0
        self.wrong = 0
        self.vanished = 0
        self.went_on = 0  # sessions, after a restart
        self.failures = Counter()

    async def request(self, key, number, part, pause):
        begin = time.perf_counter()
        text = await write(self.client, key, self.wishes[number][part], pause=pause)
        if not pause:
            self.latencies.append(time.perf_counter() - begin)
        self.characters += len(text)
        self.wrong += text != self.expected[number][part]

    async def run(self, number, pause):
        """One client, who goes on with its session unless an answer to it was interrupted."""
        key, part, known_before = None, 0, False
        while self.running:
            try:
                if key is None:
                    key, part = await start(self.client), 0
                    known_before = not self.restarted
                await self.request(key, number, part, pause)
                self.went_on += known_before and self.restarted and part == 1
                part += 1
                if part == 2:
                    await send(self.client, "DELETE", f"/sessions/{key}")
                    key = None
            except RequestError as error:
                self.failures[str(error)] += 1
                # Of an answer that broke off nobody knows whether the session has all of it.
                if "ConnectError" not in str(error) or part == 2:
                    key = None
                await asyncio.sleep(0.5)

    async def vanish(self, number):
        """A client that goes away in the middle of each answer."""
        while self.running:
            try:
                key = await start(self.client)
                text = await write(self.client, key, self.wishes[number][0], most=3)
                self.wrong += text != self.expected[number][0][:3]
                self.vanished += 1
            except RequestError as error:
                self.failures[str(error)] += 1
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
            load.vanish(i % CONVERSATIONS)
            if i % 10 == 8
            else load.run(i % CONVERSATIONS, pause=SLOW if i % 10 == 9 else 0)
            for i in range(arguments.clients)
        ]
        clients = [asyncio.create_task(one) for one in clients]
        await asyncio.sleep(arguments.seconds / 2)
        if arguments.restart:
            server.kill()
            server.start()
            await server.ready(client)
            load.restarted = True
        await asyncio.sleep(arguments.seconds / 2)
        load.running = False
        await asyncio.gather(*clients)
        return load, time.perf_counter() - begin


def report(load, seconds, clients):
    failed = load.failures.total()
    print(f"{clients} clients, {seconds:.0f} seconds")
    print(f"  requests for text answered: {len(load.latencies)}")
    print(f"  wrong answers: {load.wrong}")
    print(f"  answers that their clients did not wait for: {load.vanished}")
    if load.restarted:
        print(f"  sessions that went on after the restart: {load.went_on}")
    print(f"  failed requests: {failed}")
    for reason, count in load.failures.most_common():
        print(f"    {count:5d} {reason}")
    if load.latencies:
        median, most = np.percentile(load.latencies, (50, 99))
        print(f"  latency of a whole answer: median {median:.2f} s, 99 % {most:.2f} s")
    print(f"  characters/s, all clients: {load.characters / seconds:.0f}")


def main():
    parser = argparse.ArgumentParser(
        description="Put load on a server of a character model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, help="folder that keras_hla.export_saved_model wrote, or .keras file")
    add("--characters", type=Path, required=True, help="JSON list: each token's character")
    add("--clients", type=int, default=50, help="number of clients at a time")
    add("--seconds", type=float, default=60, help="how long they send requests")
    add("--rows", type=int, default=32, help="number of texts that are written in one step")
    add("--length", type=int, default=40, help="characters of an answer, on average")
    add("--restart", action="store_true", help="kill the server in the middle, and start it again")
    arguments = parser.parse_args()
    for name in ("clients", "seconds", "length", "rows"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be positive")

    with tempfile.TemporaryDirectory() as folder:
        server = Server(arguments, folder)
        server.start()
        try:
            load, seconds = asyncio.run(measure(server, arguments))
        finally:
            server.kill()
    report(load, seconds, arguments.clients)
    clear = all("connection: " in r or "ended early" in r for r in load.failures)
    if load.wrong or not clear or not load.latencies:
        sys.exit("There was a wrong answer, or an unclear failure, or no answer.")
    if load.failures and not arguments.restart:
        sys.exit("Requests failed, though the server was not restarted.")


if __name__ == "__main__":
    main()
