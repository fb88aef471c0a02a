"""The passes of a call, how they are divided into programs, and the tensors between them."""

import dataclasses
import functools

from keras_hla.kernels.device import interpreted
from keras_hla.kernels.launching import block_of
from keras_hla.kernels.passes import Pass

# Rows of batch and head from which on a single span of each fills a large GPU; and programs
# that are wanted where it does not, two for each of its processors.
_ROWS = 96
_PROGRAMS = 256
# Chunks that a span has at least, as each span costs its states.
_FEWEST_SPAN_CHUNKS = 8


@dataclasses.dataclass(frozen=True, eq=False)  # each is one of `plan_of`
class Plan:
    """How one call is divided: each head's sequence into spans, and spans into chunks.

    Spans run side by side, so that a few heads fill the GPU. With several the keys and
    values of a pass are read twice: first the states that spans leave are summed.
    """

    passes: tuple[Pass, ...]
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
        """The tokens of a chunk: as many as have scores that fit the registers."""
        wide = max(self.dim, self.value_dim) > 64
        return 16 if wide and self.product_dtype == "float32" else 64

    def options(self, pass_, backward):
        """Compiler options. Four warps hold a state of 64 x 64, eight one of 128 x 128."""
        wide, num_stages = self._wide(pass_), 1
        if self.product_dtype == "bfloat16":
            num_stages = 3 if not wide else 1 if backward else 2
        return {"num_warps": 8 if wide else 4, "num_stages": num_stages}

    def _wide(self, pass_):
        return max(self._dims[pass_.key], self._dims[pass_.value]) > 64

    @functools.cached_property
    def rows(self):
        return self.batch * self.heads

    @functools.cached_property
    def chunks(self):
        return -(-self.length // self.chunk)

    @functools.cached_property
    def span_chunks(self):
        spans = max(1, _PROGRAMS // self.rows)
        if self.rows >= _ROWS:
            spans = 1
        return max(_FEWEST_SPAN_CHUNKS, -(-self.chunks // spans))

    @functools.cached_property
    def spans(self):
        return -(-self.chunks // self.span_chunks)

    @functools.cached_property
    def product_dtype(self):
        """The dtype of products' operands and of tensors between passes, of float32's range."""
        # The interpreter multiplies no bfloat16.
        return "bfloat16" if self.dtype == "bfloat16" and not interpreted() else "float32"

    @functools.cached_property
    def _dims(self):
        dims = {"query": self.dim, "key": self.dim, "value": self.value_dim}
        for pass_ in self.passes:
            dims[pass_.output] = dims[pass_.value]
            for pair in ((pass_.query, pass_.key), (pass_.added or pass_.value, pass_.value)):
                sizes = tuple(dims[x] for x in pair)
                if sizes[0] != sizes[1]:
                    raise ValueError(
                        "The queries and keys of a pass must have one size, as must its values "
                        f"and what is added to its outputs. Received: {pass_}, {pair} of {sizes}"
                    )
        return dims

    @functools.cached_property
    def kept(self):
        """The outputs that later passes multiply."""
        operands = {name for pass_ in self.passes for name in pass_.operands}
        return tuple(pass_.output for pass_ in self.passes if pass_.output in operands)

    @functools.cached_property
    def added(self):
        """Names of tensors whose gradient may be that of a sum, which is needed elsewhere."""
        return {x.added for x in self.passes if x.added and not x.query_factor}

    def output(self, pass_):
        """The shape and dtype of what a pass gives; a part of a sum is not rounded."""
        dtype = "float32"
        if pass_ is self.passes[-1]:
            dtype = self.dtype
        elif pass_.output in self.kept:
            dtype = self.product_dtype
        return self.sequence(pass_.output, dtype)

    def sequence(self, name, dtype):
        """The shape and dtype of a tensor that passes take or give, with the query heads."""
        return (self.batch, self.length, self.heads, self._dims[name]), dtype

    def state(self, pass_, count, dtype="float32"):
        """The shape and dtype of the state of a pass, transposed, `count` for each row."""
        rows = self.batch, self.heads
        return (*rows, count, self._dims[pass_.value], self._dims[pass_.key]), dtype

    def constants(self, pass_):
        """What the kernels know of a pass when they are compiled."""
        dim, value_dim = self._dims[pass_.key], self._dims[pass_.value]
        return {
            "POWER": pass_.power,
            "SCALE": pass_.scale,
            "QUERY_GROUP": self._group_of(pass_.query),
            "KEY_GROUP": self._group_of(pass_.key),
            "VALUE_GROUP": self._group_of(pass_.value),
            "ADDED_GROUP": self._group_of(pass_.added),
            "DIM": dim,
            "VALUE_DIM": value_dim,
            "CHUNK": self.chunk,
            "BLOCK": block_of(dim),
            "VALUE_BLOCK": block_of(value_dim),
            "SAME": pass_.key == pass_.value,
            "SEVERAL_SPANS": self.spans > 1,
            "DECAYS": self.decays,
            "WIDE": self._wide(pass_),
            # With decays close tokens weigh most. States, which are float32, do not hold these.
            "REFINE": self.decays and not self._wide(pass_),
            "PRECISION": "tf32x3",  # of products of float32; others are exact
        }

    def _group_of(self, name):
        """The number of query heads that share a head of it."""
        return self.heads // self.key_heads if name in ("key", "value") else 1


plan_of = functools.lru_cache(maxsize=256)(Plan)  # as computing it takes longer than short kernels
