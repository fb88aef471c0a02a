"""The kernel launches that a plan asks for, as far as they are known before their inputs.

They are made once for each plan, since making them takes as long as the kernels.
"""

import functools
from typing import Any

import triton.language as tl

from keras_hla.kernels.launching import Launch
from keras_hla.kernels.operator.backward import backward_kernel
from keras_hla.kernels.operator.decays import decay_gradient_kernel, decay_kernel
from keras_hla.kernels.operator.forward import forward_kernel
from keras_hla.kernels.operator.shards import between_kernel, shard_kernel
from keras_hla.kernels.operator.spans import span_kernel

_STATE_BLOCK = 1024  # elements of a state in a program that only sums states

_cached = functools.lru_cache(maxsize=4096)


@_cached
def forward(plan, pass_, entering, save, leaving):
    """Gives the output, the state after it if `leaving`, and if `save` those before each chunk."""
    outputs = (
        plan.output(pass_),
        plan.state(pass_, 1) if leaving else None,
        plan.state(pass_, plan.chunks, plan.product_dtype) if save else None,
    )
    return _of_pass(
        forward_kernel,
        plan,
        pass_,
        outputs,
        FACTOR=pass_.factor,
        ENTERING=entering,
        SAVE=save,
        LEAVING=leaving,
    )


@_cached
def backward(plan, pass_, entering, add_query, add_key, leaving):
    """Gives the gradients of query, key, and value; `flows` and `inners`; that of the state."""
    key = None if pass_.key == pass_.query else pass_.key
    value = None if pass_.value == pass_.key else pass_.value
    outputs = [
        x and plan.sequence(x, _dtype_of_gradient(plan, pass_, x))
        for x in (pass_.query, key, value)
    ]
    count = (plan.rows, plan.chunks)
    decay_outputs = [((*count, plan.chunk), "float32"), (count, "float32")]
    outputs += decay_outputs if plan.decays else [None, None]
    outputs.append(plan.state(pass_, 1) if leaving else None)
    launch = _of_pass(
        backward_kernel,
        plan,
        pass_,
        outputs,
        ENTERING=entering,
        LEAVING=leaving,
        QUERY_FACTOR=pass_.query_factor / pass_.scale,
        KEY_IS_QUERY=key is None,
        ADD_QUERY=add_query,
        ADD_KEY=add_key,
    )
    # A gradient that is added to has the dtype of the products, and is not needed after it.
    before = ("dquery_before", pass_.query, add_query), ("dkey_before", pass_.key, add_key)
    for place, (name, of, adds) in enumerate(before):
        same = outputs[place] == plan.sequence(of, plan.product_dtype)
        if adds and same and of not in plan.added:
            launch.in_place[place] = backward_kernel.arg_names.index(name)
    return launch


@_cached
def span_states(plan, pass_, reverse, of_all):
    """Gives the states of spans and the decays over them."""
    constants: dict[str, Any] = {"REVERSE": reverse, "ALL": of_all}
    if reverse:  # the queries, and the gradients of outputs
        group = plan.constants(pass_)["QUERY_GROUP"]
        constants |= {"KEY_GROUP": group, "VALUE_GROUP": 1, "SAME": False}
    else:
        constants["SCALE"] = 1.0  # as it is of outputs alone
    span_decays = ((plan.rows, plan.spans), "float32") if plan.decays else None
    outputs = (plan.state(pass_, plan.spans), span_decays)
    return _of_pass(span_kernel, plan, pass_, outputs, **constants)


@_cached
def shard(plan, pass_, reverse):
    """Gives the states of the own shard and the decays over it, in one array."""
    size = plan.rows * (_size_of_state(plan, pass_) + plan.decays)
    outputs = (((size,), "float32"),)
    return _of_states(shard_kernel, plan, pass_, (plan.spans,), outputs, reverse)


@_cached
def between(plan, pass_, count, reverse, entering):
    """Gives the states before each of `count` shards, `(count, ...)`, and those after all."""
    size = plan.rows * _size_of_state(plan, pass_)
    stride = -(-size // 4) * 4  # so that the states of each are at an aligned address
    outputs = ((count, stride), "float32"), plan.state(pass_, 1)
    numbers = (count, stride)
    return _of_states(between_kernel, plan, pass_, numbers, outputs, reverse, ENTERING=entering)


@_cached
def decays(plan, shape):
    """Gives the decays of `shape` as the kernels read them: see `decay_kernel`."""
    batch, length, heads = shape
    strides = (length * heads if batch > 1 else 0, heads, 1 if heads > 1 else 0)
    output = ((plan.rows, plan.chunks, 4, plan.chunk), "float32")
    exact = plan.product_dtype == "float32"
    return _of_chunks(decay_kernel, plan, strides, output, EXACT=exact)


@_cached
def decay_gradient(plan):
    """Gives the gradient of log-decays, for each head."""
    output = ((plan.batch, plan.length, plan.heads), "float32")
    return _of_chunks(decay_gradient_kernel, plan, (), output)


def _of_pass(kernel, plan, pass_, outputs, **constants):
    """A program for each span of each row."""
    constants = plan.constants(pass_) | constants
    constants["PRODUCT"] = getattr(tl, plan.product_dtype)
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    grid = (plan.rows * plan.spans,)
    numbers = (plan.length, plan.heads, plan.spans, plan.span_chunks)
    options = plan.options(pass_, backward=kernel is backward_kernel)
    return Launch(kernel, grid, numbers, tuple(outputs), constants, options)


def _of_states(kernel, plan, pass_, numbers, outputs, reverse, **constants):
    """A program for each block of the states of each row."""
    size = _size_of_state(plan, pass_)
    constants |= {"SIZE": size, "BLOCK": _STATE_BLOCK, "REVERSE": reverse, "DECAYS": plan.decays}
    grid = (plan.rows * -(-size // _STATE_BLOCK),)
    return Launch(kernel, grid, (plan.rows, *numbers), outputs, constants)


def _size_of_state(plan, pass_):
    *_, value_dim, dim = plan.state(pass_, 1)[0]
    return value_dim * dim


def _of_chunks(kernel, plan, numbers, output, **constants):
    """A program for each chunk of each row."""
    grid = (plan.rows * plan.chunks,)
    numbers = (plan.length, plan.heads, *numbers)
    return Launch(kernel, grid, numbers, (output,), {"CHUNK": plan.chunk, **constants})


def _dtype_of_gradient(plan, pass_, name):
    """The products' dtype for what earlier passes add to or read, else the input's dtype."""
    earlier = plan.passes[: plan.passes.index(pass_)]
    if any(name in (*other.operands, other.added, other.output) for other in earlier):
        return plan.product_dtype
    # Where heads share keys, their gradients are yet to be summed.
    shared = plan.heads > plan.key_heads and name != "query"
    return "float32" if shared else plan.dtype
