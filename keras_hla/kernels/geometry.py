"""How a call is cut into programs, and the shapes of what they exchange."""

import dataclasses

from keras_hla.kernels.device import interpreted

# Rows of batch and head from which on a single segment of each fills a large GPU; and programs
# that are wanted where it does not, two for each of its processors.
_ROWS = 96
_PROGRAMS = 256
# Chunks that a segment has at least, as each segment costs its states.
_SEGMENT_CHUNKS = 8


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The cut of one call: each head's sequence into segments, and those into chunks.

    Segments run side by side, so that a few heads fill the chip; a single segment
    takes one pass over the inputs, several take three.
    """

    operator: str
    batch: int
    length: int
    heads: int
    key_heads: int
    dim: int
    value_dim: int
    dtype: str
    decays: bool

    @property
    def chunk(self):
        """Tokens of a chunk: as many as the registers hold the scores of."""
        if self.product_dtype == "bfloat16":
            return 64
        return 32 if self._block <= 64 else 16

    def options(self, backward):
        """How a kernel is compiled. Four warps hold a state of 64 x 64, eight one of 128 x 128."""
        if self.product_dtype == "float32":
            # Loads ahead of their chunk gave wrong gradients where there is decay.
            return {"num_warps": 4 if self._block <= 64 else 8, "num_stages": 1}
        if self._block > 64:
            return {"num_warps": 8, "num_stages": 1 if backward else 2}
        few = self.operator == "hla3" and backward
        return {"num_warps": 4, "num_stages": 2 if few else 3}

    @property
    def _block(self):
        return _block(max(self.dim, self.value_dim))

    @property
    def rows(self):
        return self.batch * self.heads

    @property
    def chunks(self):
        return -(-self.length // self.chunk)

    @property
    def chunks_of_segment(self):
        segments = max(1, _PROGRAMS // self.rows)
        if self.rows >= _ROWS:
            segments = 1
        return max(_SEGMENT_CHUNKS, -(-self.chunks // segments))

    @property
    def segments(self):
        return -(-self.chunks // self.chunks_of_segment)

    @property
    def grid(self):
        return (self.rows * self.segments,)

    @property
    def numbers(self):
        return self.length, self.heads, self.segments, self.chunks_of_segment

    @property
    def constants(self):
        """What the kernels know when they are compiled, besides what differs by launch."""
        return {
            "S_USED": self.operator != "ahla",
            "P_USED": self.operator != "hla2",
            "F_POWER": self.powers[2],
            "GROUP": self.heads // self.key_heads,
            "DIM": self.dim,
            "VALUE_DIM": self.value_dim,
            "CHUNK": self.chunk,
            "BLOCK": _block(self.dim),
            "VALUE_BLOCK": _block(self.value_dim),
            "DECAYS": self.decays,
            "PRECISION": "tf32x3",  # of products of float32; others are exact
        }

    @property
    def product_dtype(self):
        """The dtype of the products' operands: of a wide range, and exact for decays."""
        if self.dtype != "bfloat16" or self.decays or interpreted():
            return "float32"  # The interpreter multiplies no bfloat16.
        return "bfloat16"

    def sequence(self, dim, dtype=None):
        """The shape and dtype of a sequence of the query heads."""
        return (self.batch, self.length, self.heads, dim), dtype or self.dtype

    def states(self, count, dtype="float32"):
        """The shapes and dtypes of `S`, `P` and `F`, `count` of each for a row; or `None`.

        `P` and `F` are transposed.
        """
        S = (self.rows, count, self.dim, self.dim), dtype
        P = F = (self.rows, count, self.value_dim, self.dim), dtype
        return {"hla2": (S, None, F), "ahla": (None, P, F), "hla3": (S, P, F)}[self.operator]

    @property
    def powers(self):
        """The powers of the decay with which `S`, `P` and `F` decay."""
        return 1, 1, {"hla2": 2, "ahla": 1, "hla3": 3}[self.operator]


def _block(dim):
    """The least power of two that holds `dim` features and that the tensor cores take."""
    return max(16, 1 << (dim - 1).bit_length())
