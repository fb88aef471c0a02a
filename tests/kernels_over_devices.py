"""Kernels on arrays that are split over four devices, under JAX and without a GPU.

Each device is to launch them on its own rows, and to exchange nothing but sums. To be run in a
process of its own, as devices are virtual, and kernels are what `portable_kernels.py` has in their
place. Prints for each case the rows of a device, and the kinds of exchanges.
"""

import portable_kernels  # isort: skip  # as it takes a place before the package looks there

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
from split_sequence import exchanges_of_program

from keras_hla.kernels import device
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
}


def draw(heads, key_heads, decays):
    rng = np.random.default_rng(0)
    rows = {
        "query": rng.standard_normal((BATCH, LENGTH, heads, DIM)),
        "key": rng.standard_normal((BATCH, LENGTH, key_heads, DIM)) / 2,
        "value": rng.standard_normal((BATCH, LENGTH, key_heads, VALUE_DIM)),
    }
    if decays is not None:
        shape = BATCH if decays[0] else 1, LENGTH, heads if decays[1] else 1
        rows["log_decay"] = np.log(rng.uniform(0.7, 1, shape))
    rows["weights"] = rng.standard_normal((BATCH, LENGTH, heads, VALUE_DIM))
    return {name: x.astype("float32") for name, x in rows.items()}


def loss(arrays, operator, implementation):
    """Of outputs that read states too, so that both have gradients; and the outputs."""
    arrays = dict(arrays)
    weights = arrays.pop("weights")
    output, states = higher_order_attention(
        **arrays, operator=operator, implementation=implementation, return_state=True
    )
    again, _ = higher_order_attention(
        **arrays,
        operator=operator,
        implementation=implementation,
        initial_state=states,
        return_state=True,
    )
    outputs = output + again
    return (outputs * weights).sum(), outputs


differentiated = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 2))


def check(name, mesh):
    operator, heads, key_heads, decays, axes = CASES[name]
    arrays = draw(heads, key_heads, decays)
    (_, *expected) = jax.tree.leaves(differentiated(arrays, operator, "portable"))

    def place(x):
        of_batch, of_heads = axes
        count = 1 if of_heads is None else mesh.size // (2 if of_batch else 1)
        spec = of_batch if x.shape[0] > 1 else None, None, None if x.shape[2] % count else of_heads
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    split = jax.tree.map(place, arrays)
    portable_kernels.launched.clear()
    program = differentiated.lower(split, operator, "triton").compile()
    own = min(shape for kernel, shape in portable_kernels.launched if kernel == "forward_kernel")
    (_, *found) = jax.tree.leaves(program(split))
    for x, y in zip(found, expected, strict=True):
        error = np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))
        assert error < 1e-5, (name, y.shape, error)
    kinds = sorted({kind for kind, _ in exchanges_of_program(program.as_text())})
    print(f"{name}: {own[0]} x {own[2]}", *kinds)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    device._capability = lambda tensor: "9.0"
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("rows", "columns"))
    for name in CASES:
        check(name, mesh)
