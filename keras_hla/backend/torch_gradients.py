"""Functions under PyTorch whose gradients are written out: less is kept, and fewer tensors made.

All are differentiable twice, in forward mode, and under `torch.func`.
"""

import torch


class Rotation(torch.autograd.Function):
    """Turns each pair of features `(x_i, x_{i+dim/2})`, by cosines and sines `(..., dim / 2)`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, cos, sin):
        output = x * torch.cat([cos, cos], -1)
        (first, second), (x_first, x_second) = output.chunk(2, -1), x.chunk(2, -1)
        first -= x_second * sin
        second += x_first * sin
        return output

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx, gradient):
        cos, sin = ctx.saved_tensors
        return Rotation.apply(gradient, cos, -sin), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return Rotation.apply(tangent, *ctx.saved_tensors)


class RootMeanSquareNorm(torch.autograd.Function):
    """`x / sqrt(mean(x²) + epsilon) ⊙ scale`, over the last axis."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale, epsilon):
        return x * _inverse(x, epsilon) * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.epsilon = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, gradient):
        x, scale = ctx.saved_tensors
        inverse = _inverse(x, ctx.epsilon)
        normed = x * inverse
        of_scale = (gradient * normed).sum_to_size(scale.shape)
        return _change(gradient * scale, normed, inverse), of_scale, None

    @staticmethod
    def jvp(ctx, tangent, of_scale, _):
        x, scale = ctx.saved_tensors
        inverse = _inverse(x, ctx.epsilon)
        normed = x * inverse
        return _change(tangent, normed, inverse) * scale + normed * of_scale


def _inverse(x, epsilon):
    return (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def _change(x, normed, inverse):
    """How `normed`, which is `inverse` times its argument, changes by a change `x` of that."""
    mean = (x * normed).mean(-1, keepdim=True)
    return torch.addcmul(x, normed, mean, value=-1) * inverse
