"""Second order, asymmetric: the paper's AHLA (arXiv:2510.27258, section 6)."""

import dataclasses

from keras_hla.operators.operator import Operator, Scan, outer, read, scores
from keras_hla.types import SegmentShapes, State, StateShapes, Tensor


@dataclasses.dataclass(frozen=True)
class AHLA(Operator):
    """`o_t = Σ_{j≤i≤t} a(i→t) a(j→i) (q_t·k_i) (q_i·k_j) v_j`.

    Without decay this is `(W W) V`, `W = L ⊙ (Q Kᵀ)` (Theorem 6.1). The states
    are `P`, that of linear attention, and `E`, which takes in what `P` answers:
    `E_t = a_t E_{t-1} + k_t (q_tᵀ P_t)`.
    """

    state_names = ("P", "E")
    segment_names = ("R",)

    def state_shapes(self, key_heads: int, query_heads: int, d: int, dv: int) -> StateShapes:
        return (key_heads, d, dv), (query_heads, d, dv)

    def segment_shapes(self, key_heads: int, query_heads: int, d: int, dv: int) -> SegmentShapes:
        return ((query_heads, d, d),)

    def weights(self, query: Tensor, key: Tensor, decay: Tensor) -> Tensor:
        W = decay * scores(query, key)
        return W @ W

    def step(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, decay: Tensor
    ) -> tuple[Tensor, State]:
        P, E = state
        P = decay * P + outer(key, value)
        E = decay * E + outer(key, read(P, query))
        return read(E, query), (P, E)

    def chain(
        self, scan: Scan, state: State, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, State]:
        P, E = state
        answer, P = scan(query, key, value, P)  # q_iᵀ P_i
        output, E = scan(query, key, answer, E)
        return output, (P, E)

    def summarize(self, scan: Scan, query: Tensor, key: Tensor, value: Tensor) -> State:
        _, (P, E) = self.chain(scan, (None, None), query, key, value)
        return P, E, scan.last_state(key, query, power=0)  # R = Σ k qᵀ does not decay

    def combine(self, left: Tensor, right: Tensor, decay: Tensor) -> State:
        (P, E, R), (P_right, E_right, R_right) = left, right
        E = decay * E + E_right + decay * R_right @ P
        return decay * P + P_right, E, R + R_right
