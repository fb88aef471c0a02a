"""The paper's Algorithms 1 and 3 as printed, decay included (arXiv:2510.27258).

With decay, or at third order, they are not what the text around them says: see
the page on errata. They are here for comparison with the paper.
"""

import dataclasses

from keras_hla.operators.hla2 import HLA2
from keras_hla.operators.hla3 import HLA3
from keras_hla.operators.operator import Operator, Scan, outer, read, scores
from keras_hla.scan import before
from keras_hla.types import State, StateShapes, Tensor


@dataclasses.dataclass(frozen=True)
class HLA2Published(Operator):
    """Algorithm 1: `o_t = q_tᵀ ((S_t + λ I) C_t − G_t)`.

    `S`, `C` and `G` all decay by `a_t`, and `G` takes in `k_t (k_tᵀ C_{t-1})`.
    Without decay it is `HLA2`.
    """

    ridge: float = 0.0
    state_names = ("S", "C", "G")
    exclusive = True

    def with_options(self, masked: bool, ridge: float) -> Operator:
        ridge = ridge or self.ridge
        return HLA2Published(ridge) if masked else HLA2(ridge).with_options(masked, ridge)

    def state_shapes(self, key_heads: int, query_heads: int, d: int, dv: int) -> StateShapes:
        return (key_heads, d, d), (query_heads, d, dv), (query_heads, d, dv)

    def weights(self, query: Tensor, key: Tensor, decay: Tensor) -> Tensor:
        W = decay * scores(query, key)
        moved = W @ key + self.ridge * query
        return decay * scores(moved, query) - W @ (before(decay) * scores(key, query))

    def step(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, decay: Tensor
    ) -> tuple[Tensor, State]:
        S, C, G = state
        G = decay * G + outer(key, read(C, key))
        S = decay * S + outer(key, key)
        C = decay * C + outer(query, value)
        moved = read(S, query) + self.ridge * query
        return read(C, moved) - read(G, query), (S, C, G)

    def chain(
        self, scan: Scan, state: State, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, State]:
        S, C, G = state
        moved, S = scan(query, key, key, S)
        earlier, _ = scan(key, query, value, C, exclusive=True)  # k_tᵀ C_{t-1}
        output, C = scan(moved + self.ridge * query, query, value, C)
        correction, G = scan(query, key, earlier, G)
        return output - correction, (S, C, G)


@dataclasses.dataclass(frozen=True)
class HLA3Published(Operator):
    """Algorithm 3: `o_t = q_tᵀ (S_t Q_t P_t − G_t)`, `G` the sum of its three corrections.

    Without decay it keeps the terms `(q_t·k_i) (k_i·q_j) (q_j·k_l) v_l` in which
    the largest of `i, j, l` is reached at least twice.
    """

    state_names = ("S", "Q", "P", "G")
    exclusive = True

    def with_options(self, masked: bool, ridge: float) -> Operator:
        return HLA3().with_options(masked, ridge) if ridge or not masked else self

    def state_shapes(self, key_heads: int, query_heads: int, d: int, dv: int) -> StateShapes:
        return (key_heads, d, d), (query_heads, d, d), (key_heads, d, dv), (query_heads, d, dv)

    def weights(self, query: Tensor, key: Tensor, decay: Tensor) -> Tensor:
        W, earlier = decay * scores(query, key), before(decay)
        W_earlier = earlier * scores(query, key)
        y = W @ key
        z = (decay * scores(y, query)) @ query
        u = (earlier * scores(key, query)) @ query
        first = W @ (earlier * scores(u, key))
        second = (decay * scores(query, W_earlier @ key)) @ W_earlier
        third = decay * scores(query, (earlier * scores(u, key)) @ key)
        return decay * scores(z, key) - first - second - third

    def step(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, decay: Tensor
    ) -> tuple[Tensor, State]:
        S, Q, P, G = state
        u = read(Q, key)
        G = decay * G + outer(key, read(P, u))
        G = G + outer(read(S, query), read(P, query)) + outer(read(S, u), value)
        S = decay * S + outer(key, key)
        Q = decay * Q + outer(query, query)
        P = decay * P + outer(key, value)
        return read(P, read(Q, read(S, query))) - read(G, query), (S, Q, P, G)

    def chain(
        self, scan: Scan, state: State, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, State]:
        def earlier(query, key, value, state):
            return scan(query, key, value, state, exclusive=True)[0]

        S, Q, P, G = state
        u = earlier(key, query, query, Q)  # Q_{t-1} k_t
        first, G_first = scan(query, key, earlier(u, key, value, P), G)
        second, G_second = scan(query, earlier(query, key, key, S), earlier(query, key, value, P))
        third, G_third = scan(query, earlier(u, key, key, S), value)
        y, S = scan(query, key, key, S)
        z, Q = scan(y, query, query, Q)
        output, P = scan(z, key, value, P)
        return output - first - second - third, (S, Q, P, G_first + G_second + G_third)
