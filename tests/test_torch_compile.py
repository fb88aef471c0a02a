"""`torch.compile` without a graph break: what eager mode gives, of few graphs."""

from concurrent.futures import ThreadPoolExecutor
import functools
import shutil

from backends import relative_error
from definitions import Reference, serial
from family import FORWARD, GRADIENT, PLAIN, draw, like
import keras
import numpy as np
import pytest
import torch

from keras_hla import layers, ops
from keras_hla.layers.state_scope import StateScope


@pytest.fixture(autouse=True)
def _nothing_compiled():
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs graphs as they are, and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph


def compiled(function, backend="eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def with_gradients(function, x, weights):
    """The outputs, and the gradients of a function of them in the input and the weights."""
    results = function(x)
    results = results if isinstance(results, tuple | list) else (results,)
    wanted = [*weights, x] if x.requires_grad else weights
    return results, torch.autograd.grad(sum(y.sin().sum() for y in results), wanted)


def assert_same(layer, x, backend="eager"):
    weights = [v.value for v in layer.trainable_variables]
    for actual, expected in zip(
        with_gradients(compiled(layer, backend), x, weights),
        with_gradients(layer, x, weights),
        strict=True,
    ):
        for a, e in zip(actual, expected, strict=True):
            assert relative_error(a.detach(), e.detach()) <= FORWARD


def sequences(*shape):
    return torch.randn(shape, requires_grad=True)


OPTIONS = {
    "learned": {"decay": "learned", "operator": "ahla", "rope_max_wavelength": None},
    "constant": {"decay": "multiscale", "operator": "hla3", "go_backwards": True},
    "published": {"operator": "hla2_published", "return_sequences": False},
    "no order": {"causal": False, "rope_max_wavelength": None},
    "parts": {
        "decay": [0.9, 0.8],
        "remat_length": 20,
        "return_state": True,
        "rope_max_wavelength": None,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layer(options):
    layer = layers.HLA(2, 4, **PLAIN | options)
    layer.build((None, None, 6))
    assert_same(layer, sequences(2, 40, 6))


def test_layers_of_kernels():
    """The second has another scale than the first, which may be a symbol then."""
    options = {"implementation": "triton"}
    for layer in (layers.HLADecoderBlock(1, 4, **options), layers.HLA(1, 8, **options)):
        layer.build((None, None, 6))
        assert_same(layer, sequences(2, 20, 6))


def test_all_stages_with_mask_segments_and_states():
    layer = layers.HLA(
        num_heads=2,
        key_dim=4,
        num_key_value_heads=1,
        decay="input",
        conv_kernel_size=3,
        qk_norm=True,
        feature_map="elu_plus_one",
        output_gate="silu",
        normalize=True,
        ridge=0.1,
        return_state=True,
    )
    layer.build((None, None, 6))
    mask = torch.arange(40)[None] < torch.tensor([[40], [25]])
    ids = (torch.arange(40)[None] // 15).expand(2, 40)
    states = [torch.rand(2, *size) for size in layer.cell.state_size]
    states[-1] = torch.tensor([[0.0, 3.0], [1.0, 5.0]])  # a position

    def function(x):
        return layer(x, mask=mask, segment_ids=ids, initial_state=states)

    function.trainable_variables = layer.trainable_variables
    assert_same(function, sequences(2, 40, 6))


def test_model():
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(16, 8)(tokens)
    x = layers.HLADecoderBlock(2, 4)(x)
    x = keras.layers.RMSNormalization()(x)
    model = keras.Model(tokens, keras.layers.Dense(16)(x))
    assert_same(model, torch.randint(0, 16, (2, 20)), "aot_eager")


def test_jit_compile(monkeypatch):
    """A model takes the same step of training whether Keras compiles it or not."""
    # Keras leaves no choice of the backend, and that of C++ takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    x = np.random.default_rng(0).standard_normal((2, 20, 4))
    steps = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((20, 4)), layers.HLA(1, 4, **PLAIN)])
        before = model.get_weights()
        model.compile("sgd", "mse", jit_compile=jit_compile)
        loss = model.train_on_batch(x, x)
        changes = [a - b for a, b in zip(model.get_weights(), before, strict=True)]
        steps.append([np.asarray(loss), *changes])
    for expected, actual in zip(*steps, strict=True):
        assert np.any(expected)
        assert relative_error(actual, expected) <= GRADIENT


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="PyTorch's own compiler makes C++ for a CPU"
)
def test_gradients_beside_a_constant_decay(rng):
    inputs, _ = draw(rng, 20, "none")
    log_decay = np.full((2, 20, 2), -0.1, "float32")
    expected = Reference(serial, "linear", inputs, log_decay)
    (weight,) = like(rng, [expected.output])

    def function(q, k, v):
        return ops.higher_order_attention(q, k, v, "linear", log_decay=-0.1)

    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    output = compiled(function, "inductor")(*tensors)
    found = torch.autograd.grad(output, tensors, torch.tensor(weight))
    for a, e in zip(found, expected.gradients(weight), strict=False):
        assert relative_error(a, e) <= GRADIENT


@pytest.mark.parametrize("implementation", ["portable", "triton"])
def test_few_graphs_for_all_lengths(implementation):
    """One for the first length, one for those of a chunk, and one for those of several."""
    layer = layers.HLA(
        1,
        8,
        operator="linear",
        decay="learned",
        conv_kernel_size=None,
        rope_max_wavelength=None,
        implementation=implementation,
    )
    layer.build((None, None, 4))
    graphs = Graphs()
    function = compiled(layer, graphs)
    lengths = [
        70,
        130,
        64,
        128,
        33,
        90,
        65,
        63,
        *([2048, 2049, 4000] * (implementation != "triton")),
    ]
    with torch.no_grad():
        for length in lengths:
            x = torch.randn(2, length, 4)
            assert relative_error(function(x), layer(x)) <= FORWARD
        assert len(graphs.graphs) <= 3
        for batch, length in ((3, 100), (5, 90), (7, 150)):
            x = torch.randn(batch, length, 4)
            assert relative_error(function(x), layer(x)) <= FORWARD
    assert len(graphs.graphs) <= 4


def test_a_stream_is_not_what_was_compiled_without():
    """The scope of a stream is a state of the thread, of which a compiled layer takes note."""
    layer = layers.HLA(1, 4, operator="linear", rope_max_wavelength=None, **PLAIN)
    layer.build((None, None, 4))
    function = compiled(layer)
    with torch.no_grad():
        x = torch.randn(1, 16, 4)
        whole, states, pieces = layer(x), None, []
        first, second = x[:, :8], x[:, 8:]
        assert relative_error(function(first), whole[:, :8]) <= FORWARD
        for piece in (first, second):
            with StateScope(states) as scope:
                pieces.append(function(piece))
            states = scope.states
        assert relative_error(torch.cat(pieces, 1), whole) <= FORWARD
        with StateScope(), ThreadPoolExecutor(1) as pool:  # a thread that is in no stream
            again = pool.submit(torch.no_grad()(function), first).result()
        assert relative_error(again, whole[:, :8]) <= FORWARD


@pytest.mark.parametrize("implementation", ["portable", "triton"])
@pytest.mark.parametrize("read", ["output", "state"])
def test_operator(rng, implementation, read):
    """Held to the definition; of a loss that reads one of the results, the others have none."""
    inputs, log_decay = draw(rng, 40, "per_token", 2, 1, dim=16, value_dim=16)
    inputs = [inputs[0] / 4, inputs[1] / 4, inputs[2]]
    expected = Reference(serial, "hla2", inputs, log_decay)
    tensors = [torch.tensor(x, requires_grad=True) for x in (*inputs, log_decay)]

    def function(q, k, v, g):
        output, state = ops.higher_order_attention(
            q, k, v, log_decay=g, return_state=True, implementation=implementation
        )
        return output, *state

    results = compiled(function, "aot_eager")(*tensors)
    weights = like(rng, [expected.output, *expected.states])
    place = 0 if read == "output" else 2
    found = torch.autograd.grad((results[place] * torch.tensor(weights[place])).sum(), tensors)
    for a, e in zip(results, (expected.output, *expected.states), strict=True):
        assert relative_error(a.detach(), e) <= FORWARD
    weights = [w if i == place else np.zeros_like(w) for i, w in enumerate(weights)]
    for a, e in zip(found, expected.gradients(weights[0], weights[1:]), strict=True):
        assert relative_error(a, e) <= GRADIENT


def test_kernels_are_in_the_graph(rng):
    """As custom operators, and not as the portable form."""
    graphs = Graphs()
    (q, k, v), _ = draw(rng, 20, "none", dim=16, value_dim=16)

    def function(q, k, v):
        return ops.higher_order_attention(q, k, v, implementation="triton")

    compiled(function, graphs)(*map(torch.tensor, (q, k, v)))
    (graph,) = graphs.graphs
    assert any("keras_hla.attention" in str(node.target) for node in graph.graph.nodes)


def test_numbers_as_decays(rng):
    (q, k, v), _ = draw(rng, 20, "none")
    state = [torch.ones(2, 2, 8, 8), torch.ones(2, 2, 8, 5)]

    def function(q, k, v, *state):
        whole = ops.higher_order_attention(q, k, v, log_decay=-0.1)
        token = q[:, 0], k[:, 0], v[:, 0]
        one, _ = ops.attention_step(*token, list(state), log_decay=[-0.1, -0.2])
        return whole, one

    arguments = [*map(torch.tensor, (q, k, v)), *state]
    for a, e in zip(compiled(function)(*arguments), function(*arguments), strict=True):
        assert relative_error(a, e) <= FORWARD


def test_wrong_shapes_are_refused(request):
    # Dynamo of PyTorch 2.14 cannot trace how Keras shortens tracebacks, and then tells of that.
    keras.config.disable_traceback_filtering()
    request.addfinalizer(keras.config.enable_traceback_filtering)
    layer = layers.HLA(1, 4)
    layer.build((None, None, 4))
    with pytest.raises(Exception, match="Argument `mask` must have shape"):
        compiled(lambda x: layer(x, mask=torch.ones(1, 5, dtype=torch.bool)))(torch.ones(1, 6, 4))


def test_stateful_layer():
    layer = layers.HLA(1, 4, stateful=True, rope_max_wavelength=None)
    layer.build((2, None, 4))
    x = torch.randn(2, 20, 4)
    with torch.no_grad():
        whole = layer(x)
        layer.reset_state()
        function = compiled(layer)
        pieces = [function(x[:, :10]), function(x[:, 10:])]
    assert relative_error(torch.cat(pieces, 1), whole) <= FORWARD
