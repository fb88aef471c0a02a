"""Serial loops under PyTorch: the step is traced once, into a graph of few operations."""

import functools
import operator
from typing import Any
import warnings

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from keras_hla.backend.torch_loop_graph import LoopRecordings

_aten = torch.ops.aten
_CONVERSIONS = (_aten.to.dtype, _aten.to.dtype_layout, _aten.to.device)
_SWAPS = (_aten.swapaxes.default, _aten.transpose.int)
# What may give all elements of its first argument in their order, in another shape.
_SHAPES = (
    _aten.reshape.default,
    _aten.view.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.expand.default,
    _aten.broadcast_to.default,
    *_SWAPS,
)
# Functions of the same arguments, of which a call takes less time.
_BINDINGS = {
    _aten.add.Tensor: torch.add,
    _aten.cat.default: torch.cat,
    _aten.cos.default: torch.cos,
    _aten.div.Tensor: torch.div,
    _aten.exp.default: torch.exp,
    _aten.floor.default: torch.floor,
    _aten.matmul.default: torch.matmul,
    _aten.mul.Tensor: torch.mul,
    _aten.pow.Tensor_Scalar: torch.pow,
    _aten.reshape.default: torch.reshape,
    _aten.rms_norm.default: torch.rms_norm,
    _aten.sin.default: torch.sin,
    _aten.sub.Tensor: torch.sub,
    _aten.where.self: torch.where,
}


class TracedLoop:
    """Calls `output, state = step(values, state, entries)` for entry after entry, for inference.

    Most of the time of a small step is that of Keras. So the step is traced, once
    for each combination of shapes, and what is traced runs instead: without Keras,
    and without what depends on the values alone, which runs once per loop. On a GPU
    the loop is recorded as a CUDA graph.

    A step that cannot be traced, since what it does depends on what tensors hold,
    runs as it is, with a warning.

    Args:
        step: takes a list of tensors, a tuple of states and a tuple of one entry of
            each of the inputs.
    """

    def __init__(self, step):
        self._step = step
        self._traced = {}

    def __call__(self, values, state, inputs):
        """Returns the outputs, stacked along the first axis, and the last states.

        Args:
            values: list of tensors, the same for all entries.
            state: tuple of tensors, whose shapes and dtypes the step keeps.
            inputs: tuple of tensors whose first axis is that of the entries.
        """
        with torch.no_grad():
            traced = self._trace(values, state, [x[0] for x in inputs])
            if traced is None:
                return _loop(functools.partial(self._call, len(state), values), state, inputs)
        with torch.inference_mode():
            return traced(values, state, inputs)

    def _call(self, count, values, *tensors):
        output, state = self._step(values, tensors[:count], tensors[count:])
        return [output, *state]

    def _trace(self, values, state, entry):
        """The loop of the traced step as a function, or `None`."""
        tensors = (*state, *entry)
        key = tuple((x.shape, x.dtype, x.device) for x in (*values, *tensors))
        if key not in self._traced:
            step = functools.partial(self._call, len(state))
            self._traced[key] = _trace(step, values, tensors)
        return self._traced[key]


def _loop(step, state, inputs):
    outputs = []
    for entry in zip(*(x.unbind() for x in inputs), strict=True):
        output, *state = step(*state, *entry)
        outputs.append(output)
    return torch.stack(outputs), tuple(state)


def _trace(function, values, tensors):
    """What `TracedLoop._trace` keeps."""

    def flat(*inputs):
        return function(inputs[: len(values)], *inputs[len(values) :])

    # With tensors that have no contents, so that nothing can depend on these unnoticed; and into
    # the largest operations that there are, for as few as possible.
    trace = make_fx(flat, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)
    try:
        # Each by itself: the trace takes one tensor that is given twice for one input.
        module = trace(*(x.detach() for x in (*values, *tensors)))
    except Exception as error:  # A step that is wrong raises again, where it runs as it is.
        warnings.warn(
            "PyTorch cannot trace a step of the model, which then takes several times as long. "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
        return None
    graph = module.graph
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:  # There are no gradients anyway.
            graph.erase_node(node)
    if not all(map(_is_function, graph.nodes)):
        step = fx.GraphModule(module, graph).forward
        return lambda values, *rest: _loop(functools.partial(step, *values), *rest)
    _simplify(graph)
    graphs = _split(graph, len(values))
    prepare, step = (fx.GraphModule(module, graph).forward for graph in graphs)
    return LoopRecordings(
        prepare, lambda prepared, *rest: _loop(functools.partial(step, *prepared), *rest)
    )


def _is_function(node):
    """Whether a node has no effect but its result, as far as others see."""
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = _schema(node).arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    return all(i < len(node.args) and _is_read_once(node.args[i]) for i in written)


def _is_read_once(node):
    """Whether no other node reads the tensor that a node gives, or a part of it."""
    schema = _schema(node)
    fresh = node.op == "placeholder" or (
        schema is not None and all(x.alias_info is None for x in schema.returns)
    )
    return fresh and len(node.users) == 1


def _schema(node):
    return getattr(node.target, "_schema", None)


def _writes(node):
    return _schema(node) is not None and _schema(node).is_mutable


def _simplify(graph):
    """Leaves out conversions that do nothing, and joins changes of shape."""
    for node in graph.nodes:
        before: Any = node.args[0] if node.args else None
        if not (isinstance(before, fx.Node) and {"val"} <= before.meta.keys() & node.meta.keys()):
            continue
        if node.target in _CONVERSIONS and _does_nothing(node):
            node.replace_all_uses_with(before)
        elif node.target in _SHAPES and _keeps_order(node):
            if before.target is _aten.reshape.default:
                before = before.args[0]
            shape = list(node.meta["val"].shape)
            if shape == list(before.meta["val"].shape):
                node.replace_all_uses_with(before)
            else:
                node.target, node.args, node.kwargs = _aten.reshape.default, (before, shape), {}
    graph.eliminate_dead_code()


def _does_nothing(node):
    before, after = node.args[0].meta["val"], node.meta["val"]
    copies = True in node.args or node.kwargs.get("copy")
    return not copies and (before.dtype, before.device) == (after.dtype, after.device)


def _keeps_order(node):
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
    if before.numel() != after.numel():
        return False
    if node.target is _aten.slice.Tensor and len(node.args) > 4:  # A stride may be negative.
        return False
    if node.target not in _SWAPS:
        return True
    first, second = sorted(axis % len(before) for axis in node.args[1:])
    # Of the axes that change places, and those between, all but one are of size 1.
    return sum(size > 1 for size in before[first : second + 1]) <= 1


def _split(graph, count):
    """The graph as two, the first of what depends on the first `count` inputs alone.

    Its outputs are the first inputs of the second.
    """
    early = _independent(list(graph.nodes), count)
    first, second = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in early:
        copies[node] = first.node_copy(node, copies.__getitem__)
    handed = [node for node in early if any(user not in early for user in node.users)]
    first.output([copies[node] for node in handed])
    copies = {node: second.placeholder(f"prepared_{i}") for i, node in enumerate(handed)}
    for node in graph.nodes:
        if node not in early:
            copies[node] = second.node_copy(node, copies.__getitem__)
            copies[node].target = _BINDINGS.get(node.target, node.target)
    return first, second


def _independent(nodes, count):
    """Those of the nodes, in order, that may run once for all entries."""
    early = dict.fromkeys(nodes[:count])
    for node in nodes[count:]:
        if (
            (node.op == "get_attr" or (node.op == "call_function" and _is_repeatable(node)))
            and all(x in early for x in node.all_input_nodes)
            and not any(_writes(user) for user in node.users)  # Made anew for each entry, then.
        ):
            early[node] = None
    return early


def _is_repeatable(node):
    """Whether an operation gives the same each time, without a trace."""
    return node.target is operator.getitem or not (
        _writes(node) or torch.Tag.nondeterministic_seeded in node.target.tags
    )
