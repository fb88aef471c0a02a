"""What stages and layers are, in float64 and without any code of the package, in torch.

Stages take arrays or tensors, and loop over tokens.
"""

from definitions import serial
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


def decoder_block(w, x, **options):
    """A block on one document `(length, features)`: see `layer`; `w` has the mixer's, too."""
    mixer = {name.removeprefix("mixer/"): y for name, y in w.items()}
    x = x + layer(mixer, rms_norm(x, w["mixer_norm/scale"], 1e-6), **options)
    hidden = rms_norm(x, w["mlp_norm/scale"], 1e-6)
    return x + gate(hidden @ w["up/kernel"], hidden @ w["gate/kernel"]) @ w["down/kernel"]


def layer(
    w,
    x,
    num_heads,
    key_dim,
    num_key_value_heads=None,
    operator="hla2",
    decay=None,
    rope_max_wavelength=10_000,
    feature_map=None,
    conv_activation="silu",
    output_norm=True,
    **_,
):
    """The layer on one document `(length, features)`, by its weights and some of its arguments."""
    length, key_heads = len(x), num_key_value_heads or num_heads

    def dense(x, name):
        bias = w.get(f"cell/{name}/bias")
        product = x @ w[f"cell/{name}/kernel"]
        return product if bias is None else product + bias

    q, k, v = (dense(x, name) for name in ("query", "key", "value"))
    if "cell/conv/kernel" in w:
        kernels = w["cell/conv/kernel"].split([y.shape[1] for y in (q, k, v)], dim=1)
        mixed = (
            convolve(y[None], kernel, conv_activation)[0][0]
            for y, kernel in zip((q, k, v), kernels, strict=True)
        )
        q, k, v = mixed
    q, k = q.view(length, num_heads, key_dim), k.view(length, key_heads, key_dim)
    v = v.view(length, key_heads, -1)
    if "cell/query_norm/scale" in w:
        q, k = (
            rms_norm(y, w[f"cell/{name}_norm/scale"], 1e-6)
            for y, name in ((q, "query"), (k, "key"))
        )
    if feature_map == "softplus":
        q, k = (torch.log1p(torch.exp(y)) for y in (q, k))
    if rope_max_wavelength is not None:
        half = key_dim // 2
        speed = rope_max_wavelength ** (-torch.arange(half, dtype=x.dtype) / half)
        angle = torch.arange(length, dtype=x.dtype)[:, None] * speed
        q, k = (rotate(y[None], angle.cos()[None], angle.sin()[None], 1)[0] for y in (q, k))
    log_decay = torch.zeros((length, num_heads), dtype=x.dtype)
    if decay == "input":
        log_decay = -torch.log1p(torch.exp(-dense(x, "decay/logit")))
    elif decay is not None:
        log_decay = log_decay + torch.log(torch.tensor(decay, dtype=x.dtype))
    k, v = (y.repeat_interleave(num_heads // key_heads, dim=1) for y in (k, v))
    output, _ = serial(operator, *(y[None] for y in (q * key_dim**-0.5, k, v, log_decay)))
    output = output[0]
    if output_norm:
        output = rms_norm(output, w["cell/norm/scale"], 1e-6)
    output = output.reshape(length, -1)
    if "cell/gate/kernel" in w:
        output = gate(output, dense(x, "gate"))
    return dense(output, "output")
