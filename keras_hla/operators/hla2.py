"""Second order: the paper's HLA (arXiv:2510.27258, sections 3 and 4)."""

import dataclasses

from keras_hla.operators.operator import Operator, Scan, outer, read, scores
from keras_hla.types import SegmentShapes, State, StateShapes, Tensor


@dataclasses.dataclass(frozen=True)
class HLA2(Operator):
    """`o_t = Σ_{i≤j≤t} a(i→t) a(j→t) (q_t·k_i) (k_i·q_j) v_j`.

    Without decay this is `((W Wᵀ) ⊙ L) V`, `W = L ⊙ (Q Kᵀ)` (Theorem 3.1).
    The states are the key moment `S` and the paper's corrected moment
    `F = S C − G` (Eq. 3.3), which needs neither `C` nor `G`:
    `F_t − F_{t−1} = S_t q_t v_tᵀ` at `a = 1`.

    A `ridge` λ adds `λ q_tᵀ C_t`, `C_t = a_t C_{t-1} + q_t v_tᵀ`: `S + λ I` in
    the place of `S` where the paper's Algorithm 1 reads it.
    """

    ridge: float = 0.0

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("S", "F", "C") if self.ridge else ("S", "F")

    @property
    def segment_names(self) -> tuple[str, ...]:
        return () if self.ridge else ("C",)

    def with_options(self, masked: bool, ridge: float) -> Operator:
        return (HLA2 if masked else HLA2Unmasked)(ridge or self.ridge)

    def state_shapes(self, key_heads: int, query_heads: int, d: int, dv: int) -> StateShapes:
        F = C = (query_heads, d, dv)
        return ((key_heads, d, d), F, C)[: len(self.state_names)]

    def segment_shapes(self, key_heads: int, query_heads: int, d: int, dv: int) -> SegmentShapes:
        return ((query_heads, d, dv),)[: len(self.segment_names)]

    def weights(self, query: Tensor, key: Tensor, decay: Tensor) -> Tensor:
        W = decay * scores(query, key)
        metric = scores(scores(query, key), W)  # Σ_i (q_t·k_i) a(i→j) (k_i·q_j)
        weights = decay**2 * metric
        return weights + self.ridge * decay * scores(query, query) if self.ridge else weights

    def step(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, decay: Tensor
    ) -> tuple[Tensor, State]:
        S, F, *C = state
        S = decay * S + outer(key, key)
        F = decay**2 * F + outer(read(S, query), value)
        C = [decay * C_ + outer(query, value) for C_ in C]
        output = sum((self.ridge * read(C_, query) for C_ in C), start=read(F, query))
        return output, (S, F, *C)

    def chain(
        self, scan: Scan, state: State, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, State]:
        S, F, *C = state
        moved, S = scan(query, key, key, S)  # u_j = S_j q_j
        output, F = scan(query, moved, value, F, power=2)
        if not self.ridge:
            return output, (S, F)
        ridge, C = scan(query, query, value, *C)
        return output + self.ridge * ridge, (S, F, C)

    def summarize(self, scan: Scan, query: Tensor, key: Tensor, value: Tensor) -> State:
        moved, S = scan(query, key, key)
        return S, scan.last_state(moved, value, power=2), scan.last_state(query, value)

    def combine(self, left: Tensor, right: Tensor, decay: Tensor) -> State:
        (S, F, C), (S_right, F_right, C_right) = left, right
        F = decay**2 * F + F_right + decay * S @ C_right
        return decay * S + S_right, F, decay * C + C_right

    def composes_with(self, other: Operator) -> bool:
        return isinstance(other, HLA2)  # A segment holds the same whatever the ridge.


@dataclasses.dataclass(frozen=True)
class HLA2Unmasked(Operator):
    """`o_t = q_tᵀ S_t C_t` (Eq. 3.1): the same sum over all `i, j ≤ t`, in no order of the two."""

    ridge: float = 0.0
    state_names = ("S", "C")

    def with_options(self, masked: bool, ridge: float) -> Operator:
        return HLA2(ridge or self.ridge).with_options(masked, 0.0)

    def state_shapes(self, key_heads: int, query_heads: int, d: int, dv: int) -> StateShapes:
        return (key_heads, d, d), (query_heads, d, dv)

    def weights(self, query: Tensor, key: Tensor, decay: Tensor) -> Tensor:
        moved = (decay * scores(query, key)) @ key + self.ridge * query
        return decay * scores(moved, query)

    def step(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, decay: Tensor
    ) -> tuple[Tensor, State]:
        S, C = state
        S = decay * S + outer(key, key)
        C = decay * C + outer(query, value)
        return read(C, read(S, query) + self.ridge * query), (S, C)

    def chain(
        self, scan: Scan, state: State, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, State]:
        S, C = state
        moved, S = scan(query, key, key, S)  # S_t q_t
        output, C = scan(moved + self.ridge * query, query, value, C)
        return output, (S, C)
