"""Kernels on arrays that are split over four devices, under JAX and without a GPU.

Each device must launch them on its own rows, and sums must be the only collectives. It runs in a
fresh process, as devices are virtual, and `portable_kernels.py` replaces the kernels. Prints for
each case the rows of a device, and the kinds of collectives.
"""

import portable_kernels  # isort: skip  # as it takes a place before the package looks there

import functools

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import keras
import numpy as np
from split_sequence import collectives_of_program

from keras_hla import layers
from keras_hla.kernels import device
from keras_hla.operators import HLA2, HLA2Unmasked
from keras_hla.ops import higher_order_attention

BATCH, LENGTH, DIM, VALUE_DIM = 4, 20, 8, 6

# By name: the operator, numbers of heads, whether log-decays have entries for rows of the batch and
# for heads, and the axes of the mesh that split batch and heads.
CASES = {
    "batch": ("hla2", 3, 3, (True, True), (("rows", "columns"), None)),
    "batch and heads": ("hla3", 4, 4, (True, True), ("rows", "columns")),
    "heads": ("ahla", 4, 4, None, (None, ("rows", "columns"))),
    "shared keys": ("hla2", 4, 2, (False, True), ("rows", "columns")),
    "one key": ("hla2", 4, 1, (False, False), ("rows", "columns")),
    "heads that do not divide": ("linear", 3, 3, (True, False), ("rows", "columns")),
    "ridge": (HLA2(ridge=0.3), 4, 2, (True, True), ("rows", "columns")),
    "unmasked": (HLA2Unmasked(ridge=0.3), 4, 2, None, ("rows", "columns")),
}


def draw(operator, heads, key_heads, decays):
    """Arrays by name, the list of states, and what the results are weighted by."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype("float32")

    arrays = {
        "query": normal(BATCH, LENGTH, heads, DIM),
        "key": normal(BATCH, LENGTH, key_heads, DIM) / 2,
        "value": normal(BATCH, LENGTH, key_heads, VALUE_DIM),
    }
    if decays is not None:
        shape = BATCH if decays[0] else 1, LENGTH, heads if decays[1] else 1
        arrays["log_decay"] = np.log(rng.uniform(0.7, 1, shape)).astype("float32")
    results = jax.eval_shape(lambda x: attend(x, None, operator, "portable"), arrays)
    weights = [normal(*x.shape) for x in results]
    return arrays, [normal(*x.shape) for x in results[1:]], weights


def attend(arrays, states, operator, implementation):
    output, states = higher_order_attention(
        **arrays,
        operator=operator,
        implementation=implementation,
        initial_state=states,
        return_state=True,
    )
    return [output, *states]


@functools.partial(jax.jit, static_argnums=(3, 4))
def results_and_gradients(arrays, states, weights, operator, implementation):
    """Without a loss, which would need a collective."""
    results, pull = jax.vjp(lambda *x: attend(*x, operator, implementation), arrays, states)
    return results, pull(weights)


def check(name, mesh):
    operator, heads, key_heads, decays, axes = CASES[name]
    given = draw(operator, heads, key_heads, decays)
    expected = jax.tree.leaves(results_and_gradients(*given, operator, "portable"))

    def place(x):
        of_batch, of_heads = axes
        axis = 1 if x.shape[1] != LENGTH else 2  # of heads, in states and sequences
        count = 1 if of_heads is None else mesh.size // (2 if of_batch else 1)
        spec = [of_batch if x.shape[0] > 1 else None, None, None]
        spec[axis] = None if x.shape[axis] % count else of_heads
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    split = jax.tree.map(place, given)
    portable_kernels.launched.clear()
    program = results_and_gradients.lower(*split, operator, "triton").compile()
    own = min(shape for kernel, shape in portable_kernels.launched if kernel == "forward_kernel")
    found = jax.tree.leaves(program(*split))
    for x, y in zip(found, expected, strict=True):
        error = np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))
        assert error < 1e-5, (name, y.shape, error)
    kinds = sorted({kind for kind, _ in collectives_of_program(program.as_text())})
    print(f"{name}: {own[0]} x {own[2]}", *kinds)


def check_model():
    """The gradients of a model whose batch is split have sums alone, of the size of its weights."""
    engine = keras.distribution.DataParallel(devices=keras.distribution.list_devices())
    with engine.scope():
        block = layers.HLADecoderBlock(2, DIM, output_gate="silu", implementation="triton")
        block.build((None, LENGTH, 2 * DIM))
    weights = [x.value for x in block.trainable_variables]

    def loss(weights, x):
        output, _ = block.stateless_call(weights, [], x)
        return (output**2).mean()

    x = np.random.default_rng(0).standard_normal((BATCH, LENGTH, 2 * DIM)).astype("float32")
    expected = jax.jit(jax.grad(loss))([np.asarray(x) for x in weights], x)
    split = keras.distribution.distribute_tensor(x, engine.get_data_layout(x.shape))
    portable_kernels.launched.clear()
    program = jax.jit(jax.grad(loss)).lower(weights, split).compile()
    own = min(shape for kernel, shape in portable_kernels.launched if kernel == "forward_kernel")
    for x, y in zip(program(weights, split), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())
    collectives = collectives_of_program(program.as_text())
    assert sum(size for _, size in collectives) == sum(x.size for x in weights), collectives
    print(f"model: {own[0]} x {own[2]}", *sorted({kind for kind, _ in collectives}))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    device._capability = lambda tensor: "9.0"
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("rows", "columns"))
    for name in CASES:
        check(name, mesh)
    check_model()
