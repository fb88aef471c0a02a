"""How many bytes each device receives in the collectives of a step."""

import contextlib
import math
import re

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
_BYTES |= {"f64": 8, "s64": 8, "u64": 8}
# These show what they read before what they give.
_WITH_OPERANDS = ("all-gather-start", "collective-permute-start")


def of_program(text):
    """Of a program that XLA has compiled, from its text."""
    total = 0
    for shapes, kind in re.findall(rf"= (\S.*?) ((?:{_KINDS})(?:-start)?)\(", text):
        sizes = [
            _BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        ]
        total += sum(sizes[len(sizes) // 2 :] if kind in _WITH_OPERANDS else sizes)
    return total


class Count:
    """A number of bytes, which grows."""

    total = 0


@contextlib.contextmanager
def counted():
    """A `Count` of what `keras_hla` gathers and scatters under PyTorch meanwhile."""
    from keras_hla.backend import torch_collectives

    count, names = Count(), ("_all_gather", "_reduce_scatter")
    former = {name: getattr(torch_collectives, name) for name in names}

    def counting(function):
        def call(output, *arguments, **options):
            count.total += output.nbytes
            return function(output, *arguments, **options)

        return call

    for name, function in former.items():
        setattr(torch_collectives, name, counting(function))
    try:
        yield count
    finally:
        for name, function in former.items():
            setattr(torch_collectives, name, function)
