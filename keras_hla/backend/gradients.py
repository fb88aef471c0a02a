"""Results and gradients of a function at once, outside of any training."""

import keras


def exact_dtype():
    """The dtype in which results hold more digits than those that are compared with them."""
    return "float64" if keras.config.backend() == "torch" else "float32"  # JAX has no more


def pull_back(function, inputs):
    """Returns the list of results, and the function from their gradients to those of inputs.

    Under JAX the function is compiled, with products of float32 that are not rounded.

    Args:
        function: takes tensors, returns a list of tensors.
        inputs: list of floating-point tensors.
    """
    if keras.config.backend() == "jax":
        import jax

        with jax.default_matmul_precision("highest"):
            return jax.vjp(jax.jit(function), *inputs)
    import torch

    inputs = [x.detach().requires_grad_() for x in inputs]
    results = function(*inputs)
    return results, lambda gradients: torch.autograd.grad(results, inputs, gradients)
