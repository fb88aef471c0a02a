"""On an unmeasured GPU kernels are checked, or the portable implementation is used.

The GPU is simulated. Under PyTorch the kernels are interpreted. JAX cannot do that: portable
functions replace them.
"""

import re

from backends import relative_error
from family import FORWARD, draw
import keras
import numpy as np
import pytest

from keras_hla import kernels, operators, ops, stages
from keras_hla.kernels import device, proof, small_cases

ON_TORCH = keras.config.backend() == "torch"
on_torch = pytest.mark.skipif(not ON_TORCH, reason="without a GPU only PyTorch runs the kernels")
on_jax = pytest.mark.skipif(ON_TORCH, reason="this is what JAX traces")
AGREED = (
    "the kernels agree with the portable implementation on this GPU "
    "(NVIDIA L4, compute capability 8.9)"
)


@pytest.fixture(autouse=True)
def examined(monkeypatch):
    """An unknown GPU, with no verdicts remembered; the dtypes of the checks that were run."""
    if ON_TORCH:
        import torch

        # Before it is said that nothing is interpreted, as kernels are without a GPU.
        from keras_hla.kernels.operator import plan  # noqa: F401

        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(device, "_capability", lambda tensor: "8.9")
    monkeypatch.setattr(device, "describe", lambda place: "NVIDIA L4, compute capability 8.9")
    monkeypatch.setattr(device, "interpreted", lambda: False)  # or `"auto"` would not ask
    monkeypatch.setattr(device, "_FEWEST_TOKENS", 64)
    monkeypatch.setattr(device, "_INSTALLED", {"triton": True, "jax_triton": True})
    monkeypatch.setattr(proof, "_verdicts", {})
    monkeypatch.setattr(proof, "_warned", set())
    examine, runs = proof._examine, []

    def count(place, kind):
        runs.append(kind.dtype)
        return examine(place, kind)

    monkeypatch.setattr(proof, "_examine", count)
    return runs


def spoil_gradients(x):
    return x + 0.01 * (x - keras.ops.stop_gradient(x))


@pytest.fixture(params=[pytest.param(lambda x: x, id="right")])
def simulated(request, monkeypatch):
    """Portable kernels of the operators, whose outputs are changed; none for the stages."""
    evaluate = small_cases.evaluate

    def feign(*arguments, implementation, **options):
        output, state = evaluate(*arguments, implementation="portable", **options)
        return (request.param(output) if implementation == "triton" else output), state

    monkeypatch.setattr(small_cases, "evaluate", feign)
    monkeypatch.setattr(stages, "are_fused", lambda implementation: False)


@pytest.fixture
def trusted(monkeypatch):
    """Kernels that make no errors, and are not run."""
    monkeypatch.setattr(proof, "_errors", lambda case, dtype: [0.0])
    monkeypatch.setattr(stages, "are_fused", lambda implementation: False)


WRONG = {
    "outputs": lambda x: 1.01 * x,
    "gradients": spoil_gradients,
    "no numbers": lambda x: float("nan") * x,
}
wrong = pytest.mark.parametrize("simulated", WRONG.values(), ids=WRONG, indirect=True)
KINDS = 1 + ON_TORCH  # the kernels of the operator, and those of the stages


def choose(**options):
    tensor = keras.ops.zeros((1, 100, 4))
    return kernels.choose(**{"tensor": tensor, **options})


def of_trust(warned):
    """The number of warnings that kernels are replaced by the portable implementation."""
    return sum("is evaluated by the portable implementation" in str(x.message) for x in warned)


def spoil(monkeypatch, name, result):
    """Adds a little to one of the results of the kernel of that name."""
    from keras_hla.kernels.launching import torch_launcher

    run = torch_launcher.run

    def run_wrongly(launch, inputs):
        results = run(launch, inputs)
        if launch.kernel.__name__ == name:
            results[result].mul_(1.01)
        return results

    monkeypatch.setattr(torch_launcher, "run", run_wrongly)


@on_torch
@pytest.mark.parametrize("decays", [False, True])
def test_right_kernels_are_proven_once(examined, decays):
    for _ in range(2):
        assert choose(decays=decays) == ("triton", AGREED)
    assert examined == ["bfloat16"] * KINDS


@on_torch
@pytest.mark.parametrize(
    ("kernel", "result"),
    [
        *(("forward_kernel", 0), ("backward_kernel", 0), ("backward_kernel", 1)),
        *(("span_kernel", 0), ("norm_kernel", 0), ("operands_gradient_kernel", 0)),
    ],
)
def test_wrong_kernels_are_refused_with_one_warning(monkeypatch, examined, kernel, result):
    spoil(monkeypatch, kernel, result)
    with pytest.warns(UserWarning, match="implementation='triton'` takes them anyway") as warned:
        choices = {choose() for _ in range(2)}
    assert of_trust(warned) == 1
    ((implementation, reason),) = choices
    assert implementation == "portable"
    assert re.search(
        r"\(NVIDIA L4, .* 8.9\) the kernels differ .* portable implementation by \d\.\de-0[23]$",
        reason,
    )
    assert len(examined) == 1 + kernel.startswith(("norm", "operands"))
    assert choose(implementation="triton").implementation == "triton"


@on_torch
def test_a_wrong_gradient_of_log_decays_is_refused(monkeypatch):
    spoil(monkeypatch, "decay_gradient_kernel", 0)
    for case in small_cases.of_operator(operators.HLA2(), (64, 64), True):
        errors = proof._errors(case, "float32")
        wrong = [error > proof._TOLERANCE["float32"] for error in errors]
        assert wrong.index(True) == len(errors) - len(case.exact)
        assert sum(wrong) == 1


@on_torch
def test_kernels_that_cannot_be_compiled_are_refused(monkeypatch, examined):
    from keras_hla.kernels.launching import torch_launcher

    def run(launch, inputs):
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(torch_launcher, "run", run)
    with pytest.warns(UserWarning, match="is evaluated by the portable implementation") as warned:
        choices = {choose() for _ in range(2)}
    assert of_trust(warned) == len(examined) == 1
    ((implementation, reason),) = choices
    assert implementation == "portable"
    assert reason.endswith("the kernels fail with RuntimeError: out of resource: shared memory")


@pytest.mark.usefixtures("trusted")
def test_each_kind_is_proven(examined):
    kinds = {}, {"decays": True}, {"key_dim": 96}, {"operator": "ahla"}
    for options in (*kinds, *kinds):
        choose(**options)
    assert len(examined) == len(kinds)
    place = device.place_of(keras.ops.zeros(1))
    for operator in ("hla2", "hla2", "linear"):
        assert proof.prove(operator, "float32", (64, 64), False, place).proven
    assert examined[len(kinds) :] == ["float32"] * 2


@wrong
@pytest.mark.usefixtures("simulated")
def test_what_differs_is_refused(examined):
    with pytest.warns(UserWarning, match="is evaluated by the portable implementation") as warned:
        assert choose().implementation == choose().implementation == "portable"
    assert of_trust(warned) == len(examined) == 1


@pytest.mark.parametrize("simulated", [WRONG["outputs"]], ids=["outputs"], indirect=True)
@pytest.mark.usefixtures("simulated")
def test_another_gpu_of_the_kind_is_not_warned_of_again(monkeypatch, examined):
    with pytest.warns(UserWarning, match="is evaluated by the portable implementation") as warned:
        refused = choose()
    assert of_trust(warned) == 1
    proof._verdicts.clear()  # as another GPU has no verdict
    assert choose() == refused
    assert len(examined) == 2


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ("9.0", "the kernels are faster on this GPU"),
        ("7.5", "compute capability 8.0 or higher"),
        ("12.0", AGREED),
    ],
)
def test_where_proofs_are_needed(monkeypatch, examined, capability, reason):
    monkeypatch.setattr(device, "_capability", lambda tensor: capability)
    choice = choose()
    assert reason in choice.reason
    assert choice.implementation == ("portable" if capability == "7.5" else "triton")
    assert len(examined) == (capability == "12.0")


def test_nothing_is_proven_that_would_not_be_taken(examined):
    few = keras.ops.zeros((1, 20, 4))
    for options in ({"dtype": "float32"}, {"key_dim": 16}, {"tensor": few}, {"causal": False}):
        assert choose(**options).implementation == "portable"
    assert not examined


@on_torch
def test_the_seeds_of_users_are_left_alone():
    import torch

    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    choose()
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@on_torch
def test_modes_of_torch_do_not_matter(examined):
    import torch

    tensor = keras.ops.zeros((1, 100, 4))
    modes = torch.inference_mode(), torch.autocast("cpu", torch.float16), torch.device("meta")
    with modes[0], modes[1], modes[2]:
        assert choose(tensor=tensor) == ("triton", AGREED)
    assert len(examined) == KINDS


@on_torch
def test_nothing_runs_while_a_graph_is_captured(monkeypatch, examined):
    import torch

    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        choice = choose()
        assert choice.implementation == "portable"
        assert "while a CUDA graph is captured" in choice.reason
        assert not examined
    assert choose() == ("triton", AGREED)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == ("triton", AGREED)  # as is remembered


@on_torch
def test_within_what_torch_compiles(rng, examined):
    import torch

    (q, k, v), _ = draw(rng, 70, "none", dim=64, value_dim=64, batch=1)
    tensors = [keras.ops.convert_to_tensor(x, "bfloat16") for x in (q / 8, k / 8, v)]
    found = []

    def function(q, k, v):
        return 2 * ops.higher_order_attention(q, k, v)

    def keep(graph, inputs):
        found.append(str(graph.graph))
        return graph

    output = torch.compile(function, backend=keep, fullgraph=True)(*tensors)
    assert examined == ["bfloat16"] * KINDS
    assert "keras_hla" in found[0]  # the custom operator
    assert relative_error(output, function(*tensors)) <= FORWARD


@on_jax
@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("trace", ["jit", "grad", "vmap", "jit of grad of vmap", "checkpoint"])
def test_within_what_jax_traces(trace, examined):
    import jax

    choices = []

    def function(x):
        choices.append(choose(tensor=x))
        return (x**2).sum()

    wraps = {
        "jit": jax.jit,
        "grad": jax.grad,
        "vmap": jax.vmap,
        "checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
        "jit of grad of vmap": lambda f: jax.jit(jax.grad(lambda x: jax.vmap(f)(x).sum())),
    }
    x = keras.ops.ones((2, 1, 100, 4) if "vmap" in trace else (1, 100, 4))
    jax.block_until_ready(wraps[trace](function)(x))
    assert set(choices) == {("triton", AGREED)}
    assert examined == ["bfloat16"]


@on_jax
@pytest.mark.parametrize("simulated", [WRONG["gradients"]], ids=["gradients"], indirect=True)
@pytest.mark.usefixtures("simulated")
def test_what_differs_is_found_within_a_trace(rng, examined):
    import jax

    (q, k, v), _ = draw(rng, 70, "none", dim=64, value_dim=64, batch=1)
    tensors = [keras.ops.convert_to_tensor(x, "bfloat16") for x in (q, k, v)]

    def function(q, k, v):
        return 2 * ops.higher_order_attention(q, k, v)

    with pytest.warns(UserWarning, match="is evaluated by the portable implementation"):
        output = jax.jit(function)(*tensors)
    expected = ops.higher_order_attention(*tensors, implementation="portable")
    assert relative_error(output, 2 * expected) <= 4e-3
    assert len(examined) == 1
