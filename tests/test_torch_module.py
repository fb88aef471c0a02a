"""Parameters that PyTorch replaces are read by a `TorchModule`, and refused by a layer."""

from backends import relative_error
import keras
import numpy as np
import pytest
import torch

from keras_hla import layers
from keras_hla.torch_module import TorchModule


def make(kind=layers.HLADecoderBlock, **options):
    layer = kind(2, 4, **options)
    layer.build((None, 6, 8))
    return layer


def per_sample(module, x):
    """The gradients of a loss of each sample, by name."""
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def loss(parameters, sample):
        return torch.func.functional_call(module, parameters, (sample[None],)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)


@pytest.mark.parametrize("kind", [layers.HLA, layers.HLADecoderBlock])
def test_gradients_of_each_sample(rng, kind):
    layer = make(kind, decay="input")
    x = torch.tensor(rng.standard_normal((3, 6, 8)), dtype=torch.float32)
    found = per_sample(TorchModule(layer), x)
    parameters = [v.value for v in layer.trainable_variables]
    for i, sample in enumerate(x):
        expected = torch.autograd.grad(layer(sample[None]).square().sum(), parameters)
        for per_layer, gradient in zip(found.values(), expected, strict=True):
            assert relative_error(per_layer[i], gradient) < 1e-5


@pytest.mark.parametrize("kind", [layers.HLA, layers.HLADecoderBlock])
def test_parameters_that_a_layer_does_not_read_are_refused(kind):
    layer = make(kind)
    x = torch.ones((1, 6, 8))
    with pytest.raises(RuntimeError, match="TorchModule"):
        per_sample(layer, x)
    layer(x)  # once they are its own again


def test_what_a_layer_draws_goes_on():
    layer = make(dropout=0.5, seed=1)
    module, x = TorchModule(layer), torch.ones((1, 6, 8))
    first, second = (module(x, training=True) for _ in range(2))
    assert not torch.equal(first, second)


def test_new_values_come_to_the_layer():
    layer = make()
    module = TorchModule(layer)
    module.weights[0] = torch.nn.Parameter(torch.full_like(module.weights[0], 2.0))
    assert not np.all(keras.ops.convert_to_numpy(layer.trainable_variables[0]) == 2)
    module.assign_to_layer()
    assert np.all(keras.ops.convert_to_numpy(layer.trainable_variables[0]) == 2)


def test_a_layer_has_to_be_built():
    with pytest.raises(ValueError, match="`layer` must be built"):
        TorchModule(layers.HLA(2, 4))
