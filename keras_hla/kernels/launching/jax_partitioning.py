"""Kernels under JAX on arrays that are split over devices.

XLA cannot see that the rows of a kernel, of batch and heads, are independent, and would gather
all of them on each device. `custom_partitioning` declares it.
"""

from collections.abc import Callable
import functools
import itertools
import math
import re
from typing import NamedTuple

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def on_own_rows(compute):
    """A function of arrays that each device evaluates on its own rows.

    `compute(function, options, choice, tensors)` is made of kernels. `function.rows` tells the
    axes of batch and heads of the arrays in `tensors` and in its result. A result with one entry
    along such an axis, where others have more, is a sum over it.
    """

    @functools.partial(custom_partitioning, static_argnums=(0, 1, 2))
    def partitioned(function, options, choice, tensors):
        return compute(function, options, choice, tensors)

    def partition(function, options, choice, mesh, arguments, results):
        rows = _Rows.of(function, jax.tree.leaves((arguments, results)))
        axes = rows.mesh_axes(mesh, jax.tree.leaves(arguments))

        def sharding(x):
            return NamedSharding(mesh, rows.spec(x, axes))

        def evaluate(tensors):
            found = compute(function, options, choice, tensors)
            return jax.tree.map(lambda x, whole: rows.sum(x, whole, axes), found, results)

        return mesh, evaluate, jax.tree.map(sharding, results), jax.tree.map(sharding, arguments)

    def sharding_rule(function, options, choice, mesh, arguments, results):
        return _Rows.of(function, [*arguments, *results]).rule(arguments, results)

    partitioned.def_partition(partition, sharding_rule=sharding_rule)

    def evaluate(function, options, choice, tensors):
        # In a `jax.shard_map` the caller has split the arrays.
        is_split = bool(jax.sharding.get_abstract_mesh().manual_axes)
        evaluate = compute if is_split or function.rows is None else partitioned
        return evaluate(function, options, choice, tensors)

    return evaluate


class _Rows(NamedTuple):
    """The rows of several arrays, any of which may have a single entry along an axis."""

    axes: Callable  # as `KernelFunction.rows`
    batch: int
    heads: int
    groups: int  # of heads, of which some arrays have one entry each

    @classmethod
    def of(cls, function, arrays):
        sizes = [[x.shape[i] for i in function.rows(x.shape)] for x in arrays]
        batch, heads = map(max, zip(*sizes, strict=True))
        groups = min((n for _, n in sizes if n > 1), default=1)
        return cls(function.rows, batch, heads, groups)

    def rule(self, arguments, results):
        """The sharding rule of `custom_partitioning`: which axes are the same."""
        count = itertools.count()

        def name_axes(x):
            names = [f"whole{next(count)}" for _ in x.shape]
            for axis, name in zip(self.axes(x.shape), self._names(x), strict=True):
                names[axis] = name or names[axis]
            return " ".join(names)

        rule = " -> ".join(", ".join(map(name_axes, side)) for side in (arguments, results))
        names = dict.fromkeys(re.findall(r"\w+", rule))  # in order, as the compiler wants them
        sizes = {"member": self.heads // self.groups} if "member" in names else {}
        unsplit = tuple(name for name in names if name not in ("batch", "group"))
        return rule, {"need_replication_factors": unsplit, **sizes}

    def _names(self, x):
        """Names of the axes of batch and heads of an array, `None` for an axis with one entry."""
        batch, heads = (x.shape[i] for i in self.axes(x.shape))
        of_heads = {self.heads: "(group member)", 1: None, self.groups: "group"}
        return "batch" if batch == self.batch else None, of_heads[heads]

    def mesh_axes(self, mesh, arrays):
        """The axes of the mesh along which batch and heads are split, as the arrays suggest it."""

        def whole(x):
            return [x.shape[i] for i in self.axes(x.shape)] == [self.batch, self.heads]

        leader = next(x for x in arrays if whole(x))
        found = []
        for axis, size in zip(self.axes(leader.shape), (self.batch, self.groups), strict=True):
            names = leader.sharding.spec[axis] or ()
            names = (names,) if isinstance(names, str) else tuple(names)
            count = math.prod(mesh.shape[name] for name in names)
            found.append(names if size % count == 0 else ())
        return found

    def spec(self, x, axes):
        """The placement of an array, if rows are split along axes of the mesh."""
        places: list[tuple | None] = [None] * len(x.shape)
        for axis, names, name in zip(self.axes(x.shape), axes, self._names(x), strict=True):
            places[axis] = names if names and name else None
        return PartitionSpec(*places)

    def sum(self, x, whole, axes):
        """A result for the rows of a device, or its sum over devices for a single entry."""
        shared = [name is None for name in self._names(whole)]
        names = [n for some, is_shared in zip(axes, shared, strict=True) if is_shared for n in some]
        return jax.lax.psum(x, tuple(names)) if names else x
