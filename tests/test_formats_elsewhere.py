"""Under JAX and torch, ONNX and LiteRT files are refused with the command that writes them."""

import keras
import pytest
from scripts import run_python
from test_formats import check_pieces, make

import keras_hla


def test_refused_with_what_works():
    model = make("hla2")
    for write in (keras_hla.export_onnx, keras_hla.export_litert):
        with pytest.raises(RuntimeError, match=r"python -m keras_hla\.export model\.keras out"):
            write(model, "out", length=1)


@pytest.mark.skipif(
    keras.config.backend() != "torch",
    reason="the command is the same, and test_interchange.py loads files of each backend",
)
def test_the_command(tmp_path):
    model, path = make("hla3"), tmp_path / "model.keras"
    model.save(path)
    run_python("-m", "keras_hla.export", path, tmp_path / "step.onnx", "--step")
    check_pieces(model, tmp_path / "step.onnx", (1, 7, 64, 1), new="next_{}".format)
