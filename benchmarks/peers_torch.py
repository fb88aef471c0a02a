"""Peers on PyTorch: fused attention, flash-linear-attention's kernels, a minimal chunked form."""

import importlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks import chains
from benchmarks.contenders import Contender
from benchmarks.minimal import minimal_peers
from benchmarks.runtime_torch import on_gpu

CHUNK = 64


def peers(case, operators):
    """All peers, also those that are not installed."""
    found = minimal_peers(case, operators, minimal)
    found += [peer for operator in _with_first_order(operators) for peer in _fla(case, operator)]
    for name, backend in (
        ("sdpa", None),
        ("sdpa_flash", SDPBackend.FLASH_ATTENTION),
        ("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        if name == "sdpa_cudnn" and not on_gpu():
            found.append(Contender(name, "softmax", unavailable="needs a GPU", peer=name))
        else:
            found.append(Contender(name, "softmax", _attention(backend), peer=name))
    return found


def minimal(operator, query, key, value):
    """The chunked form of a chain, and nothing else."""
    length, padding = query.shape[1], -query.shape[1] % CHUNK

    def chunks(x):
        """Shape (batch, heads, chunks, tokens, dim)."""
        x = pad(x.float(), (0, 0, 0, 0, 0, padding)) if padding else x.float()
        return x.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4).contiguous()

    mask = torch.ones(CHUNK, CHUNK, device=query.device).tril()

    def attend(a, b, c, power):
        sums = b.mT @ c
        before = torch.cumsum(sums, dim=2) - sums
        return ((a @ b.mT) * mask) @ c + a @ before

    output = chains.run(operator, chunks(query), chunks(key), chunks(value), attend)
    output = output.permute(0, 2, 3, 1, 4).flatten(1, 2)
    return output[:, :length].to(query.dtype)


def _attention(backend):
    def function(query, key, value, log_decay=None):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if backend is None:
            output = scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            with sdpa_kernel(backend):
                output = scaled_dot_product_attention(query, key, value, is_causal=True)
        return output.transpose(1, 2)

    return function


def _with_first_order(operators):
    return [*operators, *(["linear"] if "linear" not in operators else [])]


def _fla(case, operator):
    """The chain by kernels of flash-linear-attention, without and with decay."""
    if not chains.plain(operator):
        return []
    count = len(chains.CHAINS[operator])
    found = []
    for peer, name, decays, make in (
        ("fla_linear_attn", "chunk_linear_attn", False, _linear_attn),
        ("fla_simple_gla", "chunk_simple_gla", True, _simple_gla),
    ):
        label = f"fla {operator}: {count} x {name}"
        reason = fla_missing("fla.ops.simple_gla")
        if decays != case.decay:
            reason = "is for a decay" if decays else "has no decay"
        if reason:
            found.append(Contender(label, operator, unavailable=reason, peer=peer))
        else:
            found.append(Contender(label, operator, make(operator), peer=peer))
    return found


def fla_missing(module):
    """Why a module of flash-linear-attention cannot be used, or an empty string."""
    if not on_gpu():
        return "flash-linear-attention needs a GPU"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"flash-linear-attention cannot be imported: {error}"
    return ""


def _linear_attn(operator):
    from fla.ops.linear_attn import chunk_linear_attn

    def attend(a, b, c, power):
        return chunk_linear_attn(a, b, c, scale=1.0, normalize=False)[0]

    return lambda query, key, value: chains.run(operator, query, key, value, attend)


def _simple_gla(operator):
    from fla.ops.simple_gla import chunk_simple_gla

    def function(query, key, value, log_decay):
        def attend(a, b, c, power):
            return chunk_simple_gla(a, b, c, g=power * log_decay, scale=1.0)[0]

        return chains.run(operator, query, key, value, attend)

    return function
