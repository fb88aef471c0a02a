"""What the operators are, in float64 and without any code of the package.

`index_sum` writes the sums over token indices out; `serial`, one token after the
other, writes the paper's algorithms with their states, so that it reaches long
sequences. A test holds one to the other. Both are torch, to be differentiated.

Arrays are `(batch, length, heads, dim)`, log-decays `(batch, length, heads)`,
states `(batch, heads, rows, columns)`.
"""

import numpy as np
import torch

EPSILON = 1e-6  # of normalized outputs


def index_sum(
    operator, q, k, v, g, *, masked=True, normalize=False, ridge=0.0, causal=True, epsilon=EPSILON
):
    """The outputs as sums over token indices, each named by its letter."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    A = torch.einsum("...td,...id->...ti", q, k)  # A[t, i] = q_t·k_i
    T = torch.einsum("...td,...id->...ti", q, q)
    n = A.shape[-1]
    t, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    if causal:
        total = g.transpose(1, 2).cumsum(-1)
        shifted = torch.nn.functional.pad(total[..., :-1], (1, 0))
        # D[t, j]: the product of the decays after token j up to t; B: up to t - 1, for j < t.
        D = torch.where(j <= t, total[..., :, None] - total[..., None, :], -np.inf).exp()
        B = torch.where(j < t, shifted[..., :, None] - total[..., None, :], -np.inf).exp()
    else:
        D = torch.ones_like(A)
    order = torch.where(t <= j, 1.0, 0.0).double() if causal else torch.ones_like(A[0, 0])

    def sum_over(indices, *factors):
        return torch.einsum(",".join("..." + x for x in indices.split()) + "->...tl", *factors)

    if operator == "linear":
        w = sum_over("tl tl", A, D)
    elif operator == "hla2" and masked:
        w = sum_over("ti li ti tl il", A, A, D, D, order)
    elif operator == "ahla":
        w = sum_over("ti il ti il", A, A, D, D)
    elif operator == "hla3" and masked:
        w = sum_over("ti ji jl tj tj tj ji jl", A, A, A, D, D, D, D, D)
    elif operator in ("hla2", "hla2_published"):
        w = sum_over("ti li ti tl", A, A, D, D)
        if masked:
            w = w - sum_over("ti li ti il", A, A, D, B)
    elif operator in ("hla3", "hla3_published"):
        w = sum_over("ti ji jl ti tj tl", A, A, A, D, D, D)
        if masked:
            w = w - sum_over("ti ji jl ti ij il", A, A, A, D, B, B)
            w = w - sum_over("ti ji jl tj ji jl", A, A, A, D, B, B)
            w = w - sum_over("ti ji jl tl li lj", A, A, A, D, B, B)
    w = w + ridge * D * T
    output = w @ v
    if normalize:
        output = output / (w.sum(-1, keepdim=True) + epsilon)
    return output.transpose(1, 2)


def serial(
    operator, q, k, v, g, state=None, *, masked=True, normalize=False, ridge=0.0, epsilon=EPSILON
):
    """The outputs and the last states by the paper's algorithms, token by token.

    With `normalize` the vectors `m, h, n, η` of the paper stand beside their
    matrices, as a last column.
    """
    dv = v.shape[-1]
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    name = operator if masked else f"{operator.removesuffix('_published')} unmasked"
    step, columns = SERIAL[name + (" ridge" if ridge and name == "hla2" else "")]
    if state is None:
        columns = [{"q": q.shape[-1], "v": v.shape[-1]}[c] for c in columns]
        shape = (*q.shape[::2], q.shape[-1])
        state = [torch.zeros(*shape, c, dtype=torch.float64) for c in columns]
    outputs = []
    for t in range(q.shape[1]):
        decay = g[:, t, :, None, None].exp()
        o, state = step(state, q[:, t], k[:, t], v[:, t], decay, ridge)
        outputs.append(o[..., :dv] / (o[..., dv:] + epsilon) if normalize else o)
    return torch.stack(outputs, dim=1), list(state)


def outer(a, b):
    return a[..., :, None] * b[..., None, :]


def dot(a, M):
    return (a[..., None, :] @ M)[..., 0, :]


def serial_linear(state, q, k, v, a, ridge):
    H = a * state[0] + outer(k, v)
    return dot(q, H), [H]


def serial_hla2(state, q, k, v, a, ridge):
    S, F = state
    S = a * S + outer(k, k)
    F = a**2 * F + outer(dot(q, S), v)
    return dot(q, F), (S, F)


def serial_hla2_ridge(state, q, k, v, a, ridge):
    *state, C = state
    o, state = serial_hla2(state, q, k, v, a, ridge)
    C = a * C + outer(q, v)
    return o + ridge * dot(q, C), (*state, C)


def serial_hla2_unmasked(state, q, k, v, a, ridge):
    S, C = state
    S, C = a * S + outer(k, k), a * C + outer(q, v)
    return dot(dot(q, S) + ridge * q, C), (S, C)


def serial_algorithm_1(state, q, k, v, a, ridge):
    S, C, G = state
    G = a * G + outer(k, dot(k, C))
    S, C = a * S + outer(k, k), a * C + outer(q, v)
    u = dot(q, S) + ridge * q
    return dot(u, C) - dot(q, G), (S, C, G)


def serial_algorithm_2(state, q, k, v, a, ridge):
    P, E = state
    P = a * P + outer(k, v)
    E = a * E + outer(k, dot(q, P))
    return dot(q, E), (P, E)


def serial_hla3(state, q, k, v, a, ridge):
    S, P, F = state
    S, P = a * S + outer(k, k), a * P + outer(k, v)
    F = a**3 * F + outer(dot(q, S), dot(q, P))
    return dot(q, F), (S, P, F)


def serial_hla3_unmasked(state, q, k, v, a, ridge):
    S, Q, P = state
    S, Q, P = a * S + outer(k, k), a * Q + outer(q, q), a * P + outer(k, v)
    return dot(dot(dot(q, S), Q), P), (S, Q, P)


def serial_algorithm_3(state, q, k, v, a, ridge):
    S, Q, P, G = state  # G is G1 + G2 + G3, which are only ever read as a sum
    u1, a2 = dot(k, Q), dot(q, S)
    a3 = dot(u1, S)
    G = a * G + outer(k, dot(u1, P)) + outer(a2, dot(q, P)) + outer(a3, v)
    S, Q, P = a * S + outer(k, k), a * Q + outer(q, q), a * P + outer(k, v)
    return dot(dot(dot(q, S), Q), P) - dot(q, G), (S, Q, P, G)


SERIAL = {  # with the columns of the states: as many as those of the queries, or of the values
    "linear": (serial_linear, "v"),
    "hla2": (serial_hla2, "qv"),
    "hla2 ridge": (serial_hla2_ridge, "qvv"),
    "hla2 unmasked": (serial_hla2_unmasked, "qv"),
    "hla2_published": (serial_algorithm_1, "qvv"),
    "ahla": (serial_algorithm_2, "vv"),
    "hla3": (serial_hla3, "qvv"),
    "hla3 unmasked": (serial_hla3_unmasked, "qqv"),
    "hla3_published": (serial_algorithm_3, "qqvv"),
}


class Reference:
    """Outputs, last states and gradients of `index_sum` or `serial`, for arrays.

    Consecutive heads of the query share one of key, value, decay and state, where those are fewer;
    last states have the heads of those given.

    Args:
        definition: one of the two.
        operator: name of the operator.
        inputs: arrays of query, key and value.
        log_decay: array, also of batch size 1, or `None`.
        state: list of arrays, for `serial`.
        options: options of the definition.
    """

    def __init__(self, definition, operator, inputs, log_decay=None, state=(), **options):
        def leaf(x):
            return torch.tensor(np.asarray(x, "float64"), requires_grad=True)

        self._leaves = [leaf(x) for x in inputs]
        batch, length, heads, _ = self._leaves[0].shape

        def repeat(x, axis):
            return x.repeat_interleave(heads // x.shape[axis], axis)

        g = torch.zeros((batch, length, heads), dtype=torch.float64)
        if log_decay is not None:
            self._leaves.append(leaf(log_decay))
            g = repeat(self._leaves[-1], 2).expand(batch, -1, -1)
        arguments = [operator, *(repeat(x, 2) for x in self._leaves[:3]), g]
        if len(state):
            state = [leaf(x) for x in state]
            self._leaves += state
            arguments.append([repeat(x, 1) for x in state])
        result = definition(*arguments, **options)
        self._output, self._states = result if definition is serial else (result, [])
        if state:
            self._states = [
                last[:, :: heads // x.shape[1]] for last, x in zip(self._states, state, strict=True)
            ]
        self.output = self._output.detach().numpy()
        self.states = [s.detach().numpy() for s in self._states]

    def gradients(self, output_weight, state_weights=()):
        """Of `Σ output · weight + Σ states · weights`, for inputs, decay and state."""
        loss = (self._output * torch.as_tensor(output_weight)).sum()
        for state, weight in zip(self._states, state_weights, strict=False):
            loss = loss + (state * torch.as_tensor(weight)).sum()
        return [x.numpy() for x in torch.autograd.grad(loss, self._leaves)]
