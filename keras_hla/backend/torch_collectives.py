"""Collectives of processes under PyTorch, differentiable any number of times.

They have no forward mode: `torch.compile` makes one graph only of what defines none.
"""

import torch
from torch import distributed

# PyTorch 2.13 gave them new names.
_all_gather = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)
_reduce_scatter = getattr(distributed, "reduce_scatter_single", distributed.reduce_scatter_tensor)


def all_gather(x, group):
    """The tensors of all processes of a group, stacked along a new first axis."""
    # Without gradients there is no need of `AllGather`, which has a CPU overhead.
    return AllGather.apply(x, group) if x.requires_grad else _stacked(x, group)


def _stacked(x, group):
    size = distributed.get_world_size(group)
    gathered = x.new_empty((size * x.numel(),))
    _all_gather(gathered, x.reshape(-1), group=group)
    return gathered.view(size, *x.shape)


class _OfGroup(torch.autograd.Function):
    """A function of a tensor and the group of processes."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]


class AllGather(_OfGroup):
    """`all_gather` with gradients."""

    forward = staticmethod(_stacked)

    @staticmethod
    def backward(ctx, gradient):
        return ReduceScatter.apply(gradient, ctx.group), None


class GatheredBefore(_OfGroup):
    """`AllGather` where the result is known, and only gradients are communicated."""

    @staticmethod
    def forward(x, group, known):
        return known.view_as(known)

    @staticmethod
    def backward(ctx, gradient):
        return ReduceScatter.apply(gradient, ctx.group), None, None


class ReduceScatter(_OfGroup):
    """The sum over the processes of a group of their entries for this one, of the first axis."""

    @staticmethod
    def forward(x, group):
        total = x.new_empty((x[0].numel(),))
        _reduce_scatter(total, x.reshape(-1), group=group)
        return total.view(x.shape[1:])

    @staticmethod
    def backward(ctx, gradient):
        return AllGather.apply(gradient, ctx.group), None
