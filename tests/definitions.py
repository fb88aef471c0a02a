"""What the operators are, in float64 and without any code of the package.

`index_sum` writes the sums out, term by term; `Definition` writes the same with
masked matrices in torch, which can be differentiated. A test holds one to the
other. Arrays are `(batch, length, heads, dim)`, log-decays `(batch, length,
heads)`, states `(batch, heads, rows, columns)`.
"""

import numpy as np
import torch


def index_sum(operator, query, key, value, log_decay):
    """The outputs as sums over token indices."""
    batch, length, heads, _ = query.shape
    output = np.zeros((batch, length, heads, value.shape[-1]))
    for b, h in np.ndindex(batch, heads):
        q, k, v, g = query[b, :, h], key[b, :, h], value[b, :, h], log_decay[b, :, h]

        def decay(j, t, g=g):  # of the tokens after j, up to t
            return np.exp(g[j + 1 : t + 1].sum())

        for t in range(length):
            for j in range(t + 1):
                if operator == "linear":
                    output[b, t, h] += decay(j, t) * (q[t] @ k[j]) * v[j]
                    continue
                for i in range(j + 1):
                    weight = (q[t] @ k[i]) * (k[i] @ q[j])
                    output[b, t, h] += decay(i, t) * decay(j, t) * weight * v[j]
    return output


class Definition:
    """Outputs, last states and gradients by masked matrices, in float64.

    Args:
        operator: name of the operator.
        query, key, value: arrays of equally many heads.
        log_decay: array, or `None`.
        state: list of arrays, or `None`.
    """

    def __init__(self, operator, query, key, value, log_decay=None, state=None):
        def leaf(x):
            return torch.tensor(np.asarray(x, "float64"), requires_grad=True)

        self.inputs = [leaf(x) for x in (query, key, value)]
        if log_decay is not None:
            self.inputs.append(leaf(log_decay))
        q, k, v = (x.transpose(1, 2) for x in self.inputs[:3])
        g = torch.zeros(q.shape[:3], dtype=torch.float64)
        if log_decay is not None:
            g = self.inputs[3].transpose(1, 2)
        self.state_inputs = [leaf(x) for x in state or ()]

        total = g.cumsum(-1)
        past = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool).tril()
        decay = (total[..., :, None] - total[..., None, :]).masked_fill(~past, -np.inf).exp()
        start = total[..., None].exp()  # from the initial state to each token
        end = decay[..., -1, :, None]  # from each token to the last
        scores = q @ k.transpose(-1, -2)
        if operator == "linear":
            output = (decay * scores) @ v
            states = [(end * k).transpose(-1, -2) @ v]
            if state:
                (H,) = self.state_inputs
                output = output + start * (q @ H)
                states[0] = states[0] + start[..., -1:, :] * H
        else:
            moved = (decay * scores) @ k  # u_j = S_j q_j, from the tokens alone
            states = [(end * k).transpose(-1, -2) @ k]
            if state:
                S, F = self.state_inputs
                moved = moved + start * (q @ S)
                states[0] = states[0] + start[..., -1:, :] * S
            output = (decay**2 * (q @ moved.transpose(-1, -2))) @ v
            states.append((end**2 * moved).transpose(-1, -2) @ v)
            if state:
                output = output + start**2 * (q @ F)
                states[1] = states[1] + start[..., -1:, :] ** 2 * F
        self._output = output.transpose(1, 2)
        self._states = states
        self.output = self._output.detach().numpy()
        self.states = [s.detach().numpy() for s in states]

    def gradients(self, output_weight, state_weights):
        """Of `Σ output · weight + Σ states · weights`, for inputs and initial states."""
        loss = (self._output * torch.tensor(output_weight)).sum()
        for state, weight in zip(self._states, state_weights, strict=True):
            loss = loss + (state * torch.as_tensor(weight)).sum()
        inputs = self.inputs + self.state_inputs
        return [x.numpy() for x in torch.autograd.grad(loss, inputs)]
