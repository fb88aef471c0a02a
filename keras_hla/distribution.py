"""Context parallelism of models."""

from typing import Any

import keras

from keras_hla.layers import HLA, HLACell
from keras_hla.layers.hla_checks import check_split

__all__ = ["split_sequence"]


def split_sequence(model: keras.Model, context_parallel: Any) -> None:
    """Splits the sequences of a model over devices (context parallelism).

    After this call each device calls the model with its own contiguous shard of the tokens, and
    all devices do so at the same time. Each gets the outputs that its tokens have in the whole
    sequence: the `HLA` layers gather the states of all shards, the last tokens that a convolution
    reads, and the numbers of tokens. The size of these collectives does not depend on the length.
    If the loss is a sum over the outputs of all devices, the gradients are those of the whole
    sequence. Under PyTorch each process holds its share of the gradients of weights: sum them over
    the processes.

    - `mask` and `segment_ids` are those of the shard. Either all devices give them, or none. A
      segment may extend over several shards.
    - The initial state is the one before the whole sequence, and must be the same on all devices.
      The returned state, after the whole sequence, and the output with `return_sequences=False`
      are the same on all devices.
    - All other layers of the model must act on each token independently. The `Input` of a
      functional model must have an unknown length, as in `keras.Input((None,))`.
    - A shard that is longer than `remat_length` is recomputed as a whole in the backward pass,
      under PyTorch without repeating the collectives.
    - Dropout draws by the seeds of each device, which may be equal.

    The setting applies until the next call. It is neither saved nor copied. Call
    `split_sequence(model, None)` before the model streams or generates.

    Args:
        model: An `HLA` layer, or a layer or model that contains `HLA` layers, also in nested
            blocks and models.
        context_parallel: Under JAX the name of a mesh axis; the model must then be called inside
            of `jax.shard_map`. Under PyTorch a `torch.distributed.ProcessGroup` or a
            one-dimensional `DeviceMesh`, whose processes may hold shards of different lengths.
            `None` undoes the split: each device has whole sequences.

    Raises:
        ValueError: if the model contains no `HLA` layer, or one that cannot be split: with
            `causal=False`, with `go_backwards=True`, or as a cell in `keras.layers.RNN`; if
            `context_parallel` is not among its allowed values; and under TensorFlow, which is not
            supported.

    Example:

    Under JAX, with a shard of each sequence on each device:

    ```python
    keras_hla.distribution.split_sequence(model, "sequence")
    mesh = jax.sharding.Mesh(jax.devices(), ("sequence",))
    shard = jax.sharding.PartitionSpec(None, "sequence")
    call = jax.shard_map(model, mesh=mesh, in_specs=shard, out_specs=shard)
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
