"""What stages and layers are, in float64 and without any code of the package, in torch.

Stages take arrays or tensors, and loop over tokens.
"""

import torch


def silu(x):
    return x / (1 + torch.exp(-x))


ACTIVATIONS = {"silu": silu, "tanh": torch.tanh, None: lambda x: x}


def convolve(x, kernel, activation=None, window=None, mask=None, starts=None):
    """The outputs, which are zero at masked tokens, and the last window."""
    size, features = kernel.shape
    outputs, windows = [], []
    for row, tokens in enumerate(x):
        nothing = [torch.zeros(features, dtype=x.dtype)] * (size - 1)
        before = nothing if window is None else list(window[row])
        for t, token in enumerate(tokens):
            if starts is not None and starts[row, t]:
                before = nothing
            if mask is not None and not mask[row, t]:
                outputs.append(torch.zeros(features, dtype=x.dtype))
                continue
            read = [*before, token]
            total = sum(w * y for w, y in zip(kernel, read, strict=True))
            outputs.append(ACTIVATIONS[activation](total))
            before = read[1:]
        windows.append(torch.stack(before))
    return torch.stack(outputs).reshape(x.shape), torch.stack(windows)


def rotate(x, cos, sin, scale):
    """A pair of features, half of them apart, is a complex number."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    turned = pairs * torch.complex(cos, sin)[:, :, None] * scale
    return torch.cat([turned.real, turned.imag], dim=-1)


def rms_norm(x, scale, epsilon):
    squares = torch.einsum("...i,...i->...", x, x) / x.shape[-1]
    return torch.einsum("...i,...,i->...i", x, 1 / torch.sqrt(squares + epsilon), scale)


def gate(x, gates):
    return silu(gates) * x
