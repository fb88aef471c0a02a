"""Stages, portable and by kernels, against float64 definitions."""

from backends import relative_error, rounded, value_and_gradients
import keras
from keras import ops
import numpy as np
import pytest
import stage_definitions
import torch

from keras_hla import stages
from keras_hla.kernels import device

EXACT = 1e-6  # largest relative RMS error in float32
OBSTACLE = device.why_not(None)
by_kernels = pytest.mark.skipif(
    OBSTACLE is not None, reason=f"the kernels do not run here: {OBSTACLE}"
)
by_all = pytest.mark.parametrize(
    "fused", [pytest.param(False, id="portable"), pytest.param(True, id="fused", marks=by_kernels)]
)
in_dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
MASKS = ("none", "left", "right", "scattered", "rows")


def draw(rng, shape, dtype="float32"):
    return rounded(rng.standard_normal(shape).astype("float32"), dtype)


def draw_mask(rng, kind, batch, length):
    """A boolean array `(batch, length)`, or `None`."""
    place = np.arange(length)
    if kind == "none":
        return None
    if kind == "scattered":
        return rng.random((batch, length)) < 0.6
    if kind == "rows":  # the first without a token
        return np.broadcast_to(np.arange(batch)[:, None] > 0, (batch, length)).copy()
    count = rng.integers(0, length + 1, (batch, 1))
    return place >= count if kind == "left" else place < count


def check(stage, definition, arrays, dtypes, rng, hidden=None):
    """Holds outputs and gradients of a stage to its definition.

    Args:
        stage: takes tensors of `dtypes`, and returns a list of tensors of the first of them.
        definition: the same of float64 tensors of torch.
        arrays: float32 arrays of numbers of their dtypes, for all of which there are gradients.
        dtypes: their dtypes.
        rng: generator of random numbers.
        hidden: boolean array, true at outputs that are not defined.
    """
    exact = [torch.tensor(x.astype("float64"), requires_grad=True) for x in arrays]
    expected = definition(*exact)
    weights = [draw(rng, x.shape, dtypes[0]) for x in expected]
    if hidden is not None:
        weights[0] = np.where(hidden, 0, weights[0]).astype("float32")
    loss = sum((x * torch.tensor(w)).sum() for x, w in zip(expected, weights, strict=True))
    loss = loss + sum(0 * x.sum() for x in exact)  # as a result need not read them all
    gradients = torch.autograd.grad(loss, exact)

    def function(*tensors):
        inputs, weights = tensors[: len(arrays)], tensors[len(arrays) :]
        results = stage(*(ops.cast(x, d) for x, d in zip(inputs, dtypes, strict=True)))
        for x in results:
            assert keras.backend.standardize_dtype(x.dtype) == dtypes[0]
        results = [ops.cast(x, "float32") for x in results]
        if hidden is not None:
            results[0] = ops.where(hidden, 0, results[0])
        loss = sum(ops.sum(x * w) for x, w in zip(results, weights, strict=True))
        return loss + sum(0 * ops.sum(x) for x in inputs), results

    found, found_gradients = value_and_gradients(function, arrays, weights)
    for a, e in zip(found, expected, strict=True):
        assert_close(a, e.detach().numpy(), dtypes[0])
    for a, e, dtype in zip(found_gradients, gradients, dtypes, strict=True):
        assert_close(a, e.numpy(), dtype)


def assert_close(actual, expected, dtype):
    """In low precision, as close as the exact result that is rounded once."""
    allowed = EXACT
    if dtype != "float32":
        best = relative_error(rounded(expected.astype("float32"), dtype), expected)
        # Triton's interpreter truncates where a GPU rounds.
        allowed += 2**-7 if device.interpreted() else 1.1 * best
    assert relative_error(actual, expected) <= allowed


@by_all
@pytest.mark.parametrize(
    ("mask", "dtype"), [*((mask, "float32") for mask in MASKS), ("scattered", "bfloat16")]
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [False, True])
def test_convolve(rng, fused, dtype, mask, packed, window):
    check_convolution(rng, fused, dtype, mask, packed, window, length=67, features=20)


@by_all
@pytest.mark.parametrize("activation", [None, "tanh"])
@pytest.mark.parametrize("mask", ["none", "scattered"])
@in_dtypes
def test_activations_of_a_convolution(rng, fused, dtype, mask, activation):
    check_convolution(
        rng, fused, dtype, mask, True, True, length=40, features=9, activation=activation
    )


@by_all
@pytest.mark.parametrize(("length", "features"), [(1, 3), (2, 70), (64, 3)])
@pytest.mark.parametrize("mask", ["none", "rows"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [False, True])
def test_lengths_of_a_convolution(rng, fused, length, features, mask, packed, window):
    check_convolution(rng, fused, "float32", mask, packed, window, length, features, size=5)


def check_convolution(
    rng, fused, dtype, mask, packed, window, length, features, size=4, activation="silu"
):
    x = draw(rng, (3, length, features), dtype)
    arrays, dtypes = [x, draw(rng, (size, features))], [dtype, "float32"]
    if window:
        arrays.append(draw(rng, (3, size - 1, features), dtype))
        dtypes.append(dtype)
    options = draw_options(rng, mask, packed, length)
    function = keras.activations.get(activation) if activation else None

    def stage(x, kernel, window=None):
        some = as_tensors(options)
        return [stages.convolve(x, kernel, function, window, **some, fused=fused)]

    def definition(x, kernel, window=None):
        return stage_definitions.convolve(x, kernel, activation, window, **options)[:1]

    mask = options["mask"]
    check(stage, definition, arrays, dtypes, rng, None if mask is None else ~mask[..., None])


def draw_options(rng, mask, packed, length):
    """The mask and the starts of three sequences."""
    mask = draw_mask(rng, mask, 3, length)
    starts = rng.random((3, length)) < 0.2 if packed else None
    if packed and mask is not None:  # no segment starts where no token is
        starts &= mask
    return {"mask": mask, "starts": starts}


def as_tensors(options):
    return {k: v if v is None else ops.convert_to_tensor(v) for k, v in options.items()}


@pytest.mark.parametrize("length", [1, 2, 30])
@pytest.mark.parametrize("mask", ["none", "left", "scattered"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [False, True])
def test_last_window(rng, length, mask, packed, window):
    options = draw_options(rng, mask, packed, length)
    arrays = [draw(rng, (3, length, 5))] + [draw(rng, (3, 3, 5))] * window

    def stage(x, window=None):
        return [stages.last_window(x, 4, window, **as_tensors(options))]

    def definition(x, window=None):
        kernel = torch.zeros((4, 5), dtype=torch.float64)
        return stage_definitions.convolve(x, kernel, None, window, **options)[1:]

    check(stage, definition, arrays, ["float32"] * len(arrays), rng)


def of_shapes(*shapes):
    """A parameter of shapes; the first, which has many elements, is in low precision, too."""
    cases = [(shape, "float32") for shape in shapes] + [(shapes[0], "bfloat16")]
    return pytest.mark.parametrize(("shape", "dtype"), cases)


@by_all
@of_shapes((2, 67, 3, 22), (1, 1, 1, 2), (3, 5, 2, 128))
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_rotate(rng, fused, dtype, shape, shared, scale):
    batch, length, _, dim = shape
    angle = rng.uniform(-np.pi, np.pi, (1 if shared else batch, length, dim // 2))
    cos, sin = np.cos(angle).astype("float32"), np.sin(angle).astype("float32")

    def stage(x):
        return [stages.rotate(x, *map(ops.convert_to_tensor, (cos, sin)), scale, fused)]

    def definition(x):
        exact = (torch.tensor(y.astype("float64")) for y in (cos, sin))
        return [stage_definitions.rotate(x, *exact, scale)]

    check(stage, definition, [draw(rng, shape, dtype)], [dtype], rng)


@by_all
@of_shapes((2, 67, 3, 24), (1, 1, 5), (3, 50, 768), (2, 1, 2000))
@pytest.mark.parametrize("epsilon", [1e-6, 0.3])
def test_rms_norm(rng, fused, dtype, shape, epsilon):
    x, scale = draw(rng, shape, dtype), draw(rng, shape[-1:])
    x[0, 0] = 0  # as masked tokens are

    def stage(x, scale):
        return [stages.rms_norm(x, scale, epsilon, fused)]

    def definition(x, scale):
        return [stage_definitions.rms_norm(x, scale, epsilon)]

    check(stage, definition, [x, scale], [dtype, "float32"], rng)


@by_all
@of_shapes((2, 67, 33), (1, 1, 1), (1, 2048))
def test_gate(rng, fused, dtype, shape):
    arrays = [draw(rng, shape, dtype), rounded(3 * draw(rng, shape), dtype)]

    def stage(x, gates):
        return [stages.gate(x, gates, keras.activations.silu, fused)]

    def definition(x, gates):
        return [stage_definitions.gate(x, gates)]

    check(stage, definition, arrays, [dtype] * 2, rng)


@by_all
def test_dtypes_that_change(rng, fused):
    """Calls that differ in the dtype of one tensor alone, as with and without autocasting."""
    x, scale = draw(rng, (2, 9, 8)), draw(rng, (8,), "bfloat16")
    expected = stage_definitions.rms_norm(*(torch.tensor(y).double() for y in (x, scale)), 1e-6)
    for dtype in ("float32", "bfloat16", "float32"):
        output = stages.rms_norm(ops.cast(x, "float32"), ops.cast(scale, dtype), 1e-6, fused)
        assert relative_error(output, expected.numpy()) <= EXACT
