"""First order: plain causal linear attention, the primitive itself."""

from keras import ops

from keras_hla.operators.operator import Operator, outer, read


class Linear(Operator):
    """`o_t = Σ_{j≤t} a(j→t) (q_t·k_j) v_j`, with `a(j→t)` the decay after `j` up to `t`."""

    name = "linear"
    state_names = ("H",)

    def state_shapes(self, key_heads, query_heads, d, dv):
        return ((key_heads, d, dv),)

    def weights(self, query, key, decay):
        return decay * ops.matmul(query, ops.swapaxes(key, -1, -2))

    def step(self, state, query, key, value, decay):
        (H,) = state
        H = decay * H + outer(key, value)
        return read(H, query), (H,)

    def chunked(self, scan, state, query, key, value):
        (H,) = state
        output, H = scan(query, key, value, H)
        return output, (H,)
