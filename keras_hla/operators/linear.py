"""First order: plain causal linear attention, the primitive itself."""

import dataclasses

from keras_hla.operators.operator import Operator, outer, read, scores


@dataclasses.dataclass(frozen=True)
class Linear(Operator):
    """`o_t = Σ_{j≤t} a(j→t) (q_t·k_j) v_j`, with `a(j→t)` the decay after `j` up to `t`."""

    state_names = ("H",)

    def state_shapes(self, key_heads, query_heads, d, dv):
        return ((key_heads, d, dv),)

    def weights(self, query, key, decay):
        return decay * scores(query, key)

    def step(self, state, query, key, value, decay):
        (H,) = state
        H = decay * H + outer(key, value)
        return read(H, query), (H,)

    def chain(self, scan, state, query, key, value):
        (H,) = state
        output, H = scan(query, key, value, H)
        return output, (H,)

    def summarize(self, scan, query, key, value):
        return (scan.last_state(key, value),)

    def combine(self, left, right, decay):
        return (decay * left[0] + right[0],)
