"""The passes of a call, how they are cut into programs, and what those exchange."""

import dataclasses
import functools

from keras_hla.kernels.device import interpreted
from keras_hla.kernels.passes import passes_of

# Rows of batch and head from which on a single segment of each fills a large GPU; and programs
# that are wanted where it does not, two for each of its processors.
_ROWS = 96
_PROGRAMS = 256
# Chunks that a segment has at least, as each segment costs its states.
_SEGMENT_CHUNKS = 8


@dataclasses.dataclass(frozen=True, eq=False)  # each is one of `geometry_of`
class Geometry:
    """The cut of one call: each head's sequence into segments, and those into chunks.

    Segments run side by side, so that a few heads fill the chip. With several the keys and
    values of a pass are read twice: first the states that segments leave are summed.
    """

    passes: tuple
    batch: int
    length: int
    heads: int
    key_heads: int
    dim: int
    value_dim: int
    dtype: str
    decays: bool

    @functools.cached_property
    def chunk(self):
        """Tokens of a chunk: as many as the registers hold the scores of."""
        wide = max(self.dim, self.value_dim) > 64
        return 16 if wide and self.product_dtype == "float32" else 64

    def options(self, one, backward):
        """How a kernel is compiled. Four warps hold a state of 64 x 64, eight one of 128 x 128."""
        wide, stages = self._wide(one), 1
        if self.product_dtype == "bfloat16":
            stages = 3 if not wide else 1 if backward else 2
        return {"num_warps": 8 if wide else 4, "num_stages": stages}

    def _wide(self, one):
        return max(self._dims[one.key], self._dims[one.value]) > 64

    @functools.cached_property
    def rows(self):
        return self.batch * self.heads

    @functools.cached_property
    def chunks(self):
        return -(-self.length // self.chunk)

    @functools.cached_property
    def chunks_of_segment(self):
        segments = max(1, _PROGRAMS // self.rows)
        if self.rows >= _ROWS:
            segments = 1
        return max(_SEGMENT_CHUNKS, -(-self.chunks // segments))

    @functools.cached_property
    def segments(self):
        return -(-self.chunks // self.chunks_of_segment)

    @functools.cached_property
    def product_dtype(self):
        """The dtype of the products' operands, and of what the passes exchange: of a wide range."""
        # The interpreter multiplies no bfloat16.
        return "bfloat16" if self.dtype == "bfloat16" and not interpreted() else "float32"

    @functools.cached_property
    def _dims(self):
        dims = {"query": self.dim, "key": self.dim, "value": self.value_dim}
        for one in self.passes:
            dims[one.output] = dims[one.value]
        return dims

    def sequence(self, name, dtype):
        """The shape and dtype of a tensor that passes take or give, with the query heads."""
        return (self.batch, self.length, self.heads, self._dims[name]), dtype

    def state(self, one, count, dtype="float32"):
        """The shape and dtype of the state of a pass, transposed, `count` for each row."""
        return (self.rows, count, self._dims[one.value], self._dims[one.key]), dtype

    def constants(self, one):
        """What the kernels know of a pass when they are compiled."""
        dim, value_dim = self._dims[one.key], self._dims[one.value]
        return {
            "POWER": one.power,
            "KEY_GROUP": self._group_of(one.key),
            "VALUE_GROUP": self._group_of(one.value),
            "DIM": dim,
            "VALUE_DIM": value_dim,
            "CHUNK": self.chunk,
            "BLOCK": _block(dim),
            "VALUE_BLOCK": _block(value_dim),
            "SAME": one.key == one.value,
            "SEGMENTS": self.segments > 1,
            "DECAYS": self.decays,
            "WIDE": self._wide(one),
            # With decays close tokens count for most, which states, kept in float32, do not hold.
            "REFINE": self.decays and not self._wide(one),
            "PRECISION": "tf32x3",  # of products of float32; others are exact
        }

    def _group_of(self, name):
        """How many query heads share a head of it."""
        return self.heads // self.key_heads if name in ("key", "value") else 1


@functools.lru_cache(maxsize=256)  # as a call finds out much, for kernels that take no longer
def geometry_of(operator, *arguments):
    """The `Geometry` of an operator; its other arguments are those after `passes`."""
    return Geometry(passes_of(operator), *arguments)


def _block(dim):
    """The least power of two that holds `dim` features and that the tensor cores take."""
    return max(16, 1 << (dim - 1).bit_length())
