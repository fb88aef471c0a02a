"""The stages that PyTorch's own functions compute."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional


class TensorFunction(NamedTuple):
    """A `KernelFunction` without kernels."""

    evaluate: Callable
    gradients: Callable
    reads: tuple | None = None


def _project(run, shapes, tensors, save):
    x = tensors["x"]
    flat, results, kernels = None, [], []
    for i, shape in enumerate(shapes):
        kernel = tensors[f"kernel{i}"].to(x.dtype)
        bias = tensors.get(f"bias{i}")
        flat = x.view(-1, kernel.shape[0])
        y = flat @ kernel if bias is None else torch.addmm(bias.to(x.dtype), flat, kernel)
        results.append(y.view(*x.shape[:2], *shape))
        kernels.append(kernel)
    cast = tensors["kernel0"].dtype != x.dtype
    return tuple(results), tuple(kernels) if save and cast else ()


def _project_gradients(run, shapes, tensors, saved, results, wanted):
    x, found, dx = tensors["x"], {}, None
    for i, result in enumerate(results):
        kernel = tensors[f"kernel{i}"]
        flat = x.view(-1, kernel.shape[0])
        g = result.reshape(-1, kernel.shape[1])
        if f"kernel{i}" in wanted:
            found[f"kernel{i}"] = _product(flat.t(), g, kernel.dtype)
        if f"bias{i}" in wanted:
            found[f"bias{i}"] = g.sum(0, dtype=tensors[f"bias{i}"].dtype)
        if "x" in wanted:
            kernel = saved[i] if saved else kernel
            dx = g @ kernel.t() if dx is None else dx.addmm_(g, kernel.t())
    if dx is not None:
        found["x"] = dx.view(x.shape)
    return found


#: `x W_i + b_i` for each of the kernels. Options: the shapes of the features of the results.
#: Tensors: `x`, `kernel0`, `bias0`, ...
PROJECT = TensorFunction(_project, _project_gradients)


def _project_together(run, options, tensors, save):
    x = tensors["x"]
    kernel = torch.cat([tensors[f"kernel{i}"].to(x.dtype) for i in range(options[0])], dim=1)
    flat = x.view(-1, kernel.shape[0])
    if "bias0" in tensors:
        bias = torch.cat([tensors[f"bias{i}"].to(x.dtype) for i in range(options[0])])
        y = torch.addmm(bias, flat, kernel)
    else:
        y = flat @ kernel
    return (y.view(*x.shape[:2], -1),), (kernel,) if save else ()


def _project_together_gradients(run, options, tensors, saved, results, wanted):
    x, (kernel,) = tensors["x"], saved
    found: dict = {}
    flat, g = x.view(-1, kernel.shape[0]), results[0].view(-1, kernel.shape[1])
    sizes = [tensors[f"kernel{i}"].shape[1] for i in range(options[0])]
    dtype = tensors["kernel0"].dtype
    if any(f"kernel{i}" in wanted for i in range(options[0])):
        parts = _product(flat.t(), g, dtype).split(sizes, dim=1)
        found |= {f"kernel{i}": part for i, part in enumerate(parts)}
    if any(f"bias{i}" in wanted for i in range(options[0])):
        parts = g.sum(0, dtype=dtype).split(sizes)
        found |= {f"bias{i}": part for i, part in enumerate(parts)}
    if "x" in wanted:
        found["x"] = (g @ kernel.t()).view(x.shape)
    return found


#: `x W + b` for the kernels, concatenated. Options: the number of kernels. Tensors: `x`,
#: `kernel0`, `bias0`, ...
PROJECT_TOGETHER = TensorFunction(_project_together, _project_together_gradients)


def _add(run, options, tensors, save):
    return (tensors["x"] + tensors["y"],), ()


def _add_gradients(run, options, tensors, saved, results, wanted):
    return dict.fromkeys(("x", "y"), results[0])


ADD = TensorFunction(_add, _add_gradients, reads=())


def _permute(run, options, tensors, save):
    return (_rows(tensors["x"], tensors["order"]),), ()


def _permute_gradients(run, options, tensors, saved, results, wanted):
    return {"x": _rows(results[0], tensors["inverse"])}


def _rows(x, index):
    return x.reshape(-1, x.shape[-1]).index_select(0, index).view(x.shape)


#: The tokens of all sequences in another order. Tensors: `x`, and the permutation of the indices of
#: all tokens with its inverse.
PERMUTE = TensorFunction(_permute, _permute_gradients, reads=("inverse",))


def _concatenate(run, options, tensors, save):
    return (torch.cat([tensors["before"], tensors["x"]], dim=1),), ()


def _concatenate_gradients(run, options, tensors, saved, results, wanted):
    (gradient,) = results
    count = tensors["before"].shape[1]
    before, x = gradient[:, :count], gradient[:, count:]
    return {"before": before.contiguous(), "x": x.contiguous()}


#: `before` and then `x`, along the length.
CONCATENATE = TensorFunction(_concatenate, _concatenate_gradients, reads=("before",))


def _last_tokens(run, options, tensors, save):
    return (tensors["x"][:, -options[0] :].contiguous(),), ()


def _last_tokens_gradients(run, options, tensors, saved, results, wanted):
    gradient = torch.zeros_like(tensors["x"])
    gradient[:, -options[0] :] = results[0]
    return {"x": gradient}


#: Options: how many of the last tokens of `x`.
LAST_TOKENS = TensorFunction(_last_tokens, _last_tokens_gradients)


def _scale(run, options, tensors, save):
    return (tensors["x"] * options[0],), ()


def _scale_gradients(run, options, tensors, saved, results, wanted):
    return {"x": results[0] * options[0]}


#: Options: the factor of `x`.
SCALE = TensorFunction(_scale, _scale_gradients, reads=())


def _log_decay(run, options, tensors, save):
    x, kernel = tensors["x"], tensors["kernel"]
    logits = _exact_product(x.view(-1, x.shape[-1]), kernel)
    if "bias" in tensors:
        logits += tensors["bias"]
    logits = logits.view(*x.shape[:2], -1)
    result = functional.logsigmoid(logits).clamp_(min=options[0])
    if "starts" in tensors:
        result.masked_fill_(tensors["starts"][..., None], options[0])
    return (result,), (logits,) if save else ()


def _log_decay_gradients(run, options, tensors, saved, results, wanted):
    x, kernel, (logits,) = tensors["x"], tensors["kernel"], saved
    g = results[0] * torch.sigmoid(-logits)
    forgets = logits < options[0]  # as log-sigmoid is its argument there
    if "starts" in tensors:
        forgets |= tensors["starts"][..., None]
    g = g.masked_fill_(forgets, 0.0).view(-1, kernel.shape[1])
    found = {"bias": g.sum(0)}
    g = g.to(x.dtype)
    found["kernel"] = _product(x.view(-1, x.shape[-1]).t(), g, kernel.dtype)
    found["x"] = (g @ kernel.t().to(x.dtype)).view(x.shape)
    return found


def _product(x, y, dtype):
    """`x @ y` in `dtype`, from sums in float32."""
    if x.is_cuda and x.dtype == torch.bfloat16 and dtype == torch.float32:
        return torch.mm(x, y, out_dtype=dtype)
    return (x @ y).to(dtype)


def _exact_product(x, kernel):
    """`x @ kernel` in float32, without a float32 copy of a bfloat16 `x`."""
    if not (x.is_cuda and x.dtype == torch.bfloat16):
        return x.to(kernel.dtype) @ kernel
    first = kernel.to(x.dtype)
    # The rounding error of the kernel is appended as further columns.
    kernels = torch.cat([first, (kernel - first).to(x.dtype)], dim=1)
    first, second = _product(x, kernels, kernel.dtype).chunk(2, dim=1)
    return first + second


#: `log sigmoid(x W + b)`, float32, but the least decay where a segment starts.
#: Options: the least log-decay. Tensors: `x`, `kernel`, `bias`, `starts`.
LOG_DECAY = TensorFunction(_log_decay, _log_decay_gradients)
