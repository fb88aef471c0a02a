"""Models over several devices."""

from typing import Any

import keras

from keras_hla.layers import HLA, HLACell
from keras_hla.layers.hla_checks import check_split

__all__ = ["split_sequence"]


def split_sequence(model: keras.Model, context_parallel: Any) -> None:
    """Has the layers of a model take what each device holds for a part of one sequence.

    Afterwards each device calls the model with its own contiguous part of the tokens, all of them
    at the same time, and gets the outputs that these tokens have in the whole sequence: `HLA`
    layers exchange states, the last tokens that a convolution reads, and how many tokens there
    are. What is exchanged is of a size that does not depend on the length. Where the outputs of
    all devices go into the loss, the gradients are those of the whole sequence; under PyTorch
    each process holds its share of those of weights, and they are the sum over processes.

    - `mask` and `segment_ids` are those of the part, and all devices give them, or none. A segment
      may cross borders.
    - The initial state is the one before the first token of all and must be the same on all
      devices, as the returned one is, after the last token of all; and so is the output with
      `return_sequences=False`.
    - All other layers of the model must act on each token alone. The `Input` of a functional model
      must have an unknown length, as in `keras.Input((None,))`.
    - A part that is longer than `remat_length` is computed again for its gradients as one piece,
      without a second exchange under PyTorch.
    - Dropout draws by the seeds of each device, which may be equal.

    The setting stays until the next call, and is neither saved nor copied. A model that streams or
    generates needs `split_sequence(model, None)` before.

    Args:
        model: Model or layer that holds `HLA` layers, which may be in blocks and models inside of
            it, or is one.
        context_parallel: Under JAX the name of an axis of the mesh; the model must be called
            inside of `jax.shard_map` then. Under PyTorch a `torch.distributed.ProcessGroup` or a
            one-dimensional `DeviceMesh`, whose processes may hold parts of different lengths.
            `None` is the whole sequence on each device, as before the first call.

    Raises:
        ValueError: if the model holds no `HLA` layer, or one that has no such form:
            with `causal=False`, `go_backwards=True` or as a cell in `keras.layers.RNN`; and if
            `context_parallel` means no devices, or is given under TensorFlow, which has no
            engine for it.

    Example:

    Under JAX, with parts of a sequence on all devices:

    ```python
    keras_hla.distribution.split_sequence(model, "sequence")
    mesh = jax.sharding.Mesh(jax.devices(), ("sequence",))
    part = jax.sharding.PartitionSpec(None, "sequence")
    call = jax.shard_map(model, mesh=mesh, in_specs=part, out_specs=part)
    logits = jax.jit(call)(tokens)
    ```

    Under PyTorch, in each of the processes that `torchrun` starts:

    ```python
    mesh = torch.distributed.init_device_mesh("cuda", (torch.distributed.get_world_size(),))
    keras_hla.distribution.split_sequence(model, mesh)
    logits = model(tokens.chunk(mesh.size(), dim=1)[mesh.get_rank()])
    ```
    """
    layers = _layers_of(model)
    for layer in layers:  # all, before any is changed
        check_split(layer, context_parallel)
    for layer in layers:
        layer.context_parallel = context_parallel


def _layers_of(model):
    is_layer = isinstance(model, keras.layers.Layer)
    parts = list(model._flatten_layers()) if is_layer else []
    layers = [x for x in parts if isinstance(x, HLA)]
    if not layers:
        raise ValueError(
            f"Argument `model` must be a layer or model that holds `HLA` layers. Received: {model}"
        )
    cells = [layer.cell for layer in layers]
    for part in parts:
        if isinstance(part, HLACell) and not any(part is cell for cell in cells):
            raise ValueError(
                "A sequence that is split over devices is read by `HLA` layers, not by their cells "
                f"alone: use `keras_hla.layers.HLA`. Received: model with the cell '{part.path}'"
            )
    return layers
