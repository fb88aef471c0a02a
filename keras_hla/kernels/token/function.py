"""The function that the kernel of a token computes, and the chains of operators that it has."""

import functools

from keras_hla.kernels.launching import KernelFunction, Launch, block_of
from keras_hla.kernels.passes import passes_of
from keras_hla.kernels.stages.tiles import dtype_of
from keras_hla.kernels.token.kernel import token_kernel

_MOST_PASSES = 3
_OF_PASS = (
    *("QUERY", "KEY", "VALUE", "ADDED", "SCALE", "FACTOR", "POWER"),
    *("OWN", "ROWS", "COLUMNS"),
)
_NAMES = (
    *("x", "window", "kernel", "query_scale", "key_scale", "position", "turns", "lost", "decays"),
    *("mask", "scale", "gates"),
)


def chain_of(operator):
    """The passes of an operator, with numbers for the names of tensors.

    Returns `None` if the kernel does not have its passes.
    """
    passes = passes_of(operator)
    if passes is None or len(passes) > _MOST_PASSES:
        return None
    names = ["query", "key", "value", *(x.output for x in passes)]
    chain = []
    for x in passes:
        sources = [names.index(name) for name in (x.query, x.key, x.value, x.added or x.value)]
        chain.append((*sources, x.scale, x.factor, x.power, x.state))
    return tuple(chain)


@functools.lru_cache(maxsize=256)
def _launch(shape, dtype, options, given, states, decays):
    """The launch for `x` of a shape and dtype.

    Args:
        given: the names of the tensors that are given.
        states: the shapes of the states.
        decays: the shape of the decays, or `None`.
    """
    (batch, features), options = shape, dict(options)
    chain, heads, size = options["chain"], options["heads"], options["conv_kernel_size"]
    dim, value_dim = options["key_dim"], options["value_dim"]
    constants = {
        "HEADS": heads,
        "KEY_HEADS": options["key_heads"],
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "BLOCK": block_of(dim),
        "VALUE_BLOCK": block_of(value_dim),
        "SIZE": size or 1,
        "SILU": options["silu"],
        "QK_NORM": "query_scale" in given,
        "QK_EPSILON": options["qk_epsilon"],
        "ROTATE": options["rotate"],
        "FACTOR": options["scale"],
        "DECAY_ROWS": int(decays is not None and decays[0] > 1),
        "DECAY_HEADS": 0 if decays is None else decays[-1],
        "LOGITS": options["logits"],
        "LEAST": options["least_log_decay"],
        "MASK": "mask" in given,
        "NORM": "scale" in given,
        "EPSILON": options["epsilon"],
        "GATE": "gates" in given,
        "PASSES": len(chain),
    }
    after: list = [None] * _MOST_PASSES
    for i in range(_MOST_PASSES):
        *of_pass, state = chain[min(i, len(chain) - 1)]
        of_pass += states[state][1:]
        constants |= {f"{name}{i}": x for name, x in zip(_OF_PASS, of_pass, strict=True)}
        if i < len(chain):
            after[i] = states[state], "float32"
    output = (batch, heads, value_dim), options["dtype"]
    window = ((batch, size - 1, features), "float32") if size else None
    position = ((batch, 2), "float32") if options["rotate"] else None
    warps = {"num_warps": 4 if max(dim, value_dim) <= 64 else 8}
    outputs = output, window, position, *after
    return Launch(token_kernel, (batch * heads,), (), outputs, constants, warps)


def _prepare(options, tensors):
    """The launch, its inputs, and the states that its passes have, in order."""
    x, order = tensors["x"], [state for *_, state in dict(options)["chain"]]
    states = [tensors[f"state{i}"] for i in range(len(order))]
    shapes = tuple(tuple(s.shape) for s in states)
    decays = tuple(tensors["decays"].shape) if "decays" in tensors else None
    launch = _launch(tuple(x.shape), dtype_of(x), options, frozenset(tensors), shapes, decays)
    inputs = [*map(tensors.get, _NAMES), *(states[i] for i in order)]
    return launch, inputs + [None] * (_MOST_PASSES - len(order)), order


def _in_order(results, order):
    """The output, the states of the operator in their order, the window and the position."""
    output, window, position, *after = results
    states = [after[order.index(i)] for i in range(len(order))]
    return output, *states, *(x for x in (window, position) if x is not None)


def _evaluate(run, options, tensors, save):
    launch, inputs, order = _prepare(options, tensors)
    return _in_order(run(launch, inputs), order), ()


def _gradients(run, options, tensors, saved, results, wanted):
    raise RuntimeError(
        "The kernel of a token has no gradients. Use implementation='portable' for a model that "
        "streams and is trained."
    )


def _shapes(options, tensors, save):
    launch, _, order = _prepare(options, tensors)
    return _in_order(launch.outputs, order), ()


def _count(options):
    options = dict(options)
    return 1 + len(options["chain"]) + (options["conv_kernel_size"] is not None) + options["rotate"]


#: Options, as pairs of a name and a value: `dtype`, that of the output; `chain`, of the operator;
#: `heads`, `key_heads`, `key_dim` and `value_dim`; `conv_kernel_size`, or `None`, and whether its
#: activation is `silu`; whether to `rotate`; the `scale` of queries; whether decays are `logits`,
#: and the `least_log_decay`; `qk_epsilon` and `epsilon`, of norms.
#: Tensors: `x`, the projections `(batch, features)`; `window` and `kernel`, of a convolution;
#: `query_scale` and `key_scale`, of norms; `position`, `(batch, 2)`, `turns` and `lost`, of a
#: rotation; `decays`, `(batch or 1, heads, key heads or 1)`; `mask`, int32, `(batch,)`; `scale`, of
#: the output norm; `gates`; `state0`, ... Results: the output `(batch, heads, value_dim)`, the
#: states of the operator, the window and the position.
TOKEN = KernelFunction("token", _evaluate, _gradients, _shapes, count=_count)
