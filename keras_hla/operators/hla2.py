"""Second order, masked: the paper's HLA (arXiv:2510.27258, sections 3 and 4)."""

from keras import ops

from keras_hla.operators.operator import Operator, outer, read
from keras_hla.scan import causal_mask


class HLA2(Operator):
    """`o_t = Σ_{i≤j≤t} a(i→t) a(j→t) (q_t·k_i) (k_i·q_j) v_j`.

    Without decay this is `((W Wᵀ) ⊙ L) V`, `W = L ⊙ (Q Kᵀ)` (Theorem 3.1).
    The states are the key moment `S` and the paper's corrected moment
    `F = S C − G` (Eq. 3.3), which needs neither `C` nor `G`:
    `F_t − F_{t−1} = S_t q_t v_tᵀ` at `a = 1`.
    """

    name = "hla2"
    state_names = ("S", "F")

    def state_shapes(self, key_heads, query_heads, d, dv):
        return (key_heads, d, d), (query_heads, d, dv)

    def weights(self, query, key, decay):
        scores = ops.matmul(query, ops.swapaxes(key, -1, -2))
        causal = ops.cast(causal_mask(ops.shape(scores)[-1]), scores.dtype)
        earlier = ops.swapaxes(causal * scores, -1, -2)  # k_i·q_j, i <= j
        return decay * ops.matmul(decay * scores, earlier)

    def step(self, state, query, key, value, decay):
        S, F = state
        S = decay * S + outer(key, key)
        F = decay * decay * F + outer(read(S, query), value)
        return read(F, query), (S, F)

    def chunked(self, scan, state, query, key, value):
        S, F = state
        moved, S = scan(query, key, key, S)  # u_j = S_j q_j
        output, F = scan(query, moved, value, F, power=2)
        return output, (S, F)
