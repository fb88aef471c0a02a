"""The examples run, in a small size.

The demo does on every backend. Those that measure take some seconds each to
start, and share the backends among themselves.
"""

import keras
import pytest
from scripts import run_python

BACKEND = keras.config.backend()

# By backend: script, options, and what its output shows.
MEASURING = {
    "tensorflow": [("plot_weights.py", "--output OUT/picture.png", [])],
    "jax": [("numerics.py", "--length 1500", ["outputs are finite"])],
    "torch": [
        (
            "classify_digits.py",
            "--output OUT/picture.png --images 200 --epochs 1 --seeds 1 --models HLA(causal=False)",
            ["accuracy"],
        ),
    ],
}


def test_char_lm(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. a dog ran to the door.\n" * 600)
    output = run_python(
        "examples/char_lm.py",
        *("--backend", BACKEND),
        *("--text", text, "--steps", 2, "--length", 32, "--output", tmp_path / "out"),
    )
    for shown in ("held-out bits per character", "order 0", "order 3", "bytes", "in pieces"):
        assert shown in output
    for name in ("learning_curve.png", "model.keras", "saved_model/saved_model.pb"):
        assert (tmp_path / "out" / name).is_file()


@pytest.mark.parametrize("split", ["batch", "sequence"])
def test_train_distributed(split):
    if (BACKEND, split) == ("tensorflow", "sequence"):
        pytest.skip("TensorFlow has no engine for it, as the example says")
    options = f"--steps 2 --batch 4 --length 16 --blocks 1 --heads 1 --split {split}"
    output = run_python("examples/train_distributed.py", "--backend", BACKEND, *options.split())
    for shown in ("1 device: ", "2 devices: ", "losses agree"):
        assert shown in output


def test_char_lm_refuses_a_text_too_short(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("short")
    with pytest.raises(AssertionError, match="too short"):
        run_python("examples/char_lm.py", "--text", text)


@pytest.mark.parametrize(
    ("script", "options", "shown"), MEASURING[BACKEND], ids=lambda x: str(x)[:9]
)
def test_measures(script, options, shown, tmp_path):
    options = [option.replace("OUT", str(tmp_path)) for option in options.split()]
    output = run_python(f"examples/{script}", "--backend", BACKEND, *options)
    for text in shown:
        assert text in output
    for picture in [option for option in options if option.endswith(".png")]:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", ["plot_orders.py", "plot_training_step.py"])
def test_draws(script, tmp_path):
    run_python(f"examples/{script}", "--output", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
