"""Attention and its block in PyTorch, for `plain_attention`: functions of an input and weights."""

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel


def announced():
    return "flash (sdpa_kernel)", "*flash"


def cast(x, dtype):
    return x.to(getattr(torch, dtype))


def block(x, norm, qkv, out, mlp_norm, gate, up, down, cosines, sines):
    x = x + attention(functional.rms_norm(x, norm.shape, norm, 1e-6), qkv, out, cosines, sines)
    y = functional.rms_norm(x, norm.shape, mlp_norm, 1e-6)
    return x + (functional.silu(y @ gate) * (y @ up)) @ down


def attention(x, qkv, out, cosines, sines):
    """Tensors `(batch, length, width)`, and the angles' cosines and sines, `(length, dim)`."""
    dim = cosines.shape[-1]
    q, k, v = (x @ qkv).unflatten(-1, (3, -1, dim)).permute(2, 0, 3, 1, 4)
    q, k = (y * cosines + _turned(y) * sines for y in (q, k))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # or an error
        output = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return output.transpose(1, 2).flatten(2) @ out


def _turned(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)
