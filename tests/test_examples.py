"""The examples run, in a small size."""

import keras
import pytest
from scripts import run_python


def test_char_lm(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. a dog ran to the door.\n" * 600)
    output = run_python(
        "examples/char_lm.py",
        *("--backend", keras.config.backend()),
        *("--text", text, "--steps", 24, "--length", 32, "--output", tmp_path / "out"),
    )
    for shown in ("held-out bits per character", "order 0", "order 3", "bytes", "SavedModel"):
        assert shown in output
    for name in ("learning_curve.png", "model.keras", "saved_model/saved_model.pb"):
        assert (tmp_path / "out" / name).is_file()


def test_char_lm_refuses_a_text_too_short(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("short")
    with pytest.raises(AssertionError, match="too short"):
        run_python("examples/char_lm.py", "--text", text)


def test_cost():
    output = run_python(
        "examples/cost.py",
        *("--backend", keras.config.backend()),
        *("--lengths", 64, "--tokens", 200, "--repeats", 2),
    )
    for shown in ("MultiHeadAttention", "growth", "bytes"):
        assert shown in output


def test_streaming_cost():
    output = run_python(
        "examples/streaming_cost.py",
        *("--backend", keras.config.backend()),
        *("--tokens", 40, "--contexts", 64, "--stream", 3000),
    )
    for shown in ("whole prefix", "cache of", "outputs are finite"):
        assert shown in output


def test_operator_cost():
    output = run_python(
        "examples/operator_cost.py",
        *("--backend", keras.config.backend(), "--length", 32, "--repeats", 1),
        *("--operators", "hla3_published"),
    )
    assert output.count("hla3_published ") == 2


def test_numerics():
    output = run_python(
        "examples/numerics.py", *("--backend", keras.config.backend(), "--length", 1500)
    )
    assert output.count("outputs are finite") == 3


def test_plot_weights(tmp_path):
    run_python(
        "examples/plot_weights.py",
        *("--backend", keras.config.backend(), "--output", tmp_path / "weights.png"),
    )
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


def test_classify_digits(tmp_path):
    output = run_python(
        "examples/classify_digits.py",
        *("--backend", keras.config.backend(), "--output", tmp_path / "digits.png"),
        *("--images", 200, "--epochs", 1, "--seeds", 1, "--models", "HLA(causal=False)"),
    )
    assert output.count("accuracy") == 1
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_long_sequence():
    output = run_python(
        "examples/long_sequence.py",
        *("--backend", keras.config.backend(), "--length", 512, "--remat-lengths", 128),
    )
    assert output.count("MB in all") == 2
