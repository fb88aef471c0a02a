"""The operator token by token on a long stream: its time, and its error against float64."""

from keras import ops
import numpy as np

from benchmarks import reference, runtime, timing
from benchmarks.report import Row
import keras_hla
from keras_hla.backend.compiling import compiled_scan

HEADS, DIM, BLOCK = 2, 16, 1000
LOG_DECAY = -0.01
TOLERANCE = 1e-4  # of the worst block
GPU_TOLERANCE = 1e-2


def measure(count):
    """Returns rows along the way, each with the largest error of a block so far."""
    backend = runtime.current()

    def step(state, token):
        q, k, v = token
        output, state = keras_hla.ops.attention_step(q, k, v, list(state), log_decay=LOG_DECAY)
        return output, tuple(state)

    read = compiled_scan(step, [])
    state = tuple(ops.zeros((1, HEADS, DIM, DIM)) for _ in range(2))
    exact_state = np.zeros((2, HEADS, DIM, DIM))
    rng = np.random.default_rng(0)
    rows, milliseconds, worst = [], [], 0.0
    blocks = max(2, count // BLOCK)
    shown = {max(2, blocks * share // 100) for share in (0, 10, 50, 100)}
    for n in range(1, blocks + 1):
        arrays = rng.standard_normal((3, BLOCK, 1, HEADS, DIM)).astype("float32") / DIM**0.5
        inputs = (state, tuple(map(ops.convert_to_tensor, arrays)))
        if n in shown:
            milliseconds = [x / BLOCK for _ in range(5) for x in backend.time_calls(read, [inputs])]
        outputs, state = read(*inputs)
        exact = _exact(arrays[:, :, 0].astype("float64"), exact_state)
        worst = max(worst, reference.relative_error(ops.convert_to_numpy(outputs)[:, 0], exact))
        if n in shown:
            row = Row("the operator alone, token by token", f"hla2, to token {n * BLOCK:,}")
            row.errors["output"] = worst
            if not row.refuse(GPU_TOLERANCE if backend.on_gpu() else TOLERANCE):
                low, median, high = np.quantile(milliseconds, (0.25, 0.5, 0.75))
                row.times["token of a loop"] = timing.Times(median, low, high)
            rows.append(row)
    return rows


def _exact(arrays, state):
    """The outputs of a block, by the recurrence; the state is updated in place."""
    S, F = state
    decay = np.exp(LOG_DECAY)
    outputs = np.empty((BLOCK, HEADS, DIM))
    for t, (q, k, v) in enumerate(np.moveaxis(arrays, 1, 0)):
        S[:] = decay * S + k[:, :, None] * k[:, None]
        F[:] = decay**2 * F + (S @ q[..., None]) * v[:, None]
        outputs[t] = (q[:, None] @ F)[:, 0]
    return outputs
