"""Third order: the causal product `((W Wᵀ) ⊙ L) W V` (arXiv:2510.27258, section 7)."""

import dataclasses

from keras_hla.operators.operator import Operator, Scan, outer, read, scores
from keras_hla.types import SegmentShapes, State, StateShapes, Tensor


@dataclasses.dataclass(frozen=True)
class HLA3(Operator):
    """`o_t = Σ_{i,l≤j≤t} a(j→t)³ a(i→j) a(l→j) (q_t·k_i) (k_i·q_j) (q_j·k_l) v_l`.

    Without decay this is `((W Wᵀ) ⊙ L) W V`, `W = L ⊙ (Q Kᵀ)`: no factor looks
    ahead. (What the paper prints for third order is another operator, see
    `HLA3Published`.) The states are the key moment `S`, that of linear attention
    `P`, and `F_t = a_t³ F_{t-1} + (S_t q_t) (q_tᵀ P_t)`.
    """

    state_names = ("S", "P", "F")
    segment_names = ("Q", "X", "Y")

    def with_options(self, masked: bool, ridge: float) -> Operator:
        if ridge:
            super().with_options(masked, ridge)
        return HLA3() if masked else HLA3Unmasked()

    def state_shapes(self, key_heads: int, query_heads: int, d: int, dv: int) -> StateShapes:
        return (key_heads, d, d), (key_heads, d, dv), (query_heads, d, dv)

    def segment_shapes(self, key_heads: int, query_heads: int, d: int, dv: int) -> SegmentShapes:
        return (query_heads, d, d), (query_heads, d, dv), (query_heads, d, d)

    def weights(self, query: Tensor, key: Tensor, decay: Tensor) -> Tensor:
        W = decay * scores(query, key)
        metric = scores(scores(query, key), W)  # Σ_i (q_t·k_i) a(i→j) (k_i·q_j)
        return (decay**3 * metric) @ W

    def step(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, decay: Tensor
    ) -> tuple[Tensor, State]:
        S, P, F = state
        S = decay * S + outer(key, key)
        P = decay * P + outer(key, value)
        F = decay**3 * F + outer(read(S, query), read(P, query))
        return read(F, query), (S, P, F)

    def chain(
        self, scan: Scan, state: State, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, State]:
        S, P, F = state
        moved, S = scan(query, key, key, S)  # S_j q_j
        answer, P = scan(query, key, value, P)  # q_jᵀ P_j
        output, F = scan(query, moved, answer, F, power=3)
        return output, (S, P, F)

    def summarize(self, scan: Scan, query: Tensor, key: Tensor, value: Tensor) -> State:
        moved, S = scan(query, key, key)
        answer, P = scan(query, key, value)
        F = scan.last_state(moved, answer, power=3)
        Q = scan.last_state(query, query)
        X = scan.last_state(query, answer, power=2)
        Y = scan.last_state(moved, query, power=2)
        return S, P, F, Q, X, Y

    def combine(self, left: Tensor, right: Tensor, decay: Tensor) -> State:
        (S, P, F, Q, X, Y), (S_right, P_right, F_right, Q_right, X_right, Y_right) = left, right
        across = decay * Q_right @ P  # the keys and values of the left, read on the right
        F = decay**3 * F + F_right + decay * Y_right @ P
        F = F + decay * S @ (X_right + across)
        X = decay**2 * X + X_right + across
        Y = decay**2 * Y + Y_right + decay * S @ Q_right
        return decay * S + S_right, decay * P + P_right, F, decay * Q + Q_right, X, Y


@dataclasses.dataclass(frozen=True)
class HLA3Unmasked(Operator):
    """`o_t = q_tᵀ S_t Q_t P_t` (section 7.1): the same sum over all `i, j, l ≤ t`."""

    state_names = ("S", "Q", "P")

    def with_options(self, masked: bool, ridge: float) -> Operator:
        return HLA3().with_options(masked, ridge)

    def state_shapes(self, key_heads: int, query_heads: int, d: int, dv: int) -> StateShapes:
        return (key_heads, d, d), (query_heads, d, d), (key_heads, d, dv)

    def weights(self, query: Tensor, key: Tensor, decay: Tensor) -> Tensor:
        y = (decay * scores(query, key)) @ key
        z = (decay * scores(y, query)) @ query
        return decay * scores(z, key)

    def step(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, decay: Tensor
    ) -> tuple[Tensor, State]:
        S, Q, P = state
        S = decay * S + outer(key, key)
        Q = decay * Q + outer(query, query)
        P = decay * P + outer(key, value)
        return read(P, read(Q, read(S, query))), (S, Q, P)

    def chain(
        self, scan: Scan, state: State, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, State]:
        S, Q, P = state
        y, S = scan(query, key, key, S)
        z, Q = scan(y, query, query, Q)
        output, P = scan(z, key, value, P)
        return output, (S, Q, P)
