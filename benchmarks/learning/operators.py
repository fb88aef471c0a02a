"""Candidates for the package, as custom operators: second order and terms of lower order."""

import dataclasses

from keras_hla import operators
from keras_hla.operators import AHLA, Operator, outer, read, scores


@dataclasses.dataclass(frozen=True)
class HLA2WithLower(Operator):
    """`hla2` whose moment starts at `λ I`, plus first order, `μ LA(q, k, v)`.

    The moment reads `u_j = (S_j + λ I) q_j`: `S` as if it began from `λ I`, which does not decay.
    Without decay that is the paper's ridge, and it needs neither a state nor a pass.
    """

    prior: float = 0.0
    first: float = 0.0

    @property
    def state_names(self):
        return ("S", "F", "H") if self.first else ("S", "F")

    def state_shapes(self, key_heads, query_heads, d, dv):
        shapes = (key_heads, d, d), (query_heads, d, dv), (key_heads, d, dv)
        return shapes[: len(self.state_names)]

    def weights(self, query, key, decay):
        W = decay * scores(query, key)
        moved = scores(scores(query, key), W) + self.prior * scores(query, query)
        return decay**2 * moved + self.first * W

    def step(self, state, query, key, value, decay):
        S, F, *H = state
        S = decay * S + outer(key, key)
        F = decay**2 * F + outer(read(S, query) + self.prior * query, value)
        H = [decay * x + outer(key, value) for x in H]
        return sum((self.first * read(x, query) for x in H), start=read(F, query)), (S, F, *H)

    def chain(self, scan, state, query, key, value):
        S, F, *H = state
        moved, S = scan(query, key, key, S)
        output, F = scan(query, moved + self.prior * query, value, F, power=2)
        if not self.first:
            return output, (S, F)
        direct, H = scan(query, key, value, *H)
        return output + self.first * direct, (S, F, H)


@dataclasses.dataclass(frozen=True)
class AHLAWithFirst(AHLA):
    """`ahla` plus first order, `μ LA(q, k, v)`, which its first pass computes anyway."""

    first: float = 1.0

    def weights(self, query, key, decay):
        return super().weights(query, key, decay) + self.first * decay * scores(query, key)

    def step(self, state, query, key, value, decay):
        output, (P, E) = super().step(state, query, key, value, decay)
        return output + self.first * read(P, query), (P, E)

    def chain(self, scan, state, query, key, value):
        P, E = state
        answer, P = scan(query, key, value, P)
        output, E = scan(query, key, answer, E)
        return output + self.first * answer, (P, E)


CANDIDATES = {
    "hla2_prior0.3": HLA2WithLower(prior=0.3),
    "hla2_prior": HLA2WithLower(prior=1.0),
    "hla2_prior3": HLA2WithLower(prior=3.0),
    "hla2_first": HLA2WithLower(first=1.0),
    "hla2_prior_first": HLA2WithLower(prior=1.0, first=1.0),
    "ahla_first": AHLAWithFirst(),
}
for _name, _operator in CANDIDATES.items():
    operators.register(_name, _operator)
