"""First order: plain causal linear attention, the primitive itself."""

import dataclasses

from keras_hla.operators.operator import Operator, Scan, outer, read, scores
from keras_hla.types import State, StateShapes, Tensor


@dataclasses.dataclass(frozen=True)
class Linear(Operator):
    """`o_t = Σ_{j≤t} a(j→t) (q_t·k_j) v_j`, with `a(j→t)` the decay after `j` up to `t`."""

    state_names = ("H",)

    def state_shapes(self, key_heads: int, query_heads: int, d: int, dv: int) -> StateShapes:
        return ((key_heads, d, dv),)

    def weights(self, query: Tensor, key: Tensor, decay: Tensor) -> Tensor:
        return decay * scores(query, key)

    def step(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, decay: Tensor
    ) -> tuple[Tensor, State]:
        (H,) = state
        H = decay * H + outer(key, value)
        return read(H, query), (H,)

    def chain(
        self, scan: Scan, state: State, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, State]:
        (H,) = state
        output, H = scan(query, key, value, H)
        return output, (H,)

    def summarize(self, scan: Scan, query: Tensor, key: Tensor, value: Tensor) -> State:
        return (scan.last_state(key, value),)

    def combine(self, left: Tensor, right: Tensor, decay: Tensor) -> State:
        return (decay * left[0] + right[0],)
