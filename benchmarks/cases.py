"""The cases that are measured: shapes, dtypes, and arrays."""

from dataclasses import dataclass, replace

import numpy as np

KINDS = ("blocks", "layers", "models")  # of `--layers`, the most important first
# The defaults on a CPU, and on a GPU.
SHAPES = {
    "operators": (["1x4x4096x64"], ["8x16x8192x64"]),
    "layers": (["1x4x4096x64"], ["16x12x2048x64", "4x12x8192x64"]),
    "blocks": (["1x4x4096x64"], ["16x12x2048x64", "4x12x8192x64"]),
    "models": (["1x4x512x64"], ["8x12x2048x64"]),
}
# Of models: one that costs little, and one of the size that text models have.
VOCABULARIES = ([1_000], [256, 32_000])
SHORT = 300  # tokens at which gradients are checked against length x length matrices


@dataclass(frozen=True)
class Case:
    """Queries, keys and values of `(batch, length, heads, dim)`, and the decay, if any."""

    batch: int
    heads: int
    length: int
    dim: int
    value_dim: int
    dtype: str = "float32"
    decay: bool = False
    vocabulary: int | None = None  # of a model

    @classmethod
    def parse(cls, text, **options):
        """From `batch x heads x length x dim [x value_dim]`, as in `8x16x8192x64`."""
        sizes = [int(size) for size in text.split("x")]
        if len(sizes) not in (4, 5) or min(sizes) < 1:
            raise ValueError(
                f"A shape must be batch x heads x length x dim [x value_dim]. Received: {text!r}"
            )
        batch, heads, length, dim = sizes[:4]
        return cls(batch, heads, length, dim, value_dim=sizes[-1], **options)

    @property
    def shape(self):
        sizes = [self.batch, self.heads, self.length, self.dim]
        return "x".join(map(str, sizes + [self.value_dim] * (self.value_dim != self.dim)))

    def __str__(self):
        return f"{self.shape} {self.dtype}{' with decay' if self.decay else ''}"

    def short(self):
        """A small case of the same head sizes."""
        return replace(
            self,
            batch=min(self.batch, 2),
            heads=min(self.heads, 2),
            length=min(self.length, SHORT),
        )

    def arrays(self, seed=0):
        """Float32 arrays: query, key, value; the outputs' gradient; log-decay or `None`."""
        rng = np.random.default_rng(seed)

        def normal(size):
            return rng.standard_normal((self.batch, self.length, self.heads, size), "float32")

        scale = np.float32(self.dim**-0.5)
        inputs = [normal(self.dim) * scale, normal(self.dim) * scale, normal(self.value_dim)]
        cotangent = normal(self.value_dim)
        log_decay = None
        if self.decay:
            log_decay = np.log(rng.uniform(0.9, 1, (self.batch, self.length, self.heads)))
            log_decay = log_decay.astype("float32")
        return inputs, cotangent, log_decay
