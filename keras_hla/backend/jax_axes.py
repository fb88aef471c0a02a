"""The axes of a `jax.shard_map` along which arrays differ, which JAX tracks."""

import jax


def differing_axes(*arrays):
    """The names of the axes along which any of some nests of arrays differs."""
    leaves = jax.tree.leaves(arrays)
    return frozenset().union(*map(_axes, leaves))


def differing_along(axes, arrays):
    """A nest of arrays, which JAX takes from here on as different along axes."""
    if not axes:  # as always before JAX knew of them
        return arrays
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(axes - _axes(x)), to="varying"), arrays)


def summed_as(x, like):
    """A gradient of which devices hold their shares, where `like` is the same on all of them."""
    axes = differing_axes(x) - _axes(like)
    return jax.lax.psum(x, tuple(axes)) if axes else x


def _axes(x):
    if not hasattr(jax.lax, "pcast"):
        return frozenset()
    kind = jax.typeof(x)  # in which JAX 0.10 gave them another name
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
