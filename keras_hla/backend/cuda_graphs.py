"""Whether layers and loops of steps are recorded as CUDA graphs under PyTorch."""

_setting = {"enabled": True}


def enable_cuda_graphs() -> None:
    """Records layers and loops of steps as CUDA graphs under PyTorch, which is the default.

    The CPU overhead of a layer whose stages are one function (see `HLA.why_not_fused`) exceeds its
    time on the GPU, unless the sequences are large. From the third consecutive call with inputs of
    one shape on, the layer is replayed as a CUDA graph, forward and backward, with one launch each.
    Results are the same. A graph keeps the activations of the layer, about the memory of one
    training step without it, until the layer is deleted or is called with other shapes for a while.

    The loops in which `generate` and the scheduler write tokens are recorded in their second
    consecutive call of one shape.
    """
    _setting["enabled"] = True


def disable_cuda_graphs() -> None:
    """Launches the kernels of layers one by one, and frees the graphs of each layer.

    With graphs, gradients can be computed once for each call. A second time (`retain_graph=True`)
    after the layer has computed other outputs raises `RuntimeError`: disable graphs there, and
    where memory matters more than time.
    """
    _setting["enabled"] = False


def is_cuda_graphs_enabled() -> bool:
    """Whether layers may be recorded as CUDA graphs."""
    return _setting["enabled"]
