"""Which implementation `kernels.choose` returns for an operator, and which it refuses."""

import keras
import numpy as np
import pytest
from scripts import run_python

from keras_hla import kernels, layers, operators, ops
from keras_hla.kernels import device

ON_TORCH = keras.config.backend() == "torch"


def test_auto_gives_a_reason():
    choice = kernels.choose("hla2", dtype="bfloat16", key_dim=64, value_dim=64)
    assert choice.implementation in ("portable", "triton")
    assert choice.reason
    assert kernels.choose(implementation="portable") == (
        "portable",
        "implementation='portable' was given",
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"operator": "hla2_published"}, r"sums of these, not HLA2Published\(ridge=0.0\)"),
        ({"dtype": "float64"}, "take bfloat16, float16 and float32, not float64"),
        ({"key_dim": 256}, r"up to 128, not \(256, 64\)"),
        ({"form": "recurrent"}, "form='recurrent'"),
        ({"causal": False}, "causal=False"),
        ({"normalize": True}, "normalize=True"),
        ({"chunk_size": 32}, "chunk_size=32"),
    ],
)
def test_what_kernels_cannot_do(options, reason):
    choice = kernels.choose(**options)
    assert choice.implementation == "portable"
    with pytest.raises(ValueError, match=f"implementation='triton'.*{reason}"):
        kernels.choose(**options, implementation="triton")


def test_auto_leaves_what_was_not_measured(monkeypatch):
    """To the portable implementation, though the kernels can do it."""
    monkeypatch.setattr(device, "why_not", lambda tensor: None)
    monkeypatch.setattr(device, "why_not_faster", lambda tensor: None)
    for operator in (operators.HLA2(ridge=0.5), operators.get("hla3", masked=False)):
        reason = f"the kernels were not measured with the operator {operator}"
        assert kernels.choose(operator) == ("portable", reason)
        assert kernels.choose(operator, implementation="triton").implementation == "triton"


def test_unknown():
    with pytest.raises(ValueError, match=r"`implementation` must be one of .*'auto'.*'cuda'"):
        kernels.choose(implementation="cuda")
    with pytest.raises(ValueError, match="`implementation` must be one of"):
        layers.HLA(2, 8, implementation="cuda")
    q = np.zeros((1, 4, 2, 8), "float32")
    with pytest.raises(ValueError, match="`implementation` must be one of"):
        ops.higher_order_attention(q, q, q, implementation="cuda")


@pytest.mark.skipif(ON_TORCH, reason="the kernels run there, at least interpreted")
def test_explicit_kernels_are_refused_where_they_cannot_run():
    q = np.zeros((1, 4, 2, 8), "float32")
    with pytest.raises(ValueError, match="implementation='triton'"):
        ops.higher_order_attention(q, q, q, implementation="triton")
    layer = layers.HLA(2, 8, implementation="triton")
    with pytest.raises(ValueError, match="implementation='triton'"):
        layer(np.zeros((1, 4, 16), "float32"))


def test_triton_is_not_imported_where_kernels_are_not_used():
    """Its LLVM and TensorFlow's cannot be in one process."""
    code = "import sys, keras_hla; print('triton' in sys.modules)"
    assert run_python("-c", code, backend="tensorflow").strip() == "False"
