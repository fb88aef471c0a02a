"""Whether the parameters that PyTorch sees of a layer are those that it computes with."""

import keras

from keras_hla.backend.compiling import is_torch_compiling


def check_own_parameters(layer):
    """Refuses parameters that a layer does not read, and that would never be trained."""
    if keras.config.backend() != "torch" or is_torch_compiling():
        return
    from keras_hla.backend.torch_parameters import are_replaced

    if are_replaced(layer):
        raise RuntimeError(
            f"The parameters of layer '{layer.name}' were replaced, as `fully_shard` and "
            "`torch.func.functional_call` do. Keras' layers do not read those, and would train "
            "nothing. Wrap the model first: "
            "`keras_hla.torch_module.TorchModule(model)` reads them."
        )
