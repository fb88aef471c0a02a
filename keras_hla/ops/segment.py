"""What a segment is: named tensors that know their operator; and which segments compose."""

import collections
from typing import Any

import keras

from keras_hla.checks import fits

# The classes of segments, one per operator: trees are rebuilt from their class and their leaves.
_CLASSES: list[Any] = []
# What the shapes of an operator are read with: the heads of its key moments and of its queries,
# and the sizes of keys and values. They are large primes, so that none is another by chance.
_MOMENTS, _HEADS, _DIM, _VALUE_DIM = 10007, 20011, 30011, 40009
_DECAYS = "decays"


def segment(operator, tensors):
    """A named tuple of the tensors, of which `operator_of` knows the operator.

    It remains one in trees, loops and compiled functions of every backend, and in a pickle.
    """
    for known in _CLASSES:
        if known._operator == operator:
            return known(*tensors)
    names = collections.namedtuple("Segment", entries(operator), rename=True)  # type: ignore[misc]
    members = {
        "__slots__": (),
        "__reduce__": lambda self: (segment, (operator, tuple(self))),
        "_operator": operator,
    }
    new: Any = type("Segment", (names,), members)
    _CLASSES.append(new)
    return new(*tensors)


def operator_of(segment):
    """The operator of a segment, or `None` for a plain list of tensors."""
    return getattr(segment, "_operator", None)


def entries(operator):
    """The names of the tensors of a segment, in order."""
    return (*operator.state_names, *operator.segment_names, "log_decay")


def check_segments(operator, left, right):
    """Checks that two segments are of this operator, and of sequences that fit together."""
    for side, tensors in (("left", left), ("right", right)):
        _check_list(side, tensors, entries(operator))
    for side, tensors in (("left", left), ("right", right)):
        known = operator_of(tensors)
        if known is not None and not operator.composes_with(known):
            raise ValueError(
                f"Argument `{side}` must be a segment of {operator}, that of the other segment or "
                f"of argument `operator`. Received: a segment of {known}"
            )
    _check_dtypes(left, right)
    sizes: dict = {}  # by the name of an axis
    for side, tensors in (("left", left), ("right", right)):
        _check_shapes(side, tensors, operator, sizes)
    _check_heads(sizes)


def _check_list(side, tensors, names):
    if not isinstance(tensors, list | tuple) or len(tensors) != len(names):
        received = f"{len(tensors)} entries" if isinstance(tensors, list | tuple) else type(tensors)
        raise ValueError(f"Argument `{side}` must be a list of {list(names)}. Received: {received}")
    for name, x in zip(names, tensors, strict=True):
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise ValueError(
                f"Argument `{side}` must be a list of tensors. Received: `{name}` of {type(x)}"
            )


def _check_dtypes(*sides):
    left, right = ([keras.backend.standardize_dtype(x.dtype) for x in side] for side in sides)
    if len({*left, *right}) > 1 or "float" not in left[0]:
        raise ValueError(
            "All tensors of arguments `left` and `right` must have the same floating dtype. "
            f"Received: left of dtypes {left}, right of dtypes {right}"
        )


def _check_shapes(side, tensors, operator, sizes):
    """Checks each size against that of the same axis before, and adds the new ones to `sizes`."""
    lead = sizes.setdefault("lead", tuple(tensors[-1].shape[:-1]))
    for name, axes, x in zip(entries(operator), _axes(operator), tensors, strict=True):
        # The moments of one segment may have more heads than those of the other.
        keys = [(side, axis) if axis in (_MOMENTS, _DECAYS) else axis for axis in axes]
        shape = tuple(x.shape)
        for key, size in zip(keys, shape[len(lead) :], strict=False):
            if sizes.get(key) is None:
                sizes[key] = size
        expected = (*lead, *map(sizes.get, keys))
        if not fits(shape, expected):
            raise ValueError(
                f"Argument `{side}` must be a segment of {operator} that fits the other one: its "
                f"`{name}` must have shape {expected}. Received: shape {shape}"
            )


def _check_heads(sizes):
    """Checks how many heads the moments of keys have, and the decays.

    These are the key heads, or where the decays of a segment differ by query head, the query
    heads; and a single decay is one for all heads.
    """
    heads = sizes.get(_HEADS)
    counts = []
    for side in ("left", "right"):
        decays = sizes[side, _DECAYS]
        moments = sizes.get((side, _MOMENTS), decays)
        valid = decays in (1, moments) and (heads is None or heads % moments == 0)
        if not valid:
            raise ValueError(
                f"Argument `{side}` must be a segment whose log-decays have one head, or as many "
                f"as its moments of keys. Received: {decays} and {moments}, of {heads} query heads"
            )
        counts.append((moments, decays))
    (fewer, _), (more, decays) = sorted(counts)
    same_decays = len({decays for _, decays in counts} - {1}) <= 1
    if not same_decays or (fewer != more and (decays != more or more % fewer)):
        raise ValueError(
            "Arguments `left` and `right` must have the same number of heads. Received: "
            "{} and {} heads of the moments of keys, {} and {} of the log-decays".format(
                *(count[i] for i in (0, 1) for count in counts)
            )
        )


def _axes(operator):
    """The names of each tensor's axes after the first; of the same name is the same size."""
    sizes = (_MOMENTS, _HEADS, _DIM, _VALUE_DIM)
    known = (*operator.state_shapes(*sizes), *operator.segment_shapes(*sizes))
    count = len(entries(operator)) - 1
    unknown = (((i, "heads"), (i, "rows"), (i, "columns")) for i in range(len(known), count))
    return *known, *unknown, (_DECAYS,)
