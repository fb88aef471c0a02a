"""Bad input raises `ValueError` that names the argument and what was received."""

import keras
import numpy as np
import pytest

from keras_hla import layers, operators, ops


def tensors(query=(2, 6, 4, 8), key=(2, 6, 2, 8), value=(2, 6, 2, 5), dtype="float32"):
    return [np.zeros(shape, dtype) for shape in (query, key, value)]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"query": (2, 6, 8)}, r"`query` must have shape .*Received: query.shape=\(2, 6, 8\)"),
        ({"key": (6, 2, 8)}, r"`key` must have shape .*Received: key.shape=\(6, 2, 8\)"),
        ({"value": (2, 6, 2, 1, 5)}, r"`value` must have shape .*value.shape=\(2, 6, 2, 1, 5\)"),
        ({"query": (3, 6, 4, 8)}, r"same batch size.*query.shape=\(3, 6, 4, 8\)"),
        ({"value": (2, 7, 2, 5)}, r"same length.*value.shape=\(2, 7, 2, 5\)"),
        ({"key": (2, 6, 2, 9)}, r"same last dimension.*key.shape=\(2, 6, 2, 9\)"),
        ({"value": (2, 6, 4, 5)}, r"same number of heads.*value.shape=\(2, 6, 4, 5\)"),
        (
            {"key": (2, 6, 3, 8), "value": (2, 6, 3, 5)},
            r"must divide.*num_heads=4, num_key_value_heads=3",
        ),
    ],
)
def test_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        ops.higher_order_attention(*tensors(**shapes))


def test_dtypes():
    with pytest.raises(ValueError, match=r"same floating dtype.*int32"):
        ops.higher_order_attention(*tensors(dtype="int32"))
    query, key, value = tensors()
    with pytest.raises(ValueError, match=r"same floating dtype.*float16"):
        ops.higher_order_attention(query, key, value.astype("float16"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operator": "hla9"}, "`operator` must be one of .*'hla2'.*Received: operator='hla9'"),
        ({"operator": None}, "`operator` must be one of .*Received: operator=None"),
        ({"form": "serial"}, "`form` must be one of .*'chunked'.*Received: form='serial'"),
        ({"chunk_size": 0}, "`chunk_size` must be a positive integer.*chunk_size=0"),
        ({"chunk_size": 2.5}, "`chunk_size` must be a positive integer.*chunk_size=2.5"),
        ({"chunk_size": True}, "`chunk_size` must be a positive integer.*chunk_size=True"),
        ({"log_decay": 0.1}, "`log_decay` must be finite and <= 0.*log_decay=0.1"),
        ({"log_decay": [-0.1, 0.2, 0, 0]}, "`log_decay` must be finite and <= 0"),
        ({"log_decay": np.inf}, "`log_decay` must be finite and <= 0.*log_decay=inf"),
        ({"log_decay": np.nan}, "`log_decay` must be finite and <= 0.*log_decay=nan"),
        ({"log_decay": np.zeros(3)}, r"`log_decay` must be broadcastable.*shape=\(3,\)"),
        ({"log_decay": np.zeros((5, 4))}, r"`log_decay` must be broadcastable.*shape=\(5, 4\)"),
        ({"log_decay": np.zeros((1, 1, 1, 1))}, "`log_decay` must be broadcastable"),
        ({"mask": np.ones((2, 7), bool)}, r"`mask` must have shape .*mask.shape=\(2, 7\)"),
        ({"mask": np.ones((2, 6, 1), bool)}, r"`mask` must have shape .*shape=\(2, 6, 1\)"),
        ({"mask": np.ones((2, 6), "float32")}, "`mask` must be boolean.*float32"),
        (
            {"segment_ids": np.ones((2, 7), "int32")},
            r"`segment_ids` must be integers of shape.*7\)",
        ),
        ({"segment_ids": np.ones((2, 6))}, "`segment_ids` must be integers.*float64"),
        (
            {"segment_ids": np.ones((2, 6), "int32"), "causal": False},
            "`segment_ids` needs causal=True.*Received: causal=False",
        ),
        (
            {"segment_ids": np.ones((2, 6), "int32"), "operator": "hla2_published"},
            "`segment_ids` needs.*Received.*HLA2Published",
        ),
        ({"form": "matrix", "return_state": True}, "`return_state`.*Received: form='matrix'"),
        ({"form": "matrix", "initial_state": []}, "`initial_state`.*Received: form='matrix'"),
        ({"form": "matrix", "chunk_size": 4}, "`chunk_size` needs form='chunked'.*'matrix'"),
        ({"form": "recurrent", "chunk_size": 4}, "`chunk_size` needs form='chunked'"),
        ({"epsilon": 0}, "`epsilon` must be a positive number. Received: epsilon=0"),
        ({"epsilon": "small"}, "`epsilon` must be a positive number. Received: epsilon='small'"),
        ({"ridge": -0.1}, "`ridge` must be a number >= 0. Received: ridge=-0.1"),
        ({"ridge": np.inf}, "`ridge` must be a number >= 0. Received: ridge=inf"),
        ({"operator": "ahla", "ridge": 1.0}, "AHLA knows neither.*`ridge`.*ridge=1.0"),
        ({"operator": "ahla", "masked": False}, "AHLA knows neither.*Received: masked=False"),
        ({"operator": "linear", "masked": False}, "Linear knows neither.*masked=False"),
        ({"operator": "hla3", "ridge": 1.0}, "HLA3 knows neither.*`ridge`.*ridge=1.0"),
        ({"causal": False, "log_decay": -0.1}, "`causal=False`.*log_decay=-0.1"),
        ({"causal": False, "masked": False}, "`causal=False`.*Received.*masked=False"),
        ({"causal": False, "form": "recurrent"}, "`causal=False`.*Received: form='recurrent'"),
        ({"causal": False, "return_state": True}, "`causal=False`.*`return_state`"),
        ({"causal": False, "initial_state": []}, "`causal=False`.*`initial_state`"),
        ({"causal": False, "chunk_size": 4}, "`chunk_size` needs.*Received.*causal=False"),
        ({"causal": False, "operator": "hla2_published"}, "HLA2Published.*`causal=False`"),
        ({"causal": False, "operator": "hla3_published"}, "HLA3Published.*`causal=False`"),
        ({"initial_state": np.zeros((2, 2, 8, 8))}, "`initial_state` must be a list"),
        ({"initial_state": [np.zeros((2, 2, 8, 8))]}, "`initial_state` must be a list.*1 values"),
        (
            {"initial_state": [np.zeros((2, 2, 8, 8)), np.zeros((2, 2, 8, 5))]},
            r"F in argument `initial_state` must have shape \(2, 4, 8, 5\).*\(2, 2, 8, 5\)",
        ),
        (
            {"initial_state": [np.zeros((3, 2, 8, 8)), np.zeros((2, 4, 8, 5))]},
            r"S in argument `initial_state` must have shape \(2, 2, 8, 8\).*\(3, 2, 8, 8\)",
        ),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        ops.higher_order_attention(*tensors(), **options)


def test_first_order():
    with pytest.raises(ValueError, match="`chunk_size` must be a positive integer"):
        ops.causal_linear_attention(*tensors(), chunk_size=-1)


def test_step():
    query, key, value = (x[:, 0] for x in tensors())
    state = [np.zeros((2, 2, 8, 8), "float32"), np.zeros((2, 4, 8, 5), "float32")]
    ops.attention_step(query, key, value, state)
    with pytest.raises(ValueError, match=r"`query` must have shape \(batch, heads, dim\)"):
        ops.attention_step(query[:, None], key, value, state)
    with pytest.raises(ValueError, match="`state` must be a list of the states"):
        ops.attention_step(query, key, value, state[:1])
    with pytest.raises(ValueError, match=r"`state` must be a list of the states.*NoneType"):
        ops.attention_step(query, key, value, None)
    with pytest.raises(ValueError, match="`log_decay` must be broadcastable"):
        ops.attention_step(query, key, value, state, log_decay=np.zeros((2, 3)))


def test_normalized_states_have_a_column_more():
    state = [np.zeros((2, 2, 8, 8), "float32"), np.zeros((2, 4, 8, 5), "float32")]
    with pytest.raises(ValueError, match=r"must have shape \(2, 4, 8, 6\)"):
        ops.higher_order_attention(*tensors(), normalize=True, initial_state=state)


def test_weights():
    query, key, _ = tensors()
    for options, message in (
        ({"operator": "hla9"}, "`operator` must be one of"),
        ({"epsilon": -1}, "`epsilon` must be a positive number"),
        ({"ridge": -1}, "`ridge` must be a number >= 0"),
        ({"causal": False, "log_decay": -0.1}, "`causal=False`"),
        ({"log_decay": 0.5}, "`log_decay` must be finite and <= 0"),
        ({"mask": np.ones((2, 7), bool)}, "`mask` must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.attention_weights(query, key, **options)
    with pytest.raises(ValueError, match=r"`key` must have shape .*Received"):
        ops.attention_weights(query, key[0])


def test_segments():
    query, key, value = tensors()
    segment = ops.summarize(query, key, value)
    with pytest.raises(ValueError, match=r"`query` must have shape .*Received"):
        ops.summarize(query[0], key, value)
    for operator in ("hla2_published", "hla3_published"):
        with pytest.raises(ValueError, match=r"segments of HLA.Published do not compose"):
            ops.summarize(query, key, value, operator)
    with pytest.raises(ValueError, match=r"`right` must be a list of \['S', 'F', 'C'.*3 entries"):
        ops.combine(segment, segment[:3])
    with pytest.raises(ValueError, match=r"`left` must be a list of \['P', 'E', 'R'.*"):
        ops.combine(np.zeros(4), segment, "ahla")


def test_registry():
    with pytest.raises(ValueError, match=r"`name` must be a string other than.*name='hla2'"):
        operators.register("hla2", operators.HLA2())
    with pytest.raises(ValueError, match=r"`name` must be a string.*Received: name=3"):
        operators.register(3, operators.HLA2())
    with pytest.raises(ValueError, match=r"`operator` must be an `Operator` instance.*'ahla'"):
        operators.register("mine", "ahla")
    with pytest.raises(ValueError, match=r"known by name.*Received: operator=HLA2\(ridge=0.7\)"):
        layers.HLA(4, 8, operator=operators.HLA2(ridge=0.7))


def test_unknown_operator():
    with pytest.raises(ValueError, match="Received: operator='softmax'"):
        operators.get("softmax")


@pytest.mark.parametrize("layer", [layers.HLA, layers.HLACell])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, "`num_heads` must be a positive integer. Received: num_heads=0"),
        ({"key_dim": 8.0}, "`key_dim` must be a positive integer. Received: key_dim=8.0"),
        ({"value_dim": -1}, "`value_dim` must be .* Received: value_dim=-1"),
        ({"num_key_value_heads": 3}, "must divide.*num_heads=4, num_key_value_heads=3"),
        ({"num_key_value_heads": 0}, "`num_key_value_heads` must be .*num_key_value_heads=0"),
        ({"operator": "gla"}, "Received: operator='gla'"),
        ({"decay": 0.0}, r"`decay` must be None, a number in \(0, 1\].*Received: decay=0.0"),
        ({"decay": 1.5}, "`decay` must be.*Received: decay=1.5"),
        ({"decay": float("nan")}, "`decay` must be.*Received: decay=nan"),
        ({"decay": [0.9, 0.9]}, r"`decay` must be.*4 such numbers.*decay=\[0.9, 0.9\]"),
        ({"decay": [0.9, 0.9, 0.9, 0]}, "`decay` must be.*Received: decay="),
        ({"decay": "slow"}, "`decay` must be.*'multiscale'.*Received: decay='slow'"),
        ({"decay": True}, "`decay` must be.*Received: decay=True"),
        ({"key_dim": 7}, "`rope_max_wavelength`.*key_dim=7"),
        ({"rope_max_wavelength": -1}, "`rope_max_wavelength`.*rope_max_wavelength=-1"),
        ({"rope_max_wavelength": "long"}, "`rope_max_wavelength`.*rope_max_wavelength='long'"),
        ({"epsilon": 0.0}, "`epsilon` must be a positive number. Received: epsilon=0.0"),
        ({"ridge": -1.0}, "`ridge` must be a number >= 0. Received: ridge=-1.0"),
        ({"operator": "ahla", "masked": False}, "AHLA knows neither.*masked=False"),
        ({"feature_map": "gelu2"}, "`feature_map` must be.*Received: feature_map='gelu2'"),
        ({"output_gate": 3}, "`output_gate` must be None.*Received: output_gate=3"),
        ({"conv_kernel_size": 1}, "`conv_kernel_size` must be .*2 or more.*conv_kernel_size=1"),
        ({"conv_kernel_size": 2.0}, "`conv_kernel_size` must be .*conv_kernel_size=2.0"),
        ({"conv_activation": 3}, "`conv_activation` must be None.*conv_activation=3"),
        ({"dropout": -0.1}, r"`dropout` must be a number in \[0, 1\). Received: dropout=-0.1"),
        ({"output_shape": (3, 4)}, r"`output_shape` must be.*Received: output_shape=\(3, 4\)"),
        ({"scale": "auto"}, "`scale` must be None or a number. Received: scale='auto'"),
    ],
)
def test_layer_arguments(layer, arguments, message):
    with pytest.raises(ValueError, match=message):
        layer(**{"num_heads": 4, "key_dim": 8, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 0}, "`chunk_size` must be .* Received: chunk_size=0"),
        ({"remat_length": 0}, "`remat_length` must be .* Received: remat_length=0"),
        ({"causal": False, "decay": 0.9}, "`decay` must be None. Received: decay=0.9"),
        ({"causal": False, "decay": "input"}, "`decay` must be None. Received: decay='input'"),
        ({"causal": False, "conv_kernel_size": 4}, "`conv_kernel_size` must be None"),
        ({"causal": False, "chunk_size": 4}, "`chunk_size` must be None. Received: chunk_size=4"),
        ({"causal": False, "return_state": True}, "`return_state` must be False"),
        ({"causal": False, "go_backwards": True}, "`go_backwards` must be False"),
        ({"causal": False, "stateful": True}, "`stateful` must be False"),
        ({"causal": False, "masked": False}, "`causal=False`.*Received.*masked=False"),
        ({"causal": False, "operator": "hla3_published"}, "HLA3Published.*`causal=False`"),
    ],
)
def test_sequence_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        layers.HLA(4, 8, **arguments)


def test_calls_of_a_layer_without_causality():
    layer = layers.HLA(4, 8, causal=False)
    x = np.zeros((2, 6, 16), "float32")
    layer(x)
    with pytest.raises(ValueError, match="`initial_state` must be None"):
        layer(x, initial_state=[x])
    with pytest.raises(ValueError, match="`segment_ids` needs causal=True"):
        layer(x, segment_ids=np.zeros((2, 6), "int32"))


def test_layer_calls():
    layer = layers.HLA(4, 8)
    x = np.zeros((2, 6, 16), "float32")
    with pytest.raises(ValueError, match=r"`sequences` must have shape .*Received.*\(2, 16\)"):
        layer(x[:, 0])
    layer(x)
    *states, _ = layer.get_initial_state(2)
    with pytest.raises(ValueError, match=r"`initial_state` must be a list.*'window', 'position'"):
        layer(x, initial_state=states)
    with pytest.raises(ValueError, match=r"position in argument `initial_state` must have shape"):
        layer(x, initial_state=[*states, np.zeros((2,), "float32")])
    with pytest.raises(ValueError, match="`mask` must have shape"):
        layer(x, mask=np.ones((2, 5), bool))
    with pytest.raises(ValueError, match="`initial_state` must be a list"):
        layer(keras.Input((None, 16)), initial_state=[keras.Input((4, 8, 8))])


def test_stateful_batch_size():
    with pytest.raises(ValueError, match=r"fixed batch size.*Received"):
        layers.HLA(4, 8, stateful=True)(keras.Input((None, 16)))
    layer = layers.HLA(4, 8, stateful=True)
    layer(np.zeros((2, 6, 16), "float32"))
    with pytest.raises(ValueError, match=r"fixed to 2. Received: sequences.shape=\(3, 6, 16\)"):
        layer(np.zeros((3, 6, 16), "float32"))
