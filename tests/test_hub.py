"""The models for keras-hub: what they generate, and what keras-hub asks of its models."""

import json

from backends import relative_error, to_numpy
import h5py
import keras
import keras_hub
from keras_hub.samplers import (
    BeamSampler,
    GreedySampler,
    TopPSampler,
)
import numpy as np
import pytest
from scripts import run_python

from keras_hla import generate, streaming_model
from keras_hla.hub import HLABackbone, HLACausalLM, HLACausalLMPreprocessor, HLATokenizer

END = "<|endoftext|>"
LETTERS = list("abcdefghijklmnopqrstuvwxyz")
MERGES = ["t h", "th e", "a n", "an d", "i n", "Ġ the", "o n", "e r"]
TOKENS = [END, *LETTERS, "Ġ", *(merge.replace(" ", "") for merge in MERGES)]
TEXTS = ["the cat and the dog", "in on", "and then there", "a"]
LENGTH = 14
# A reused vocabulary may hold fewer tokens than the model has ids.
SIZE = 40

# What Keras says of layers that do not pass on a mask.
pytestmark = pytest.mark.filterwarnings("error:Layer .* was passed an input with a mask")

EVERY_OPTION = {
    "intermediate_dim": 20,
    "key_dim": 6,
    "dropout": 0.1,
    "norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "seed": 3,
    "num_key_value_heads": 1,
    "operator": "ahla",
    "decay": "learned",
    "conv_kernel_size": None,
    "output_gate": "silu",
    "activation": "gelu",
    "kernel_initializer": "he_normal",
}


def make_backbone(**options):
    backbone = HLABackbone(
        **{"vocabulary_size": SIZE, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, **options}
    )
    # With scales of both signs, the likeliest token is not ever the one before it.
    scale = np.random.default_rng(1).standard_normal(16)
    backbone.norm.scale.assign(scale)
    return backbone


def make_preprocessor(**options):
    tokenizer = HLATokenizer({token: i for i, token in enumerate(TOKENS)}, MERGES)
    return HLACausalLMPreprocessor(tokenizer, **{"sequence_length": LENGTH, **options})


def make_lm(preprocessor=None, sampler="greedy", **options):
    causal_lm = HLACausalLM(make_backbone(**options), preprocessor)
    causal_lm.compile(optimizer=keras.optimizers.Adam(1e-2), sampler=sampler)
    return causal_lm


def make_prompts(rng, lengths):
    token_ids = rng.integers(1, SIZE, (len(lengths), LENGTH)).astype("int32")
    padding_mask = np.arange(LENGTH) < np.array(lengths)[:, None]
    return {"token_ids": token_ids * padding_mask, "padding_mask": padding_mask}


@pytest.fixture(scope="module")
def language_model():
    """One for all tests that change no weights: what it compiles once, it keeps."""
    keras.utils.set_random_seed(0)
    return make_lm()


@pytest.fixture(scope="module")
def reader(language_model):
    """The same model, which forgets nothing when the other is compiled again."""
    return keras.Model(language_model.input, language_model.output)


@pytest.fixture
def prompts():
    return make_prompts(np.random.default_rng(0), [1, 5, 3])


@pytest.fixture(scope="module")
def greedy_tokens(reader):
    prompts = make_prompts(np.random.default_rng(0), [1, 5, 3])
    return continue_naively(reader, prompts, GreedySampler())


def test_a_split_model_does_not_generate(language_model, prompts, monkeypatch):
    mixer = language_model.backbone.decoder_blocks[1].mixer
    monkeypatch.setattr(mixer, "_context_parallel", "parts")
    with pytest.raises(ValueError, match="must have context_parallel=None"):
        language_model.generate(prompts, stop_token_ids=None)


def logits_of(model, token_ids):
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    return model.predict(inputs, verbose=0)


def continue_naively(model, prompts, sampler):
    """Reads the whole text anew for each token, and samples it."""
    token_ids = prompts["token_ids"].copy()
    for t in range(prompts["padding_mask"].sum(axis=1).min(), LENGTH):
        logits = keras.ops.convert_to_tensor(logits_of(model, token_ids)[:, t - 1])
        sampled = sampler.get_next_token(sampler.compute_probabilities(logits))
        sampled = keras.ops.convert_to_numpy(sampled)
        token_ids[:, t] = np.where(prompts["padding_mask"][:, t], token_ids[:, t], sampled)
    return token_ids


def test_greedy_generation_is_the_naive_forward(language_model, prompts, greedy_tokens):
    outputs = language_model.generate(prompts, stop_token_ids=None)
    np.testing.assert_array_equal(outputs["token_ids"], greedy_tokens)
    assert outputs["padding_mask"].all()
    # The test would be weak if the model only repeated itself.
    assert len(np.unique(greedy_tokens)) >= 8


def test_long_prompts(language_model, reader, rng):
    """The shortest is longer than one token, and one leaves nothing to write."""
    language_model.compile(sampler="greedy")
    prompts = make_prompts(rng, [4, LENGTH, 6])
    outputs = language_model.generate(prompts, stop_token_ids=None)
    expected = continue_naively(reader, prompts, GreedySampler())
    np.testing.assert_array_equal(outputs["token_ids"], expected)


def test_generation_with_other_blocks_is_the_naive_forward(prompts):
    causal_lm = make_lm(
        num_layers=3,
        operator=["ahla", "linear"],
        decay="learned",
        conv_kernel_size=None,
        rope_max_wavelength=None,
        normalize=True,
        feature_map="softplus",
        tie_word_embeddings=False,
    )
    outputs = causal_lm.generate(prompts, stop_token_ids=None)
    expected = continue_naively(causal_lm, prompts, GreedySampler())
    np.testing.assert_array_equal(outputs["token_ids"], expected)


def test_samplers_draw_from_the_naive_forward(language_model, reader, prompts):
    language_model.compile(sampler=TopPSampler(p=0.8, k=20, seed=1))
    outputs = language_model.generate(prompts, stop_token_ids=None)
    expected = continue_naively(reader, prompts, TopPSampler(p=0.8, k=20, seed=1))
    np.testing.assert_array_equal(outputs["token_ids"], expected)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_beams(language_model, reader, prompts, greedy_tokens, num_beams):
    """One is greedy; more are those of a search that reads the whole text for each token."""
    language_model.compile(sampler=BeamSampler(num_beams=num_beams))
    outputs = language_model.generate(prompts, stop_token_ids=None)
    expected = greedy_tokens
    if num_beams > 1:
        expected = search_naively(reader, prompts, num_beams)
        assert np.any(expected != greedy_tokens)
    np.testing.assert_array_equal(outputs["token_ids"], expected)


def search_naively(model, prompts, num_beams):
    """Beam search over whole texts, row by row, as keras-hub defines it."""
    rows = []
    for token_ids, given in zip(*prompts.values(), strict=True):
        beams = [(0.0, token_ids)]
        for t in range(1, LENGTH):
            texts = np.stack([text for _, text in beams] * num_beams)[:num_beams]
            logits = to_numpy(logits_of(model, texts))[:, t - 1]
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            candidates = [
                (score + log_probs[beam, token], text, token)
                for beam, (score, text) in enumerate(beams)
                for token in range(SIZE)
            ]
            best = sorted(candidates, key=lambda x: -x[0])[:num_beams]
            beams = []
            for score, beam, token in best:
                text = beam.copy()
                text[t] = text[t] if given[t] else token
                beams.append((score, text))
        rows.append(max(beams, key=lambda x: x[0])[1])
    return np.stack(rows)


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="JAX always runs under XLA, PyTorch never does"
)
def test_generation_under_xla(language_model, prompts, greedy_tokens):
    language_model.compile(sampler="greedy", jit_compile=True)
    outputs = language_model.generate(prompts, stop_token_ids=None)
    language_model.compile(sampler="greedy", jit_compile=False)
    np.testing.assert_array_equal(outputs["token_ids"], greedy_tokens)


def test_stop_tokens(language_model, prompts, greedy_tokens):
    """Each row ends with its first stop token, which may be the padding's, too."""
    language_model.compile(sampler="greedy")
    free, given = greedy_tokens, prompts["padding_mask"]
    stops = [int(free[0, 4]), int(free[1, 8])]
    padded = {**prompts, "token_ids": np.where(given, prompts["token_ids"], stops[0])}
    outputs = language_model.generate(padded, stop_token_ids=stops)
    ends = (np.isin(free, stops) & ~given).argmax(axis=1)
    assert ends[0] <= 4
    assert ends[1] <= 8
    ends[2] = ends[2] or LENGTH
    mask = np.arange(LENGTH) <= ends[:, None]
    np.testing.assert_array_equal(outputs["padding_mask"], mask)
    np.testing.assert_array_equal(outputs["token_ids"][mask], free[mask])


def test_an_early_end_and_an_empty_prompt(language_model, prompts, greedy_tokens):
    """An empty prompt is its first token."""
    language_model.compile(sampler="greedy")
    prompts["padding_mask"][0] = False
    outputs = language_model.generate(prompts, stop_token_ids=list(range(SIZE)))
    np.testing.assert_array_equal(outputs["padding_mask"].sum(axis=1), [2, 6, 4])
    np.testing.assert_array_equal(outputs["token_ids"][:, :6], greedy_tokens[:, :6])
    np.testing.assert_array_equal(outputs["token_ids"][:, 6:], 0)  # the padding, as it was


def test_strings():
    causal_lm = make_lm(make_preprocessor(sequence_length=30))
    together = causal_lm.generate(TEXTS[:2], max_length=LENGTH)
    assert all(text.startswith(prompt) for text, prompt in zip(together, TEXTS, strict=False))
    assert len(together[1]) > len(TEXTS[1])
    stripped = causal_lm.generate(TEXTS[:2], max_length=LENGTH, strip_prompt=True)
    assert [prompt + text for prompt, text in zip(TEXTS, stripped, strict=False)] == together


def test_padding_does_not_matter(rng):
    """On the right or on the left."""
    backbone = make_backbone()
    text = rng.integers(1, SIZE, (1, 9)).astype("int32")
    noise = rng.integers(1, SIZE, (1, LENGTH - 9)).astype("int32")
    token_ids = np.concatenate([np.hstack([text, noise]), np.hstack([noise, text])])
    keep = np.stack([np.arange(LENGTH) < 9, np.arange(LENGTH) >= LENGTH - 9])
    outputs = backbone.predict({"token_ids": token_ids, "padding_mask": keep}, verbose=0)
    alone = logits_of(backbone, text)[0]
    assert relative_error(outputs[0, :9], alone) <= 1e-5
    assert relative_error(outputs[1, -9:], alone) <= 1e-5


@pytest.mark.parametrize("options", [{}, EVERY_OPTION, {"operator": ["linear", "hla2"]}])
def test_config(options):
    backbone = make_backbone(**options)
    config = backbone.get_config()
    assert set(EVERY_OPTION) | {"vocabulary_size", "num_layers", "hidden_dim"} <= set(config)
    assert {name: config[name] for name in options if name != "kernel_initializer"} == {
        name: value for name, value in options.items() if name != "kernel_initializer"
    }
    assert HLABackbone.from_config(config).get_config() == config
    causal_lm = HLACausalLM(backbone, make_preprocessor())
    serialized = keras.saving.serialize_keras_object(causal_lm)
    again = keras.saving.deserialize_keras_object(serialized)
    assert isinstance(again, HLACausalLM)
    assert again.backbone.get_config() == config
    assert again.preprocessor.sequence_length == LENGTH


def test_alternating_operators():
    backbone = make_backbone(num_layers=3, operator=("linear", "hla2"))
    names = [block.get_config()["operator"] for block in backbone.decoder_blocks]
    assert names == ["linear", "hla2", "linear"]
    assert make_backbone(num_layers=2).get_config()["operator"] == ["linear", "hla2"]
    assert make_backbone(num_layers=1).get_config()["operator"] == "hla2"


def test_dropout_of_the_blocks_differs():
    backbone = make_backbone(dropout=0.5, seed=3)
    assert [block.cell.seed for block in backbone.decoder_blocks] == [3, 4]


def check_equal(loaded, causal_lm):
    """Weights, configs and vocabularies, on which all else depends."""
    assert isinstance(loaded, HLACausalLM)
    assert loaded.backbone.get_config() == causal_lm.backbone.get_config()
    for a, b in zip(loaded.get_weights(), causal_lm.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert loaded.preprocessor.get_config() == causal_lm.preprocessor.get_config()
    assert loaded.preprocessor.tokenizer(TEXTS) == causal_lm.preprocessor.tokenizer(TEXTS)


def test_keras_file(tmp_path):
    causal_lm = make_lm(make_preprocessor(), **EVERY_OPTION)
    causal_lm.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    check_equal(loaded, causal_lm)
    loaded.compile(sampler="greedy")  # keras-hub saves no sampler
    assert loaded.generate(TEXTS) == causal_lm.generate(TEXTS)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_weights_of_another_dtype(dtype, tmp_path):
    """They are at the same paths in every dtype, which Keras makes of the names of classes."""
    backbone = make_backbone()
    backbone.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as weights:
        assert "rms_normalization" in weights["layers"]
    loaded = HLABackbone.from_config({**backbone.get_config(), "dtype": dtype})
    loaded.load_weights(tmp_path / "model.weights.h5")
    assert relative_error(loaded.norm.scale, backbone.norm.scale) <= 1e-2


def test_preset(tmp_path):
    """Saved, and found again by the base classes of keras-hub."""
    causal_lm = make_lm(make_preprocessor())
    preset = str(tmp_path / "preset")
    causal_lm.save_to_preset(preset)
    check_equal(keras_hub.models.CausalLM.from_preset(preset), causal_lm)
    backbone = keras_hub.models.Backbone.from_preset(preset)
    assert isinstance(backbone, HLABackbone)
    for a, b in zip(backbone.get_weights(), causal_lm.backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    fresh = HLABackbone.from_preset(preset, load_weights=False, dtype="bfloat16")
    assert fresh.compute_dtype == "bfloat16"
    tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(preset)
    assert isinstance(tokenizer, HLATokenizer)
    assert tokenizer(TEXTS) == causal_lm.preprocessor.tokenizer(TEXTS)
    preprocessor = keras_hub.models.CausalLMPreprocessor.from_preset(preset)
    assert isinstance(preprocessor, HLACausalLMPreprocessor)


def test_preprocessor():
    preprocessor = make_preprocessor()
    (x, y, sample_weight) = preprocessor(TEXTS)
    token_ids, padding_mask, y, sample_weight = map(
        keras.ops.convert_to_numpy, (x["token_ids"], x["padding_mask"], y, sample_weight)
    )
    ids = {token: i for i, token in enumerate(TOKENS)}
    expected = [ids[token] for token in (END, "the", "Ġ", "c", "a", "t", "Ġ", "and", "Ġthe")]
    assert token_ids[0, :9].tolist() == expected
    np.testing.assert_array_equal(token_ids[:, 1:], y[:, :-1])
    np.testing.assert_array_equal(padding_mask[:, 1:], sample_weight[:, :-1])
    assert token_ids[3].tolist() == [0, ids["a"]] + [0] * (LENGTH - 2)
    assert padding_mask[3].tolist() == [True] * 3 + [False] * (LENGTH - 3)
    assert preprocessor.generate_postprocess(preprocessor.generate_preprocess(TEXTS)) == TEXTS


def test_it_learns_to_write():
    preprocessor = make_preprocessor()
    causal_lm = make_lm()
    causal_lm.compile(optimizer=keras.optimizers.Adam(2e-2), sampler="greedy")
    x, y, sample_weight = preprocessor(TEXTS)
    causal_lm.fit(x, y, sample_weight=sample_weight, epochs=25, verbose=0)
    causal_lm.preprocessor = preprocessor
    assert causal_lm.generate(["and then", "the cat"]) == [TEXTS[2], TEXTS[0]]


def test_low_precision(prompts):
    causal_lm = make_lm(dtype="mixed_bfloat16")
    outputs = causal_lm.generate(prompts, stop_token_ids=None)["token_ids"]
    assert outputs.max() < SIZE
    assert outputs.min() >= 0
    assert causal_lm.backbone.output.dtype == "bfloat16"
    states = causal_lm.backbone.get_initial_state(1)
    assert {keras.backend.standardize_dtype(x.dtype) for s in states for x in s} == {"float32"}


def test_lora(prompts, tmp_path):
    causal_lm = make_lm()
    backbone, weights = causal_lm.backbone, causal_lm.get_weights()
    backbone.enable_lora(2)
    causal_lm.compile(optimizer=keras.optimizers.Adam(0.1))
    adapters = causal_lm.trainable_variables
    assert {v.path.split("/")[-1] for v in adapters} == {"lora_kernel_a", "lora_kernel_b"}
    assert len(adapters) == 2 * 2 * backbone.num_layers
    frozen, before = (
        [to_numpy(v) for v in some] for some in (causal_lm.non_trainable_variables, adapters)
    )
    token_ids = prompts["token_ids"]
    x = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    causal_lm.fit(x, np.roll(token_ids, 3, axis=1), epochs=2, verbose=0)
    for variable, value in zip(causal_lm.non_trainable_variables, frozen, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)
    for variable, value in zip(adapters, before, strict=True):
        assert np.any(to_numpy(variable) != value)
    backbone.save_lora_weights(tmp_path / "adapters.lora.h5")
    twin = make_lm()
    twin.set_weights(weights)
    twin.backbone.load_lora_weights(tmp_path / "adapters.lora.h5")
    for a, b in zip(twin.get_weights(), causal_lm.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_generation_is_by_the_model_as_it_is_now(prompts, rng):
    causal_lm = make_lm()
    before = to_numpy(causal_lm.generate(prompts, stop_token_ids=None)["token_ids"])
    embedding = causal_lm.backbone.token_embedding
    embedding.enable_lora(2)
    embedding.lora_embeddings_b.assign(rng.standard_normal(embedding.lora_embeddings_b.shape))
    after = to_numpy(causal_lm.generate(prompts, stop_token_ids=None)["token_ids"])
    reader = keras.Model(causal_lm.input, causal_lm.output)
    np.testing.assert_array_equal(after, continue_naively(reader, prompts, GreedySampler()))
    assert not np.array_equal(before, after)


def test_streams_and_the_other_generate(language_model, reader, rng):
    with pytest.raises(ValueError, match=r"`model.generate\(...\)`"):
        generate(language_model, [1, 2], 3)
    stream = streaming_model(language_model)
    inputs = make_prompts(rng, [LENGTH, 5, 9])
    expected, states = reader.predict_on_batch(inputs), stream.initial_state(3)
    for begin, end in ((0, 5), (5, 6), (6, LENGTH)):  # The second begins with padding in a row.
        piece = {name: x[:, begin:end] for name, x in inputs.items()}
        outputs = stream.predict_on_batch(piece | states)
        states = {name: outputs[name] for name in stream.state_names}
        (name,) = outputs.keys() - states.keys()
        assert relative_error(outputs[name], expected[:, begin:end]) <= 1e-5


def test_score(language_model, reader, rng):
    token_ids = rng.integers(1, SIZE, (3, LENGTH)).astype("int32")
    target_ids = np.roll(token_ids, -1, axis=1)
    losses = language_model.score(token_ids, scoring_mode="loss", target_ids=target_ids)
    logits = to_numpy(logits_of(reader, token_ids))
    log_sums = np.log(np.exp(logits).sum(-1))
    expected = log_sums - np.take_along_axis(logits, target_ids[..., None], -1)[..., 0]
    assert relative_error(losses, expected) <= 1e-5
    with pytest.raises(ValueError, match=r"`scoring_mode` must be one of .*scoring_mode='sum'"):
        language_model.score(token_ids, scoring_mode="sum")
    with pytest.raises(ValueError, match=r"`target_ids` must be .*Received: target_ids=None"):
        language_model.score(token_ids, scoring_mode="loss")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary_size": 0}, "`vocabulary_size` must be a positive integer.*=0"),
        ({"num_layers": 0}, "`num_layers` must be a positive integer. Received: num_layers=0"),
        ({"num_heads": 0}, "`num_heads` must be a positive integer. Received: num_heads=0"),
        ({"hidden_dim": 2.0}, "`hidden_dim` must be a positive integer.*hidden_dim=2.0"),
        ({"num_heads": 3}, "`hidden_dim` must be a multiple.*hidden_dim=16, num_heads=3"),
        ({"dropout": 1.0}, r"`dropout` must be a number in \[0, 1\).*dropout=1.0"),
        ({"return_state": False}, "no argument `return_state`.*return_state=False"),
        ({"stateful": True}, "no argument `stateful`.*stateful=True"),
        ({"causal": False}, "no argument `causal`.*Received: causal=False"),
        ({"go_backwards": True}, "no argument `go_backwards`.*go_backwards=True"),
        ({"operator": []}, r"`operator` must be .*Received: operator=\[\], num_layers=2"),
        ({"operator": ["hla2"] * 3}, "`operator` must be .* at most `num_layers`.*num_layers=2"),
        ({"num_hedas": 3}, "passed to HLABackbone: {'num_hedas': 3}"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_backbone(**arguments)


def test_numbers_of_numpy():
    sizes = {"vocabulary_size": 11, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "seed": 1}
    backbone = HLABackbone(**{name: np.int64(size) for name, size in sizes.items()})
    config = json.loads(json.dumps(backbone.get_config()))
    assert {name: config[name] for name in sizes} == sizes
    assert HLABackbone.from_config(config).get_config() == backbone.get_config()


def test_a_vocabulary_without_end_token():
    with pytest.raises(ValueError, match="endoftext"):
        HLATokenizer({"a": 0, "b": 1, "ab": 2}, ["a b"])


def test_keras_hub_is_optional():
    code = """
import sys
import keras_hla
assert "keras_hub" not in sys.modules
sys.modules["keras_hub"] = None
try:
    import keras_hla.hub
except ImportError as error:
    assert 'pip install "keras-hla[hub]"' in str(error), error
else:
    raise AssertionError
"""
    run_python("-c", code, backend="jax")
