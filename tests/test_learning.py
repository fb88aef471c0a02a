"""The benchmark of learning: its tasks, peers and candidates, and that what it records is right."""

import csv
import dataclasses
import functools
from pathlib import Path
import shutil

from backends import relative_error
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from benchmarks.learning import __main__ as command
from benchmarks.learning import mixers, model, optimizer, peers, report, summary, tasks, train
from benchmarks.learning.delta_rule import gated_delta_rule
from benchmarks.learning.operators import CANDIDATES
from benchmarks.learning.records import SETTINGS
from benchmarks.learning.tasks import (
    copying,
    far,
    in_context_recall,
    language,
    mqar,
    selective_copy,
    series,
    state_tracking,
)
from keras_hla import ops


def drawn(function, *arguments):
    batch = function(jax.random.key(3), *arguments)
    return batch._replace(**{k: np.asarray(v) for k, v in batch._asdict().items() if v is not None})


def test_multi_query_associative_recall():
    kinds = ((16, 2), (32, 4))
    batch = drawn(mqar.draw, (64, 64, kinds), (0.5, 0.5))
    counts = batch.weights.sum(axis=1).astype(int)
    assert set(counts) == {2, 4}
    for tokens, targets, places, count in zip(
        batch.inputs, batch.targets, batch.places, counts, strict=True
    ):
        keys, values = tokens[: 2 * count : 2], tokens[1 : 2 * count : 2]
        assert len(set(keys)) == len(set(values)) == count
        assert keys.min() >= 1
        assert keys.max() < 32 <= values.min()
        value_of = dict(zip(keys, values, strict=True))
        asked = places[:count]
        assert [value_of[tokens[place]] for place in asked] == list(targets[:count])
        assert set(tokens[asked]) == set(keys)
        assert ((asked - 2 * count) % 2 == 0).all()
        assert asked.min() >= 2 * count
        assert asked.max() < dict(map(reversed, kinds))[count]
        others = np.setdiff1d(np.arange(2 * count, 32), asked)
        assert (tokens[others] == 0).all()


@pytest.mark.parametrize("name", ["parity", "s3", "s5"])
def test_running_products(name):
    task = tasks.make(name, "small")
    batch = drawn(task.draw, (4, 12), (5, 9))
    elements = list(state_tracking.itertools.permutations(range(state_tracking.THINGS[name])))
    for tokens, targets in zip(batch.inputs, batch.targets, strict=True):
        moved = list(range(len(elements[0])))
        for token, target in zip(tokens, targets, strict=True):
            moved = [elements[token][i] for i in moved]  # what was moved so far, moved on
            assert elements[target] == tuple(moved)
    assert (batch.weights == (np.arange(12) >= 5) * (np.arange(12) < 9)).all()


@pytest.mark.parametrize(
    ("function", "shape", "alphabet"),
    [(selective_copy.draw, (8, 40, 6), selective_copy.BLANK), (far.draw, (8, 60, 16, 5), 16)],
)
def test_marked_tokens_are_asked_in_order(function, shape, alphabet):
    batch = drawn(function, shape, ())
    count = shape[-1]
    for tokens, targets, places in zip(batch.inputs, batch.targets, batch.places, strict=True):
        assert list(tokens[tokens < alphabet]) == list(targets)
        assert list(places) == list(range(len(tokens) - count, len(tokens)))
        if len(shape) == 4:
            assert np.flatnonzero(tokens < alphabet).max() < shape[2]
        else:
            assert tokens[-count - 1] == selective_copy.COPY
    assert len({tuple(tokens < alphabet) for tokens in batch.inputs}) > 1


def test_in_context_recall():
    batch = drawn(in_context_recall.draw, (8, 32, 16), ())
    for tokens, targets, weights, places in zip(*batch[:4], strict=True):
        value_of = {}
        for place, target, weight in zip(places, targets, weights, strict=True):
            assert weight == (tokens[place] in value_of)
            assert value_of.setdefault(tokens[place], tokens[place + 1]) == target
    assert 0 < batch.weights.mean() < 1


def test_copying():
    batch = drawn(copying.draw, (16, 9), (3, 9))
    counts = batch.weights.sum(axis=1).astype(int)
    assert counts.min() >= 3
    assert len(set(counts)) > 3
    for tokens, targets, places, count in zip(
        batch.inputs, batch.targets, batch.places, counts, strict=True
    ):
        copied = list(targets[:count])
        row = [*copied, copying.SEPARATOR, *copied]
        assert list(tokens) == (row + [copying.END] * 18)[:18]
        assert list(places[:count]) == list(range(count, 2 * count))


def test_series():
    batch = drawn(series.draw, (16, 20), ())
    assert len({int(x) for x in batch.places[:, 0]}) > 3
    for numbers, mask, place, target in zip(
        batch.inputs[..., 0], batch.mask, batch.places, batch.targets, strict=True
    ):
        left = numbers[mask].astype("float64")
        assert place == np.flatnonzero(mask).max()
        fading = 0.8 ** np.arange(len(left) - 2, -1, -1)
        expected = 0.6 * (fading * left[1:] * left[:-1]).sum()
        np.testing.assert_allclose(target, expected, atol=1e-5)


def test_language_reads_its_part():
    text, cut = language.corpus()
    assert 0.9 < cut / len(text) < 0.99
    batch = drawn(functools.partial(language.draw, jnp.asarray(text)), (4, 50), (cut, len(text)))
    held_out, found = text[cut:].tobytes(), []
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        assert (inputs[1:] == targets[:-1]).all()
        found.append(held_out.find(bytes([*inputs.tolist(), targets[-1]])))
    assert -1 not in found
    assert len(set(found)) == 4


def random_heads(rng, *shape):
    return [rng.standard_normal(shape).astype("float32") for _ in range(3)]


def test_gated_delta_rule(rng):
    q, k, v = random_heads(rng, 2, 150, 2, 8)
    k[:, 20:90] = k[:, 20:21]  # written to the same key again and again
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    log_decay = -rng.exponential(0.1, (2, 150, 2)).astype("float32")
    rate = rng.uniform(0, 1, (2, 150, 2)).astype("float32")
    state, expected = np.zeros((2, 2, 8, 8)), np.zeros(q.shape)
    for t in range(150):
        key, b = k[:, t].astype("float64"), rate[:, t, :, None, None]
        erase = np.eye(8) - b * key[..., :, None] * key[..., None, :]
        state = np.exp(log_decay[:, t])[..., None, None] * (erase @ state)
        state = state + b * key[..., :, None] * v[:, t, :, None, :]
        expected[:, t] = np.einsum("bhd,bhde->bhe", q[:, t], state)
    assert relative_error(gated_delta_rule(q, k, v, log_decay, rate), expected) <= 1e-5


#: What is added to second order: the prior of the moment, and first order.
ADDED = {
    "hla2_prior0.3": (0.3, 0),
    "hla2_prior": (1, 0),
    "hla2_prior3": (3, 0),
    "hla2_first": (0, 1),
    "hla2_prior_first": (1, 1),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_candidates(rng, name):
    q, k, v = random_heads(rng, 2, 40, 2, 4)
    log_decay = -rng.exponential(0.1, (2, 40, 2)).astype("float32")
    total = log_decay.astype("float64").cumsum(axis=1).transpose(0, 2, 1)
    A = np.einsum("bthd,bihd->bhti", q, k, dtype="float64")
    T = np.einsum("bthd,bihd->bhti", q, q, dtype="float64")
    D = np.tril(np.exp(np.minimum(total[..., :, None] - total[..., None, :], 0)))
    if name == "ahla_first":
        w = (D * A) @ (D * A) + D * A
    else:
        order = np.triu(np.ones((40, 40)))  # i <= j
        w = np.einsum("bhti,bhji,bhti,bhtj,ij->bhtj", A, A, D, D, order)
        prior, first = ADDED[name]
        w += prior * D**2 * T + first * D * A
    expected = np.einsum("bhtj,bjhd->bthd", w, v)
    for form, chunk_size in (("chunked", 7), ("recurrent", None), ("matrix", None)):
        options = {"chunk_size": chunk_size} if chunk_size else {}
        output = ops.higher_order_attention(q, k, v, name, form, log_decay=log_decay, **options)
        assert relative_error(output, expected) <= 1e-5


@pytest.mark.parametrize("name", mixers.PEERS)
def test_masked_tokens_are_as_if_they_were_not_there(rng, name, monkeypatch):
    monkeypatch.setattr(peers, "QUERIES_AT_ONCE", 6)
    layer = mixers.make(name, 2, 4)
    x = rng.standard_normal((2, 18, 12)).astype("float32")
    mask = np.zeros((2, 18), bool)
    mask[0, rng.permutation(18)[:11]] = mask[1, rng.permutation(18)[:11]] = True
    layer.build(x.shape)
    output = np.asarray(layer(x, mask=jnp.asarray(mask)))
    alone = np.asarray(layer(np.stack([row[kept] for row, kept in zip(x, mask, strict=True)])))
    for row, kept, expected in zip(output, mask, alone, strict=True):
        assert relative_error(row[kept], expected) <= 1e-5


def test_optimizer_is_adam_with_decay(rng):
    start = [rng.standard_normal(shape).astype("float32") for shape in ((3, 4), (4,))]
    weights, moments = [jnp.asarray(x) for x in start], optimizer.start(start)
    peer = [keras.Variable(x) for x in start]
    adam = keras.optimizers.AdamW(
        0.01, weight_decay=0.1, beta_1=0.9, beta_2=0.95, epsilon=1e-8, global_clipnorm=1.0
    )
    adam.exclude_from_weight_decay(var_list=[peer[1]])
    for step in range(5):
        gradients = [rng.standard_normal(x.shape).astype("float32") for x in start]
        adam.apply([jnp.asarray(x) for x in gradients], peer)
        weights, moments = optimizer.update(weights, moments, gradients, step, 0.01)
    for ours, theirs in zip(weights, peer, strict=True):
        assert relative_error(ours, theirs.value) <= 1e-5


def test_a_replicate_is_as_if_it_were_alone():
    task = dataclasses.replace(tasks.make("in_context_recall", "small"), steps=6, tests={})
    wanted = [train.Replicate(4e-3, 1), train.Replicate(float("nan"), 0)]
    together = train.Trainer(task, "hla2+conv", at_once=2, dispatched=2).run(wanted)
    (alone,) = train.Trainer(task, "hla2+conv", at_once=1, dispatched=2).run(wanted[:1])
    for name in ("last loss", "valid loss"):
        np.testing.assert_allclose(together[0].values[name], alone.values[name], rtol=1e-5)
    assert together[0].values["diverged"] == 0
    assert together[1].values["diverged"] == 1
    assert np.isnan(together[1].values["valid loss"])
    assert np.isnan(together[1].values["valid accuracy"])


def rows(folder):
    with open(folder / "in_context_recall.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_learns_records_and_resumes(tmp_path, monkeypatch, capsys):
    options = ["--task", "in_context_recall", "--size", "small", "--mixers", "linear+conv"]
    options += ["--steps", "100", "--rates", "1e-5,8e-3", "--at-once", "2", "--out", str(tmp_path)]
    assert command.main([*options, "--seeds", "1"]) == 0
    first = rows(tmp_path)
    assert [(row["rate"], row["seed"]) for row in first] == [("1e-05", "0"), ("0.008", "0")]
    assert float(first[0]["accuracy 32"]) < 0.5
    assert float(first[1]["accuracy 32"]) > 0.9  # a guess has one in eight
    assert float(first[1]["valid accuracy"]) > 0.9
    assert "| linear+conv | 64 |" in (tmp_path / "in_context_recall.md").read_text()
    assert (tmp_path / "in_context_recall.png").read_bytes().startswith(b"\x89PNG")
    assert command.main([*options, "--seeds", "2"]) == 0
    second = rows(tmp_path)
    assert second[:2] == first
    assert [(row["rate"], row["seed"]) for row in second[2:]] == [("0.008", "1")]
    monkeypatch.setattr(train, "Trainer", None)  # nothing is left to be trained
    assert command.main([*options, "--seeds", "2"]) == 0
    assert rows(tmp_path) == second
    capsys.readouterr()
    assert command.main([*options, "--seeds", "3", "--minutes", "1e-6"]) == 3
    assert "1 replicates are not trained, as no time is left" in capsys.readouterr().out


MATCHED = ["hla2+rope+decay+conv", "delta+gate", "softmax+conv", "gru", "hla3"]


@pytest.mark.parametrize("name", MATCHED)
def test_numbers_of_weights_are_matched(name):
    task = tasks.make("s5", "full")

    def count(mixer):
        return model.make(task, mixer, model.hidden_size(task, mixer)).count_params()

    assert abs(count(name) / count("hla2") - 1) < 0.02


def test_refuses(monkeypatch):
    for name in ("hla2+convolution", "hla4", "softmax+decay", ""):
        with pytest.raises(ValueError, match="A mixer must be one of"):
            mixers.check(name)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    with pytest.raises(SystemExit, match="KERAS_BACKEND must be 'jax'"):
        command.main(["--task", "mqar"])


def test_a_rate_with_one_seed_replaces_no_complete_row():
    def reported(*results):
        settings = dict.fromkeys(SETTINGS, "1") | {"weights": "1", "state": "1", "diverged": "0"}
        names = "rate", "seed", "valid loss"
        found = [
            settings
            | dict(zip(names, map(str, result), strict=True))
            | {"bits 8": "1", "curve": "1"}
            for result in results
        ]
        (line,) = report.lines(found, "bits")
        return line.rate, len(line.curves), line.edge

    first, best, other, late = (0.1, 0, 3.0), (0.2, 0, 2.0), (0.2, 1, 4.0), (0.4, 0, 1.0)
    assert reported(first, best, late) == (0.4, 1, True)
    assert reported(first, best, other, late) == (0.2, 2, True)
    assert reported(first, best, other, (0.4, 0, 5.0)) == (0.2, 2, False)
    assert reported(first, best, other, late, (0.4, 1, 4.0)) == (0.4, 2, True)


def test_plot_of_the_records(tmp_path):
    """It is drawn of the records that are published."""
    for path in (Path(__file__).parent.parent / "docs" / "evidence").glob("*.csv"):
        shutil.copy(path, tmp_path)
    assert summary.save(tmp_path).stat().st_size > 10_000


def test_mixers_that_differ_by_layer():
    task = tasks.make("mqar", "small")
    name = "linear+conv/hla2+conv"
    mixers.check(name)
    made = model.make(task, name, 0)
    blocks = [layer.mixer for layer in made.layers if isinstance(layer, model.Block)]
    assert [len(x.cell.operator.state_names) for x in blocks] == [1, 2]
    with pytest.raises(ValueError, match=r"must be one of.*Received: 'hla9'"):
        mixers.check("linear/hla9")
