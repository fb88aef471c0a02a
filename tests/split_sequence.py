"""Evaluates sequences that are split over four devices, for `test_context_parallel.py`.

    python tests/split_sequence.py cases.pickle results.pickle

Devices are virtual CPUs under JAX, and processes under PyTorch. They form a mesh: rows of the batch
by shards of the length.
"""

import functools
import os

if os.environ["KERAS_BACKEND"] == "jax":
    import portable_kernels  # isort: skip  # noqa: F401  # takes a place before the package looks

from pathlib import Path
import pickle
import re
import sys
import warnings

import numpy as np
import split_layers

from keras_hla import distribution
from keras_hla.kernels import device
from keras_hla.ops import higher_order_attention

DEVICES = 4
DIFFERENTIABLE = ("query", "key", "value", "log_decay", "sequences")


def axes_of(case, x):
    """Whether an array is split along the batch, and along the length."""
    batch, length = case["shape"]
    return x.shape[0] == batch, len(x.shape) > 1 and x.shape[1] == length


def attend(case, arrays, state, context_parallel):
    """The outputs, and the list of states."""
    if "layer" in case:
        return split_layers.call(case, arrays, state, context_parallel)
    return higher_order_attention(
        **arrays,
        initial_state=state,
        return_state=True,
        context_parallel=context_parallel,
        **case["options"],
    )


def split_arguments(case):
    """What is differentiated, with the initial state, and the other arrays."""

    def is_variable(name):
        return name in DIFFERENTIABLE or name.startswith("weight")

    variables = {name: x for name, x in case["arrays"].items() if is_variable(name)}
    rest = {name: x for name, x in case["arrays"].items() if not is_variable(name)}
    return (variables, case["state"]), rest


def on_one_device(case, arrays, state):
    """What shards are compared with where that needs a layer: its cell's loop, or one device."""
    if case["beside"] == "loop":
        return split_layers.loop(case, arrays, state)
    return split_layers.call(case, arrays, state)


def run_jax(cases):
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_enable_x64", True)
    check_batches_in_loops()
    device._capability = lambda tensor: "9.0"  # for those cases that ask for kernels
    return [jax_result(case) for case in cases]


def check_batches_in_loops():
    """A loop starts from zeros, which are the same on all devices, and goes on with their rows."""
    import jax
    from jax.sharding import Mesh, PartitionSpec

    rows = PartitionSpec("rows")
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    layer = split_layers.build("HLA", num_heads=1, key_dim=2, operator="linear", remat_length=3)
    x = np.random.default_rng(0).standard_normal((DEVICES, 6, split_layers.FEATURES))
    found = jax.shard_map(layer, mesh=mesh, in_specs=rows, out_specs=rows)(x)
    np.testing.assert_allclose(found, layer(x), rtol=1e-4, atol=1e-5)


def jax_result(case):
    import jax
    from jax.sharding import Mesh, PartitionSpec

    devices = np.array(jax.devices()).reshape(-1, len(case["parts"]))
    mesh = Mesh(devices, ("rows", "parts"))
    names = ("rows", "parts")

    def spec(x):
        axes = list(zip(names, axes_of(case, x), strict=True))[: x.ndim]
        return PartitionSpec(*(name if is_split else None for name, is_split in axes))

    variables, rest = split_arguments(case)
    attention = jax.shard_map(
        lambda variables, rest: attend(case, {**variables[0], **rest}, variables[1], "parts"),
        mesh=mesh,
        in_specs=jax.tree.map(spec, (variables, rest)),
        out_specs=(spec(case["weights"][0]), PartitionSpec("rows")),
    )
    found, program = jax_gradients(case, attention)
    collectives = collectives_of_program(program.as_text())
    if case.get("beside") is None:
        return *found, collectives
    whole, _ = jax_gradients(
        case, lambda variables, rest: on_one_device(case, {**variables[0], **rest}, variables[1])
    )
    return *found, collectives, whole


def jax_gradients(case, function):
    """The results of a function and the gradients, and the program that computes them."""
    import jax

    def loss(variables, rest, weights):
        results = function(variables, rest)
        results = [results[0], *results[1]][: len(weights)]
        return sum((x * w).sum() for x, w in zip(results, weights, strict=True)), results

    arguments = *split_arguments(case), case["weights"]
    differentiated = jax.jit(jax.value_and_grad(loss, has_aux=True))
    program = differentiated.lower(*arguments).compile()
    (_, results), gradients = program(*arguments)
    return jax.tree.map(np.asarray, (results, jax.tree.leaves(gradients))), program


def collectives_of_program(text):
    """The kind of each collective of a compiled program, and how many elements a device receives.

    The sum of the losses of all devices is not included.
    """
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    sizes = [re.findall(r"\w+\[([\d,]*)\]", shapes) for shapes, _ in found]
    counts = [
        sum(int(np.prod([int(n) for n in size.split(",") if n])) for size in x) for x in sizes
    ]
    collectives = zip((kind for _, kind in found), counts, strict=True)
    return sorted((kind, count) for kind, count in collectives if count > 1)


def run_torch(cases):
    import tempfile

    import process_groups

    with tempfile.TemporaryDirectory() as folder:
        process_groups.spawn(torch_process, DEVICES, folder, cases, folder)
        found = [pickle.loads((Path(folder) / str(i)).read_bytes()) for i in range(DEVICES)]
    return [
        joined(case, of_ranks)
        for case, of_ranks in zip(cases, zip(*found, strict=True), strict=True)
    ]


def torch_process(rank, cases, folder):
    from torch.distributed.device_mesh import init_device_mesh

    warnings.simplefilter("error", FutureWarning)  # of names that PyTorch is going to drop
    names = ("rows", "parts")
    meshes = {n: init_device_mesh("cpu", (DEVICES // n, n), mesh_dim_names=names) for n in (2, 4)}
    check_second_gradients(rank)
    if rank < 2:  # as to load the compiler takes a while
        check_compiled_and_recomputed(meshes[2].get_group("parts"))
    found = [torch_result(case, meshes[len(case["parts"])]) for case in cases]
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(found))


def check_second_gradients(rank):
    """Of the sum over processes of the cubes of all that they hold."""
    import torch

    from keras_hla.backend.torch_collectives import AllGather

    x = (1.0 + rank + torch.arange(3.0)).requires_grad_()
    gathered = AllGather.apply(x, torch.distributed.group.WORLD)
    (first,) = torch.autograd.grad((gathered**3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, DEVICES * 3 * x**2)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, DEVICES * 6 * x)


def check_compiled_and_recomputed(group):
    """A layer compiled to one graph, with and without its collectives, and in a checkpoint."""
    import keras
    import torch

    keras.utils.set_random_seed(0)
    layer = split_layers.build("HLA", num_heads=1, key_dim=2, operator="linear")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 6, split_layers.FEATURES, requires_grad=True)
    whole = layer(x)
    torch.testing.assert_close(compiled(x), whole)
    own = 3 * torch.distributed.get_rank(group) + torch.arange(3)
    distribution.split_sequence(layer, group)
    # A checkpoint of all, in the backward pass of which nothing says again that it is split.
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)
    expected = torch.autograd.grad(whole.square().sum(), x)
    for function in (layer, compiled, checkpoint):
        part = x[:, own].detach().requires_grad_()
        output = function(part)
        torch.testing.assert_close(output, whole[:, own])
        (gradient,) = torch.autograd.grad(output.square().sum(), part)
        torch.testing.assert_close(gradient, expected[0][:, own])
    distribution.split_sequence(layer, None)
    torch.testing.assert_close(compiled(x), whole)


def torch_result(case, mesh):
    import torch

    collectives = record_collectives()
    row, part = mesh.get_coordinate()
    rows = case["shape"][0] // mesh.shape[0]
    borders = np.cumsum([0, *case["parts"]])
    own = slice(row * rows, (row + 1) * rows), slice(*borders[part : part + 2])
    # A mesh, or a group of processes.
    devices = mesh["parts"] if len(case["parts"]) == 2 else mesh.get_group("parts")
    # What all processes share, one of them adds.
    shares = [float(axes_of(case, w)[1] or part == 0) for w in case["weights"]]
    found = torch_gradients(
        case, functools.partial(attend, case, context_parallel=devices), own, shares
    )
    collectives.sort()
    if case.get("beside") is None or torch.distributed.get_rank() > 0:
        return *found, collectives
    everything = slice(None), slice(None)
    whole = functools.partial(on_one_device, case)
    return *found, collectives, torch_gradients(case, whole, everything, [1.0] * len(shares))


def torch_gradients(case, function, slices, shares):
    """The results of a function of slices of the arrays, and the gradients of their sums."""
    import torch

    def own(x, recorded=False):
        axes = zip(slices, axes_of(case, x), strict=True)
        index = tuple(part if is_split else slice(None) for part, is_split in axes)
        return torch.tensor(x[index[: x.ndim]], requires_grad=recorded)

    (variables, state), rest = split_arguments(case)
    variables = {name: own(x, True) for name, x in variables.items()}
    state = None if state is None else [own(x, True) for x in state]
    results = function({**variables, **{name: own(x) for name, x in rest.items()}}, state)
    results = [results[0], *results[1]][: len(case["weights"])]
    terms = zip(results, case["weights"], shares, strict=True)
    loss = sum((x * own(w)).sum() * share for x, w, share in terms)
    leaves = [variables[name] for name in sorted(variables)] + (state or [])
    gradients = torch.autograd.grad(loss, leaves)
    return [[x.detach().numpy() for x in xs] for xs in (results, gradients)]


def record_collectives():
    """A list to which the kind and the size of each later collective are added."""
    from keras_hla.backend import torch_collectives

    collectives = []

    def record(kind, name):
        collective = getattr(torch_collectives, name)
        collective = getattr(collective, "recorded", collective)  # not also in an earlier list

        def call(output, *arguments, **options):
            collectives.append((kind, output.numel()))
            return collective(output, *arguments, **options)

        call.recorded = collective
        setattr(torch_collectives, name, call)

    record("all-gather", "_all_gather")
    record("reduce-scatter", "_reduce_scatter")
    return collectives


def joined(case, of_ranks):
    """The whole arrays of what each process found, in the order of the processes."""
    count = len(case["parts"])
    rows = [of_ranks[i : i + count] for i in range(0, DEVICES, count)]
    results = []
    for i in range(len(case["weights"])):
        parts = [[found[0][i] for found in row] for row in rows]
        per_token = axes_of(case, case["weights"][i])[1]
        if not per_token:  # a state, which all shards share
            assert all((x == row[0]).all() for row in parts for x in row)
        parts = [np.concatenate(row, 1) if per_token else row[0] for row in parts]
        results.append(np.concatenate(parts))
    variables, state = split_arguments(case)[0]
    wholes = [variables[name] for name in sorted(variables)] + (state or [])
    gradients = []
    for i, whole in enumerate(wholes):
        along_rows, along_parts = axes_of(case, whole)
        parts = [[found[1][i] for found in row] for row in rows]
        parts = [np.concatenate(row, 1) if along_parts else sum(row) for row in parts]
        gradients.append(np.concatenate(parts) if along_rows else sum(parts))
    return results, gradients, *of_ranks[0][2:]


if __name__ == "__main__":
    given, made = map(Path, sys.argv[1:])
    run = {"jax": run_jax, "torch": run_torch}[os.environ["KERAS_BACKEND"]]
    made.write_bytes(pickle.dumps(run(pickle.loads(given.read_bytes()))))
