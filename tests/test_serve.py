"""The HTTP service of the examples, as a process; and its page, in a browser."""

from concurrent.futures import ThreadPoolExecutor
import contextlib
import json
import queue
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import ClassVar

import httpx
import keras
import numpy as np
import pytest
from scripts import ROOT, run_python

import keras_hla

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
def service(folder, port, *options):
    """Runs the service while the block lasts, and checks that it stops when told to."""
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), str(folder / "saved_model")]
    command += ["--characters", str(folder / "characters.json"), "--port", str(port), *options]
    # Away from the repository's root, where it could find the package.
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while process.poll() is None:
                with contextlib.suppress(httpx.ConnectError):
                    client.get("/")
                    break
                time.sleep(0.1)
            assert process.poll() is None, process.stderr.read()
            yield client
        process.send_signal(signal.SIGTERM)
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
            assert "not finite" in list(events(response))[-1]["error"]
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
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "1 characters for logits of 31 tokens" in result.stderr


def test_a_failing_step_ends_its_own_session(monkeypatch):
    """A step that raises for its batch is taken again, by each session alone."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from sessions import Batcher, Request, Session

    class Model:
        characters = "ab"
        batches: ClassVar = []

        def step(self, pieces, states):
            self.batches.append(len(pieces))
            if "broken" in states:
                raise RuntimeError
            return [np.array([0.0, 1.0])] * len(pieces), states

    def request(states, length):
        received = queue.SimpleQueue()
        random = np.random.default_rng(0)
        return Request(Session(states, [0, 0]), length, 0, random, received.put), received

    batcher = Batcher(Model())
    submitted = [request(states, 2000) for states in ("fine", "broken", "fine")]
    for one, _ in submitted:
        batcher.submit(one)
    for one, received in submitted:
        answer = [received.get(timeout=20)]
        while "text" in answer[-1]:
            answer.append(received.get(timeout=20))
        if one.session.states == "broken":
            assert "RuntimeError" in answer[-1]["error"]
        else:
            assert answer == [{"text": "b"}] * 2000 + [{"done": True}]
        assert one.session.ended == (one.session.states == "broken")
    batcher.close()
    assert max(Model.batches) > 1


def test_load(folder):
    output = run_python(
        *("examples/serve_load.py", folder / "saved_model"),
        *("--characters", folder / "characters.json"),
        *("--clients", 5, "--seconds", 2, "--length", 10),
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
