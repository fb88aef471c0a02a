"""The states between shards of several spans, by the kernels that PyTorch launches."""

import numpy as np
import pytest
import torch

from keras_hla.kernels.launching.torch_launcher import run
from keras_hla.kernels.operator import launches
from keras_hla.kernels.operator.plan import Plan
from keras_hla.kernels.passes import Pass


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("decays", [False, True])
def test_states_between_shards(rng, decays, reverse):
    """Three shards of three spans are nine spans, of which each adds to what it decays."""
    pass_ = Pass(0, "query", "key", "value", 1, "output")
    plan = Plan((pass_,), 1, 64 * 8 * 3, 3, 3, 35, 33, "float32", decays)
    assert plan.spans == 3
    states = rng.standard_normal((3, 3, 3, 33, 35))  # of shards, heads and spans
    factors = rng.uniform(0, 1, (3, 3, 3)) if decays else np.ones((3, 3, 3))
    factors[0, 0, 1] = 0 if decays else 1
    entering = rng.standard_normal((3, 33, 35))
    order = [2, 1, 0] if reverse else [0, 1, 2]

    expected, state = [None] * 3, entering
    for m in order:
        expected[m] = state
        for i in order:
            state = factors[m, :, i, None, None] * state + states[m, :, i]

    def tensor(x):
        return torch.tensor(np.ascontiguousarray(x), dtype=torch.float32)

    launch = launches.shard(plan, pass_, reverse)
    given = [
        (tensor(x), tensor(a) if decays else None) for x, a in zip(states, factors, strict=True)
    ]
    shards = torch.stack([run(launch, spans)[0] for spans in given])
    launch = launches.between(plan, pass_, 3, reverse, entering=True)
    before, last = run(launch, (shards, tensor(entering)))
    before = before[:, : expected[0].size].reshape(3, *entering.shape)
    np.testing.assert_allclose(before, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(last[0, :, 0], state, rtol=1e-5, atol=1e-5)
