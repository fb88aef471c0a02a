"""GPT-2 of the package transformers: a model of the same size, trained by PyTorch alone."""

import importlib

import torch

from benchmarks import language_model
from benchmarks.runtime_torch import on_gpu
from benchmarks.trainees import Announced, Trainee, width


def layers(case, which):
    del case, which
    return []


blocks = layers


def models(case, which):
    del case, which
    return [Trainee("transformers GPT-2", _build, unavailable=_missing(), peer="gpt2")]


def _missing():
    try:
        importlib.import_module("transformers.models.gpt2")
    except ImportError as error:
        return f"transformers cannot be imported: {error}"
    return ""


def _build(case, jit):
    """Float32 weights and autocast, SDPA, and a fused AdamW without weight decay."""
    from transformers import GPT2Config, GPT2LMHeadModel

    device = "cuda" if on_gpu() else "cpu"
    config = GPT2Config(
        vocab_size=case.vocabulary,
        n_positions=case.length,
        n_embd=width(case),
        n_layer=language_model.block_count(),
        n_head=case.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = GPT2LMHeadModel(config).train()
    forward = torch.compile(model) if jit == "on" else model
    optimizer = torch.optim.AdamW(
        model.parameters(), language_model.LEARNING_RATE, weight_decay=0.0, fused=on_gpu()
    )
    tokens, _ = language_model.text(case)
    tokens = torch.from_numpy(tokens).long().to(device)
    dtype = getattr(torch, case.dtype)

    def step():
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    sign = "*flash" if on_gpu() and case.dtype != "float32" else ""
    announced = Announced("sdpa, autocast, fused AdamW", sign)
    return language_model.Training(step, announced)
