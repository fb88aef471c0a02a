"""What Keras promises of a layer: its own layer test, and the ways to train and to nest one."""

from backends import call, compiled, relative_error, run, to_numpy
from family import PLAIN
import keras
from keras.src.testing import TestCase
import numpy as np
import pytest

from keras_hla import layers

BACKEND = keras.config.backend()
SIZES = {"num_heads": 2, "key_dim": 4}
EVERYTHING = {
    "value_dim": 6,
    "num_key_value_heads": 1,
    "operator": "ahla",
    "decay": "input",
    "conv_kernel_size": 3,
    "feature_map": "softplus",
    "qk_norm": True,
    "output_gate": "silu",
    "dropout": 0.1,
    "seed": 1,
    "kernel_regularizer": "l2",
    "bias_constraint": "max_norm",
}
BIDIRECTIONAL = {"causal": False, "output_shape": 6, "normalize": True, "feature_map": "softplus"}
WEIGHTS = {"HLA": 12, "HLADecoderBlock": 13}  # of the default layer


@pytest.mark.parametrize(
    ("layer", "options", "output"),
    [
        (layers.HLA, {}, (2, 7, 8)),
        (layers.HLA, {**EVERYTHING, "output_shape": 5}, (2, 7, 5)),
        (layers.HLA, {"return_sequences": False, "go_backwards": True}, (2, 8)),
        (layers.HLA, {"stateful": True, "decay": "learned", "operator": "hla3"}, (2, 7, 8)),
        (layers.HLA, BIDIRECTIONAL, (2, 7, 6)),
        (layers.HLADecoderBlock, {}, (2, 7, 8)),
        (layers.HLADecoderBlock, {**EVERYTHING, "intermediate_dim": 12}, (2, 7, 8)),
    ],
)
def test_layer(layer, options, output):
    """Keras' own test: configs, shapes and dtypes, weights, a training step, mixed precision."""
    run_layer_test(
        layer,
        {**SIZES, **options},
        input_shape=(2, 7, 8),
        expected_output_shape=output,
        expected_output_dtype="float32",
        supports_masking=True,
        expected_num_trainable_weights=None if options else WEIGHTS[layer.__name__],
        expected_num_losses=(5 if layer is layers.HLA else 8) * ("kernel_regularizer" in options),
    )


@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_cell(options):
    cell = layers.HLACell(**SIZES, **options)
    run_layer_test(
        layers.HLACell,
        {**SIZES, **options},
        input_shape=(2, 8),
        call_kwargs={"states": cell.get_initial_state(2)},
        expected_output_shape=((2, 8), [(2, *size) for size in cell.state_size]),
        run_training_check=False,  # which has no states to pass
    )


def test_cell_trains_in_an_rnn():
    cell = layers.HLACell(**SIZES, decay="input", conv_kernel_size=3)
    run_layer_test(
        keras.layers.RNN,
        {"cell": cell, "return_sequences": True},
        input_shape=(2, 5, 8),
        expected_output_shape=(2, 5, 8),
        custom_objects={"HLACell": layers.HLACell},
        run_mixed_precision_check=False,  # RNN casts states, of which float32 ones must stay so
    )


@pytest.mark.parametrize("stacked", [False, True])
def test_cell_with_dropout_trains_in_an_rnn(x, stacked):
    """The outputs of a sequence lose the same features at all tokens, as with Keras' cells."""
    cells = [layers.HLACell(**SIZES, dropout=0.5, seed=n) for n in range(1 + stacked)]
    rnn = keras.layers.RNN(cells if stacked else cells[0], return_sequences=True)
    sequences = keras.Input((12, 8))
    model = keras.Model(sequences, rnn(sequences))
    model.compile("sgd", "mse")
    seeds = [to_numpy(cell.dropout_layer.seed_generator.state) for cell in cells]
    model.fit(x, x, verbose=0)
    for cell, seed in zip(cells, seeds, strict=True):
        assert np.any(to_numpy(cell.dropout_layer.seed_generator.state) != seed)
    if stacked:
        return
    exact = to_numpy(rnn(x))
    first, second = (to_numpy(rnn(x, training=True)) for _ in range(2))
    for dropped in (first, second):
        kept = dropped[:, :1] != 0
        assert 0.2 < np.mean(kept) < 0.8
        assert relative_error(dropped, 2 * exact * kept) <= 1e-5
    assert np.any(first != second)
    token, _ = cells[0](x[:, 0], cells[0].get_initial_state(4), training=True)
    assert relative_error(token, exact[:, 0]) > 0.1  # alone, a mask of its own


class Case(TestCase):
    """Keras' own, which counts weights and seeds; the states of a layer are variables, too."""

    def assertLen(self, container, expected_len, msg=None):  # noqa: N802
        if msg == "Unexpected number of torch_params":
            container = [path for path in container if "/state_" not in path]
        super().assertLen(container, expected_len, msg=msg)


def run_layer_test(layer, options, **expected):
    case = Case()
    case.setUp()
    case.run_layer_test(layer, options, **expected)


@pytest.fixture
def x(rng):
    return rng.standard_normal((4, 12, 8)).astype("float32")


def block_model(**options):
    inputs = keras.Input((None, 8))
    return keras.Model(inputs, layers.HLADecoderBlock(**SIZES, **options)(inputs))


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"jit_compile": BACKEND == "jax"}])
def test_train_on_batch(x, options):
    inputs = keras.Input((None, 8))
    model = keras.Model(inputs, layers.HLA(**SIZES, dropout=0.1)(inputs))
    model.compile(keras.optimizers.SGD(1.0), "mse", **options)
    first, second = (model.train_on_batch(x, 0 * x) for _ in range(2))
    assert second < first


def test_custom_training_loop(x):
    """A loop as one writes it on each backend."""
    model = block_model()
    losses = {"tensorflow": tensorflow_loop, "jax": jax_loop, "torch": torch_loop}[BACKEND](
        model, x
    )
    assert losses[-1] < 0.95 * losses[0]


def tensorflow_loop(model, x):
    import tensorflow as tf

    optimizer = keras.optimizers.SGD(0.1)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x, training=True) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return [float(step()) for _ in range(4)]


def jax_loop(model, x):
    import jax

    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)

    def loss_of(trainable, non_trainable):
        y, non_trainable = model.stateless_call(trainable, non_trainable, x, training=True)
        return (y**2).mean(), non_trainable

    @jax.jit
    def step(trainable, non_trainable, optimizer_variables):
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, non_trainable), gradients = gradient(trainable, non_trainable)
        trainable, optimizer_variables = optimizer.stateless_apply(
            optimizer_variables, gradients, trainable
        )
        return loss, (trainable, non_trainable, optimizer_variables)

    state = [
        [v.value for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        )
    ]
    losses = []
    for _ in range(4):
        loss, state = step(*state)
        losses.append(float(loss))
    return losses


def torch_loop(model, x):
    import torch

    x = torch.as_tensor(x)
    module = torch.nn.Sequential(model, torch.nn.Identity())  # as a module among others
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (module(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def test_compiled_by_the_backend(x):
    """One graph, as of `tf.function`, `jax.jit` or `torch.compile`."""
    inputs = keras.Input((None, 8))
    model = keras.Model(inputs, layers.HLA(**SIZES, **PLAIN)(inputs))
    expected = model.predict(x, verbose=0)
    if BACKEND == "torch":
        import torch

        # Captures and differentiates the graph, but needs no C++ compiler.
        graph = torch.compile(model, backend="aot_eager")
        result = graph(torch.as_tensor(x))
        result.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    elif BACKEND == "jax":
        import jax

        result = jax.jit(model)(x)
    else:
        import tensorflow as tf

        result = tf.function(model, jit_compile=True)(x)
    assert relative_error(result, expected) <= 1e-5


def test_remat_scope(x):
    with keras.RematScope(mode="full"):
        model = block_model()
    twin = block_model()
    twin.set_weights(model.get_weights())
    # In a TensorFlow graph `tf.recompute_grad`, which Keras uses, takes no keyword arguments.
    eagerly = BACKEND == "tensorflow"
    losses = []
    for some in (model, twin):
        some.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=eagerly)
        losses.append([float(some.train_on_batch(x, 0 * x)) for _ in range(3)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_time_distributed(x):
    layer = layers.HLA(**SIZES)
    inputs = keras.Input((3, 12, 8))
    model = keras.Model(inputs, keras.layers.TimeDistributed(layer)(inputs))
    assert model.output_shape == (None, 3, 12, 8)
    sequences = np.stack([x, -x, 2 * x], axis=1)
    outputs = model.predict(sequences, verbose=0)
    for i in range(3):
        assert relative_error(outputs[:, i], call(layer, sequences[:, i])) <= 1e-5


def test_lora(x, tmp_path):
    """As in Keras' own attention, the projections take it."""
    model = block_model()
    cell = model.layers[1].cell
    before = model.predict(x, verbose=0)
    model.layers[1].trainable = False
    cell.trainable = True
    for dense in (cell.query_dense, cell.value_dense):
        dense.enable_lora(2)
    np.testing.assert_allclose(model.predict(x, verbose=0), before, rtol=1e-5, atol=1e-6)
    model.compile(keras.optimizers.SGD(0.5), "mse")
    model.fit(x, 0 * x, verbose=0, epochs=2)
    after = model.predict(x, verbose=0)
    assert relative_error(after, before) > 1e-4
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert relative_error(loaded.predict(x, verbose=0), after) <= 1e-5


def test_frozen_layers_do_not_move(x):
    model = block_model()
    model.layers[1].mixer.trainable = False
    frozen = {w.path: to_numpy(w) for w in model.layers[1].mixer.weights}
    model.compile(keras.optimizers.SGD(0.5), "mse")
    model.fit(x, 0 * x, verbose=0)
    assert len(model.trainable_weights) == 5
    for weight in model.layers[1].mixer.weights:
        np.testing.assert_array_equal(to_numpy(weight), frozen[weight.path])


def test_float64(x):
    if BACKEND == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    try:
        single, double = (
            layers.HLADecoderBlock(**SIZES, dtype=dtype) for dtype in ("float32", "float64")
        )
        single.build((None, None, 8))
        double.build((None, None, 8))
        single.set_weights(double.get_weights())
        with_double = compiled(double)
        output = with_double(keras.ops.convert_to_tensor(x, "float64"))
        assert keras.backend.standardize_dtype(output.dtype) == "float64"
        error = relative_error(run(single, x), output)
        assert 1e-9 < error <= 1e-5
    finally:
        if BACKEND == "jax":
            jax.config.update("jax_enable_x64", False)
