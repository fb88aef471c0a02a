"""Keras layers as modules whose parameters PyTorch can replace."""

from typing import Any

import keras
import torch

__all__ = ["TorchModule"]


class TorchModule(torch.nn.Module):
    """A built Keras layer or model as a module that computes with its own parameters.

    Keras' layers compute with their variables, whatever takes the place of the parameters that
    PyTorch sees. `fully_shard` and `torch.func.functional_call` replace these: on a Keras layer
    the first trains nothing, and gradients of the second are zero. On this module they work. It
    starts with the parameters of the layer, and shares them until they are replaced.

    Args:
        layer: A built `keras.layers.Layer` or `keras.Model`.

    Call arguments: those of the layer. What it draws and counts (dropout, states) it goes on with.

    Returns:
        The outputs of the layer.

    Raises:
        ValueError: if the layer is not built.

    Example:

    ```python
    from torch.distributed.fsdp import fully_shard

    module = keras_hla.torch_module.TorchModule(model)
    fully_shard(module)
    optimizer = torch.optim.AdamW(module.parameters())
    ...                     # train `module`
    module.assign_to_layer()  # on all processes
    model.save("model.keras")
    ```
    """

    def __init__(self, layer: keras.layers.Layer) -> None:
        super().__init__()
        if not layer.built:
            raise ValueError(
                f"Argument `layer` must be built. Call it, or its `build`. Received: layer={layer}"
            )
        self._layer = (layer,)  # hidden, as PyTorch would find the parameters twice
        self.weights = torch.nn.ParameterList(x.value for x in layer.trainable_variables)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (layer,) = self._layer
        mapping = [*zip(layer.trainable_variables, self.weights, strict=True)]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            outputs = layer(*args, **kwargs)
        for variable in layer.non_trainable_variables:
            value = scope.get_current_value(variable)
            if value is not None:
                variable.assign(value)
        return outputs

    def assign_to_layer(self) -> None:
        """Gives the variables of the layer the values of the parameters.

        All processes that share the parameters have to take part.
        """
        (layer,) = self._layer
        for variable, x in zip(layer.trainable_variables, self.weights, strict=True):
            value = x.full_tensor() if hasattr(x, "full_tensor") else x
            variable.assign(value.detach())
