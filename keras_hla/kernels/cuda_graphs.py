"""Whether layers are recorded as CUDA graphs under PyTorch."""

_setting = {"enabled": True}


def enable_cuda_graphs() -> None:
    """Lets layers be recorded as CUDA graphs under PyTorch, as they are by default.

    A layer whose stages are one function (see `why_not_fused` of `HLA`) takes longer to launch
    than to compute, unless the sequences are large. From its third call in a row with inputs of the
    same shape on, it is replayed as a CUDA graph, forward and backward, which the host starts by
    one call. Results are the same. A graph holds what the gradients need, about the memory that
    each step takes without it, until the layer is gone or is called with another shape for a
    while.
    """
    _setting["enabled"] = True


def disable_cuda_graphs() -> None:
    """Launches the kernels of layers one by one, and lets go of the graphs of each layer.

    Graphs are for gradients that are computed once for each call. Disable them where gradients
    are asked for a second time (`retain_graph=True`) after the layer computed other outputs, which
    raises `RuntimeError`, and where memory counts more than time.
    """
    _setting["enabled"] = False


def is_cuda_graphs_enabled() -> bool:
    """Whether layers may be recorded as CUDA graphs."""
    return _setting["enabled"]
