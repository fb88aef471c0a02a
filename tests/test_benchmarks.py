"""The benchmarks run, in a small size, and time nothing that is wrong."""

import csv
import functools
import time

import keras
from keras import ops
import pytest
from scripts import run_python

from benchmarks import (
    contenders,
    generation,
    layers,
    long_stream,
    memory,
    own_layers,
    runtime,
    scaling,
    streaming,
    trainees,
)
from benchmarks.__main__ import main
from benchmarks.cases import Case
from keras_hla.layers import HLA

BACKEND = keras.config.backend()
QUICK = ("--backend", BACKEND, "--seconds", "0")


def rows(folder, kind):
    with open(folder / f"{kind}_{BACKEND}.csv", encoding="utf-8") as file:
        return {row["contender"]: row for row in csv.DictReader(file)}


def test_operators(tmp_path):
    options = ("--shapes", "1x2x70x8", "--operators", "hla3", "--output", tmp_path)
    assert main([*QUICK, *map(str, options)]) == 0
    found = rows(tmp_path, "operators")
    for name in ("keras_hla hla3", "keras_hla linear", "minimal hla3"):
        row = found[name]
        assert 0 < float(row["forward ms low"]) <= float(row["forward ms median"])
        assert (
            0 < float(row["forward+backward ms median"]) <= float(row["forward+backward ms high"])
        )
        assert 0 < float(row["error of dkey"]) < 1e-5
        assert 0 < float(row["error of output at the shape"]) < 1e-5
    assert found["keras.ops attention"]["forward ms median"]
    for row in found.values():  # none is dropped without a reason
        assert bool(row["forward ms median"]) != bool(row["note"])
    assert (tmp_path / f"operators_{BACKEND}.png").read_bytes().startswith(b"\x89PNG")


def test_operators_with_decay(capsys):
    options = ("--shapes", "1x2x70x8", "--dtypes", "bfloat16", "--decay")
    assert main([*QUICK, *options, "--peers", "minimal,nobody"]) == 0
    printed = capsys.readouterr().out
    assert "has no decay" in printed
    assert "no such peer" in printed
    assert "1x2x70x8 bfloat16 with decay" in printed


def scaled(output, value):
    return output * (1 + 1e-3)


def wrong_gradient(output, value):
    return output + 0.01 * (value - ops.stop_gradient(value))


@pytest.mark.parametrize(("wrong", "named"), [(scaled, "output"), (wrong_gradient, "dvalue")])
def test_wrong_results_are_refused(wrong, named, monkeypatch, capsys, tmp_path):
    right = contenders.higher_order_attention

    def attention(query, key, value, operator, **options):
        return wrong(right(query, key, value, operator, **options), value)

    monkeypatch.setattr(contenders, "higher_order_attention", attention)
    options = ("--shapes", "1x1x20x4", "--peers", "minimal", "--output", str(tmp_path))
    assert main([*QUICK, *options]) == 1
    assert "WRONG" in capsys.readouterr().out
    found = rows(tmp_path, "operators")
    assert not found["keras_hla hla2"]["forward ms median"]
    assert f"{named} " in found["keras_hla hla2"]["note"]
    assert found["minimal hla2"]["forward ms median"]


def test_an_error_of_ours_is_a_failure():
    options = ("--shapes", "1x1x20x4", "--peers", "none", "--implementations", "no such")
    assert main([*QUICK, *options]) == 1


def test_layers(tmp_path, monkeypatch):
    monkeypatch.delitem(own_layers.VARIANTS, ", decay")
    options = ("--layers", "layers", "--shapes", "1x2x16x8", "--output", str(tmp_path))
    assert main([*QUICK, *options]) == 0
    found = rows(tmp_path, "layers")
    names = "HLA (hla2)", "HLA (hla2, plain)", "HLA (hla2, decay, conv, gate)"
    for name in (*names, "MultiHeadAttention", "GRU"):
        assert float(found[name]["training step ms median"]) > 0
    assert 0 < float(found["HLA (hla2)"]["error of output"]) < 1e-5
    assert found["HLA (hla2)"]["implementation"].startswith("portable (")
    assert found["MultiHeadAttention, flash"]["note"]
    if BACKEND != "tensorflow":
        plain = found["fused qkv, rotation, fused attention"]
        assert 0 < float(plain["error of output"]) < 1e-5
    for row in found.values():  # none is dropped without a reason
        assert bool(row["training step ms median"]) != bool(row["note"])
        assert bool(row["implementation"]) != bool(row["note"])


def test_blocks(tmp_path):
    options = ("--layers", "blocks", "--shapes", "1x2x130x8", "--dtypes", "bfloat16")
    options += ("--peers", "fused_block")
    assert main([*QUICK, *options, "--output", str(tmp_path)]) == 0
    found = rows(tmp_path, "layers")
    ours = found["HLADecoderBlock (hla2)"]
    assert 0 < float(ours["error of output"]) < 1e-5
    for name in ("output at the shape", "dinput", "dweights"):
        assert 1e-3 < float(ours[f"error of {name}"]) < 5e-2
    plain = found.get("block of fused qkv, rotation, fused attention")
    for row in [ours] if BACKEND == "tensorflow" else [ours, plain]:
        assert float(row["training step ms median"]) > 0


def test_models(tmp_path):
    options = ("--layers", "models", "--shapes", "1x2x20x8", "--peers", "mha_block,gpt2,nobody")
    assert main([*QUICK, *options, "--output", str(tmp_path)]) == 0
    found = rows(tmp_path, "layers")
    for name in ("HLADecoderBlock (hla2)", "block of MultiHeadAttention"):
        assert float(found[name]["training step ms median"]) > 0
    assert found["nobody"]["note"] == "no such peer on this backend"
    assert ("transformers GPT-2" in found) == (BACKEND == "torch")


class ImpreciseHLA(HLA):
    """Wrong in the gradients of low precision alone."""

    def call(self, sequences):
        output = super().call(sequences)
        factor = 0.0 if self.compute_dtype == "float32" else 1.0
        wrong = factor * ops.cast(sequences, output.dtype)
        return output + (wrong - ops.stop_gradient(wrong))


@pytest.fixture
def one_layer(monkeypatch):
    monkeypatch.setattr(own_layers, "VARIANTS", {"": {}})
    return ("--layers", "layers", "--peers", "none", "--dtypes", "bfloat16")


def test_wrong_layers_are_refused(one_layer, monkeypatch, capsys):
    monkeypatch.setattr(own_layers, "HLA", ImpreciseHLA)
    assert main([*QUICK, *one_layer, "--shapes", "1x2x130x8"]) == 1
    assert "WRONG, not timed: relative error of dinput" in capsys.readouterr().out


def test_other_kernels_than_announced_are_refused(one_layer, monkeypatch, capsys):
    found = {"forward_kernel", "gemm"}
    monkeypatch.setattr(runtime.current(), "kernels", lambda call, arguments: found)
    monkeypatch.setattr(own_layers, "_sign", lambda: "forward_kernel")
    assert main([*QUICK, *one_layer, "--shapes", "1x2x130x8"]) == 1
    assert "announced portable" in capsys.readouterr().out


def test_what_is_announced_is_confirmed():
    flash = trainees.Announced("flash", "*flash")
    flash.confirm({"void flash_fwd_kernel", "gemm"})
    flash.confirm(None)  # nothing tells
    with pytest.raises(
        AssertionError, match="announced flash, but the kernels that ran were fmha, gemm"
    ):
        flash.confirm({"fmha", "gemm"})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("blocks,nothing",), "--layers must be of"),
        (("layers", "--decay"), "--decay is for operators"),
    ],
)
def test_options_of_layers(wrong, message, capsys):
    with pytest.raises(SystemExit):
        main([*QUICK, "--layers", *wrong])
    assert message in capsys.readouterr().err


def test_streaming(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "CALL", 4)
    monkeypatch.setattr(streaming, "BLOCKS", 1)
    monkeypatch.setattr(long_stream, "BLOCK", 100)
    options = ("--streaming", "--contexts", "40", "--tokens", "1000", "--output", str(tmp_path))
    assert main([*QUICK, *options]) == 0
    found = rows(tmp_path, "streaming")
    for name in (
        "HLA from its state, after 1,000 tokens",
        "HLA, the whole prefix of 40 tokens again",
        "attention, cache of 40 tokens",
    ):
        assert float(found[name]["token of a call ms median"]) > 0
    assert 0 < float(found["hla2, to token 1,000"]["error of output"]) < 1e-5


def test_generation(tmp_path, monkeypatch):
    for name, value in {"VOCABULARY": 50, "CALL": 4, "LEAST": 1}.items():
        monkeypatch.setattr(generation, name, value)
    sizes = ["--batches", "1,2", "--contexts", "8", "--blocks", "1", "--heads", "1"]
    options = ["--dtype", "float32", "--seconds", "0", "--out", str(tmp_path)]
    assert generation.main(["--backend", BACKEND, *sizes, *options]) == 0
    with (tmp_path / f"generation_{BACKEND}.csv").open(encoding="utf-8") as file:
        found = [*csv.DictReader(file)]
    assert [(x["model"], x["batch"]) for x in found] == [
        ("HLA, auto", "1"),
        ("HLA, auto", "2"),
        ("attention, cached", "1"),
        ("attention, cached", "2"),
    ]
    assert all(float(x["tokens per second"]) > 0 for x in found)
    assert found[0]["implementation"].startswith("portable: ")


# The processes import a backend again, of which torch is the quickest.
torch_alone = pytest.mark.skipif(BACKEND != "torch", reason="the same on all backends")


@torch_alone
def test_memory_of_processes(tmp_path):
    options = ("--shapes", "1x2x70x8", "--peers", "none", "--output", str(tmp_path))
    assert main([*QUICK, *options, "--process-memory"]) == 0
    assert float(rows(tmp_path, "operators")["keras_hla hla2"]["MB"]) >= 0
    small, large = Case.parse("1x2x16x8"), Case.parse("1x2x2048x8")
    which = trainees.Which(["hla2"], [], None)
    arguments = [("layers", "MultiHeadAttention", x, which, "auto") for x in (small, large)]
    assert memory.added(layers.fresh_step, *arguments) > 1


@torch_alone
def test_compiled_blocks(tmp_path, monkeypatch):
    import torch

    quickly = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", quickly)
    monkeypatch.setattr(trainees, "_modules", lambda: ["plain_attention"])
    options = ("--layers", "blocks", "--shapes", "1x2x70x8", "--jit", "on", "--output")
    assert main([*QUICK, *options, str(tmp_path)]) == 0
    (name,) = rows(tmp_path, "layers")
    assert name.endswith(", torch.compile")


def test_steps_compiled_anew_are_refused(monkeypatch):
    monkeypatch.setattr(layers, "LONG", 0)
    monkeypatch.setattr(runtime.current(), "time_calls", lambda call, sets: time.sleep(0.01))
    with pytest.raises(RuntimeError, match="compiled again at each call"):
        layers._compile(None, ())


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow splits no sequence over devices")
def test_scaling_to_two_devices(tmp_path):
    options = ["--size", "small", "--dtype", "float32", "--cases", "data,sequence"]
    options += ["--backend", BACKEND, "--out", tmp_path]
    run_python("-m", "benchmarks.scaling", *options)
    with (tmp_path / f"scaling_{BACKEND}.csv").open(encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    assert [(x["case"], x["mesh"]) for x in rows] == [
        ("data", "1 x 1"),
        ("data", "2 x 1"),
        ("sequence", "1 x 1"),
        ("sequence", "1 x 2"),
    ]
    exchanged = [float(x["megabytes_exchanged"]) for x in rows]
    assert exchanged[0] == exchanged[2] == 0
    model, _ = scaling.make_model(scaling.parse(options[:4]))
    assert exchanged[1] == pytest.approx(4 * model.count_params() / 1e6, rel=1e-4)  # gradients
    # A state and the decays over it of each pass, forward and backward, and of hla2 two passes.
    assert 0 < exchanged[3] < 0.2
    assert (tmp_path / f"scaling_{BACKEND}.png").exists()


@torch_alone
def test_long_sequence():
    options = ("--length", 512, "--remat-lengths", 128, "--backend", BACKEND)
    assert "MB peak memory" in run_python("-m", "benchmarks.long_sequence", *options)
