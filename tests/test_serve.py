"""The HTTP service of the examples, as a process; and its page, in a browser."""

from concurrent.futures import ThreadPoolExecutor
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx
import keras
import numpy as np
import pytest
from scripts import ROOT, run_python

import keras_hla
from keras_hla.streaming import Scheduler

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# The model's output after "~" is not finite, and it never writes one.
CHARACTERS = [REPLACEMENT, *" abcdefghijklmnopqrstuvwxyz.,~"]
UNKNOWN = "unknown or expired session; start a new one"


def make_model():
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    embedding = keras.layers.Embedding(len(CHARACTERS), 16)
    x = keras_hla.layers.HLADecoderBlock(num_heads=2, key_dim=8)(embedding(tokens))
    logits = keras.layers.Dense(len(CHARACTERS), name="logits")
    model = keras.Model(tokens, logits(x))
    rows = embedding.get_weights()[0]
    rows[-1] = np.nan
    embedding.set_weights([rows])
    logits.bias.assign(np.where(np.array(CHARACTERS) == "~", -1e6, 0.0))
    return model


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return make_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    keras_hla.export_saved_model(model, folder / "saved_model")
    (folder / "characters.json").write_text(json.dumps(CHARACTERS), encoding="utf-8")
    return folder


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def service(folder, port, *options, model="saved_model", end=signal.SIGTERM):
    """Runs the service while the block lasts, and checks that it stops when told to."""
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), str(folder / model)]
    command += ["--characters", str(folder / "characters.json"), "--port", str(port), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while process.poll() is None:
                with contextlib.suppress(httpx.ConnectError):
                    client.get("/")
                    break
                time.sleep(0.1)
            assert process.poll() is None, process.stderr.read()
            yield client
            process.send_signal(end)
        assert "Traceback" not in process.communicate(timeout=30)[1]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def client(folder):
    with service(folder, free_port()) as client:
        yield client


def start(client):
    response = client.post("/sessions")
    assert response.status_code == 201
    return response.json()["id"]


def events(response):
    for line in response.iter_lines():
        if line:
            yield json.loads(line.removeprefix("data: "))


def write(client, key, text, length=8, **options):
    """Returns what the model writes after the text."""
    wish = {"text": text, "length": length, **options}
    with client.stream("POST", f"/sessions/{key}/text", json=wish) as response:
        assert response.status_code == 200, response.read()
        *texts, last = events(response)
    assert last == {"done": True}
    assert len(texts) == length
    return "".join(event["text"] for event in texts)


def test_goes_on_from_the_state(client, model):
    key = start(client)
    read = "the cat " + REPLACEMENT  # as the character that the model does not know is read
    first = write(client, key, "the cat 猫", temperature=0)
    text = read + first + "and"
    text += write(client, key, "and", temperature=0)
    tokens = np.array([[CHARACTERS.index(c) for c in text]], "int32")
    likeliest = model.predict(tokens, verbose=0)[0].argmax(-1)
    for end in (len(read + first), len(text)):
        assert [CHARACTERS[i] for i in likeliest[end - 9 : end - 1]] == [*text[end - 8 : end]]


def test_long_texts_are_read_in_pieces(client, model):
    text = "a long text, " * 100
    written = write(client, start(client), text, length=1, temperature=0)
    tokens = np.array([[CHARACTERS.index(c) for c in text]], "int32")
    assert written == CHARACTERS[model.predict(tokens, verbose=0)[0, -1].argmax()]


def test_streams_and_frees_the_session(client):
    key = start(client)
    path, wish = f"/sessions/{key}/text", {"text": "a", "length": 5000}
    with client.stream("POST", path, json=wish) as response:
        received = events(response)
        for _ in range(5):
            assert len(next(received)["text"]) == 1
        # It still writes what the first lines were read of.
        assert client.post(path, json=wish).status_code == 409
    # The client has gone: the session waits for the next text.
    deadline = time.monotonic() + 20
    while (status := client.post(path, json={"text": "a", "length": 1}).status_code) == 409:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert status == 200


def test_sessions_together_write_as_each_alone(client):
    def converse(seed):
        key = start(client)
        texts = [write(client, key, "once" * seed, 30 + seed, seed=seed), ""]
        texts[1] = write(client, key, ", and", 20, seed=seed + 100, temperature=1)
        assert client.delete(f"/sessions/{key}").status_code == 204
        return texts

    seeds = range(1, 9)
    alone = [converse(seed) for seed in seeds]
    assert len({first for first, _ in alone}) == len(seeds)
    with ThreadPoolExecutor(len(seeds)) as pool:
        assert list(pool.map(converse, seeds)) == alone


def test_a_failing_session_disturbs_no_other(client):
    expected = write(client, start(client), "ab", 200, seed=1)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(write, client, start(client), "ab", 200, seed=1)
        for _ in range(5):
            key = start(client)
            response = client.post(f"/sessions/{key}/text", json={"text": "a~", "length": 5})
            assert "NaN" in list(events(response))[-1]["error"]
            response = client.post(f"/sessions/{key}/text", json={"text": "a", "length": 5})
            assert response.status_code == 404
        assert other.result() == expected


def test_deleting_ends_the_writing(client):
    key = start(client)
    wish = {"text": "a", "length": 5000}
    with client.stream("POST", f"/sessions/{key}/text", json=wish) as response:
        received = events(response)
        next(received)
        assert client.delete(f"/sessions/{key}").status_code == 204
        assert "ended" in list(received)[-1]["error"]
    assert client.delete(f"/sessions/{key}").status_code == 404


BAD = [
    ("", 422),
    ("[", 422),
    ("[]", 422),
    ("{}", 422),
    ('{"text": ""}', 422),
    ('{"text": 1}', 422),
    ('{"text": "\\ud800"}', 422),
    ('{"text": "a", "more": 1}', 422),
    ('{"text": "a", "length": 0}', 422),
    ('{"text": "a", "length": 5001}', 422),
    ('{"text": "a", "length": 2.5}', 422),
    ('{"text": "a", "length": "2"}', 422),
    ('{"text": "a", "temperature": -1}', 422),
    ('{"text": "a", "temperature": NaN}', 422),
    ('{"text": "a", "temperature": "hot"}', 422),
    ('{"text": "a", "seed": -1}', 422),
    ('{"text": "a", "seed": 0.5}', 422),
    (json.dumps({"text": "a" * 20_001}), 422),
    (json.dumps({"text": "a" * 1_000_000}), 413),
]


@pytest.mark.parametrize(("body", "status"), BAD, ids=lambda x: str(x)[:40])
def test_refuses_what_it_does_not_understand(client, body, status):
    key = start(client)
    response = client.post(f"/sessions/{key}/text", content=body)
    assert response.status_code == status
    assert len(response.json()["detail"]) < 200
    write(client, key, "a", 1)  # the session has not suffered


def test_refuses_unknown_sessions_and_methods(client):
    response = client.post("/sessions/nobody/text", json={"text": "a"})
    assert (response.status_code, response.json()["detail"]) == (404, UNKNOWN)
    assert client.delete("/sessions/nobody").status_code == 404
    assert client.get("/sessions").status_code == 405
    assert client.get("/nothing").status_code == 404


def test_restart_limit_and_expiry(folder):
    port = free_port()
    with service(folder, port) as client:
        old = start(client)
        write(client, old, "a")
    with service(folder, port, "--expire", "4", "--sessions", "2") as client:
        response = client.post(f"/sessions/{old}/text", json={"text": "a"})
        assert (response.status_code, response.json()["detail"]) == (404, UNKNOWN)

        keys = [start(client), start(client)]
        response = client.post("/sessions")
        assert response.status_code == 503
        assert "2 sessions" in response.json()["detail"]
        time.sleep(2.5)
        write(client, keys[0], "a")
        time.sleep(2.5)
        write(client, keys[0], "a")  # used in time, unlike the other
        assert client.delete(f"/sessions/{keys[1]}").status_code == 404
        start(client)


def test_refuses_wrong_characters(folder, tmp_path):
    path = tmp_path / "characters.json"
    path.write_text('["a"]', encoding="utf-8")
    command = [sys.executable, "examples/serve.py", folder / "saved_model", "--characters", path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "1 characters for logits of 31 tokens" in result.stderr


def complete(client, **wish):
    return client.post("/v1/completions", json={"model": "saved_model", **wish})


def stream_completion(client, **wish):
    """Yields the events of a completion, parsed as a client does."""
    wish = {"model": "saved_model", "stream": True, **wish}
    with client.stream("POST", "/v1/completions", json=wish) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        *bodies, done = (line.removeprefix("data: ") for line in lines)
    assert done == "[DONE]"
    yield from map(json.loads, bodies)


def expect(model, prompt, count, **options):
    """The text that the package writes for a text by itself."""
    tokens = [CHARACTERS.index(c) for c in prompt]
    new = keras_hla.generate(model, tokens, count, tokens_per_call=8, **options)
    return "".join(CHARACTERS[token] for token in new)


def test_completions(client, model):
    for options in ({"temperature": 0}, {"seed": 3}, {"seed": 4, "top_p": 0.5, "temperature": 2}):
        expected = expect(model, "once", 24, **options)
        tokens = [CHARACTERS.index(c) for c in "once"]
        for prompt in ("once", tokens):
            answer = complete(client, prompt=prompt, max_tokens=24, **options).json()
            (choice,) = answer["choices"]
            assert choice["text"] == expected
            assert (choice["index"], choice["finish_reason"]) == (0, "length")
            assert (answer["object"], answer["model"]) == ("text_completion", "saved_model")
            usage = {"prompt_tokens": 4, "completion_tokens": 24, "total_tokens": 28}
            assert answer["usage"] == usage
        events = [
            *stream_completion(
                *(client,),
                **{"prompt": "once", "max_tokens": 24, **options},
                stream_options={"include_usage": True},
            )
        ]
        *chunks, last, counts = events
        assert len({event["id"] for event in events}) == 1
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
        assert {chunk["choices"][0]["finish_reason"] for chunk in chunks} == {None}
        assert len(chunks) == 24
        assert last["choices"][0]["finish_reason"] == "length"
        assert (counts["choices"], counts["usage"]) == ([], usage)


def test_completions_stop(client, model):
    whole = expect(model, "once", 60, seed=3)
    for stop in (whole[20:23], [whole[30:32], whole[10:13] + "~", whole[40]], whole[59]):
        stops = [stop] if isinstance(stop, str) else stop
        end = min(whole.find(s) for s in stops if s in whole)
        wish = {"prompt": "once", "max_tokens": 60, "seed": 3, "stop": stop}
        answer = complete(client, **wish).json()["choices"][0]
        assert (answer["text"], answer["finish_reason"]) == (whole[:end], "stop")
        *chunks, last = (event["choices"][0] for event in stream_completion(client, **wish))
        assert "".join(chunk["text"] for chunk in chunks) == whole[:end]
        assert last["finish_reason"] == "stop"
    answer = complete(client, **wish | {"stop": ["~", whole[-2:] + "."]}).json()["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == (whole, "length")


def test_models(client):
    answer = client.get("/v1/models").json()
    assert answer["object"] == "list"
    assert [(x["id"], x["object"]) for x in answer["data"]] == [("saved_model", "model")]
    assert client.get("/v1/models/saved_model").json() == answer["data"][0]
    assert client.get("/v1/models/other").status_code == 404


BAD_COMPLETIONS = [
    ({}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": ["a", "b"]}, 400, "prompt"),
    ({"prompt": [31]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature"),
    ({"prompt": "a", "top_p": 0}, 400, "top_p"),
    ({"prompt": "a", "n": 2}, 400, "n"),
    ({"prompt": "a", "echo": True}, 400, "echo"),
    ({"prompt": "a", "presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"prompt": "a", "stop": ["a"] * 5}, 400, "stop"),
    ({"prompt": "a", "more": 1}, 400, "more"),
    ({"prompt": "a", "model": "other"}, 404, "model"),
    ({"prompt": "a" * 1_000_000}, 413, None),
]


@pytest.mark.parametrize(("wish", "status", "param"), BAD_COMPLETIONS, ids=lambda x: str(x)[:40])
def test_refuses_completions_as_clients_know_it(client, wish, status, param):
    response = complete(client, **wish)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert 0 < len(error["message"]) < 300


def test_what_asks_for_nothing_is_accepted(client):
    nothing = {"n": 1, "echo": False, "logprobs": None, "presence_penalty": 0.0, "logit_bias": {}}
    assert complete(client, prompt="a", max_tokens=1, **nothing).status_code == 200


def test_a_failing_completion_is_an_error(client):
    response = complete(client, prompt="a~")
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    wish = {"model": "saved_model", "prompt": "a~", "stream": True}
    with client.stream("POST", "/v1/completions", json=wish) as response:
        (event,) = events(response)
    assert "NaN" in event["error"]["message"]


def test_concurrent_completions(client, model):
    def write(seed):
        wish = {"prompt": "once" * seed, "max_tokens": 10 * seed, "seed": seed}
        return "".join(x["choices"][0]["text"] for x in stream_completion(client, **wish))

    seeds = range(1, 9)
    with ThreadPoolExecutor(len(seeds)) as pool:
        written = list(pool.map(write, seeds))
    assert written == [expect(model, "once" * seed, 10 * seed, seed=seed) for seed in seeds]


def test_a_full_server_and_clients_that_vanish(folder, model):
    of_another_model = Scheduler(model)
    session = of_another_model.submit([1], 1)
    (folder / "others").mkdir()
    of_another_model.suspend(session).save(folder / "others" / "other.session")
    (folder / "others" / "broken.session").write_bytes(b"PK")
    long = {"model": "saved_model", "prompt": "a", "max_tokens": 5000, "stream": True}
    options = "--rows", "1", "--waiting", "1", "--store", str(folder / "others")
    with service(folder, free_port(), *options) as client, contextlib.ExitStack() as stack:
        writing = stack.enter_context(client.stream("POST", "/v1/completions", json=long))
        received = events(writing)  # which closes the connection when it is collected
        next(received)
        stack.enter_context(client.stream("POST", "/v1/completions", json=long))
        response = complete(client, prompt="a")
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        response = client.post(f"/sessions/{start(client)}/text", json={"text": "a"})
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        stack.close()  # both clients go away
        del received
        deadline = time.monotonic() + 20
        while (response := complete(client, prompt="a", max_tokens=5)).status_code == 429:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert response.json()["usage"]["completion_tokens"] == 5

        for key in ("other", "broken"):
            response = client.post(f"/sessions/{key}/text", json={"text": "a"})
            assert (response.status_code, response.json()["detail"]) == (404, UNKNOWN)


def test_stored_sessions_go_on(folder, model):
    """After the server was killed while it wrote, and with a Keras model."""
    model.save(folder / "model.keras")
    options = {"model": "model.keras"}
    texts = [("the cat ", 20, 1), (" sat", 30, 2)]
    expected = [expect(model, texts[0][0], 20, seed=1, temperature=0.8)]
    so_far = texts[0][0] + expected[0] + texts[1][0]
    expected.append(expect(model, so_far, 30, seed=2, temperature=0.8))

    port, store = free_port(), ("--store", str(folder / "store"))
    with service(folder, port, *store, **options, end=signal.SIGKILL) as client:
        keys = [start(client), start(client)]
        for key in keys:
            text, length, seed = texts[0]
            assert write(client, key, text, length, seed=seed) == expected[0]
        wish = {"text": "a", "length": 5000}
        writing = client.build_request("POST", f"/sessions/{keys[1]}/text", json=wish)
        next(events(client.send(writing, stream=True)))
    with service(folder, port, *store, **options) as client:
        for key in keys:  # the one that was writing as before the text
            text, length, seed = texts[1]
            assert write(client, key, text, length, seed=seed) == expected[1]
        assert client.delete(f"/sessions/{keys[0]}").status_code == 204


def test_load(folder):
    output = run_python(
        *("examples/serve_load.py", folder / "saved_model"),
        *("--characters", folder / "characters.json"),
        *("--clients", 10, "--seconds", 2, "--length", 10),
    )
    assert "wrong answers: 0" in output
    assert "failed requests: 0" in output


@pytest.fixture
def browser(tmp_path):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-component-update"
    flags += " disable-background-networking disable-sync disable-dev-shm-usage"
    for flag in [*flags.split(), f"user-data-dir={tmp_path / 'profile'}", "window-size=900,800"]:
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def test_page(client, browser):
    from selenium.webdriver.support.ui import WebDriverWait

    def find(name):
        return browser.find_element("id", name)

    def wait(condition):
        WebDriverWait(browser, 30, poll_frequency=0.02).until(lambda _: condition())

    def story():
        return find("story").get_property("textContent")

    def fill(**fields):
        for name, value in fields.items():
            find(name).clear()
            find(name).send_keys(str(value))

    browser.get(str(client.base_url))
    fill(text="once upon", length=300, seed=3)
    find("write").click()
    wait(lambda: len(story()) > len("once upon"))
    assert len(story()) < len("once upon") + 300  # it arrives while it is written
    wait(find("write").is_enabled)
    key = start(client)
    expected = "once upon" + write(client, key, "once upon", 300, seed=3)
    assert story() == expected

    fill(text=" a time", length=40)
    find("write").click()
    wait(lambda: len(story()) == len(expected) + len(" a time") + 40)
    assert story() == expected + " a time" + write(client, key, " a time", 40, seed=3)

    wait(find("write").is_enabled)
    fill(text="a", length=5000)
    find("write").click()
    wait(find("stop").is_enabled)
    find("stop").click()
    wait(find("write").is_enabled)
    assert not find("error").text
    assert browser.get_log("browser") == []

    browser.execute_script("session = 'of a server before this one'")
    fill(text="a")
    find("write").click()
    wait(lambda: UNKNOWN in find("error").text)
    wait(find("write").is_enabled)
    find("write").click()  # starts a new one
    wait(lambda: story().startswith("a") and len(story()) > 1)
    assert not find("error").text
