"""`keras.RematScope` with dropout, whose gradients are wrong where Keras draws it twice."""

import warnings

import keras


def warn_of_redrawn_dropout(layer, cell, training):
    """Warns where a `keras.RematScope` recomputes `layer` with another dropout.

    Args:
        layer: The layer that is called, with the dropout of its cell.
        cell: An `HLACell`.
        training: Whether the call drops outputs.
    """
    if not _is_redrawn(cell) or not training:
        return
    if _is_recomputed(layer) or _is_recomputed(cell.dropout_layer):
        warnings.warn(
            f"Layer '{layer.name}' is in a `keras.RematScope`, where Keras draws its dropout anew "
            "when it recomputes the layer for the gradients: they are wrong. Leave the layer out "
            "of the scope, and set `remat_length`, which saves memory and keeps the gradients "
            f"right. Received: dropout={cell.dropout}",
            stacklevel=3,
        )


def _is_redrawn(cell):
    """Whether a second computation draws another dropout than the first."""
    backend = keras.config.backend()
    # PyTorch restores the state of its own generator, which dropout without a seed uses. Under JAX
    # and in TensorFlow's graphs Keras raises an error before dropout is drawn.
    return bool(cell.dropout) and (
        backend == "tensorflow" or (backend == "torch" and cell.seed is not None)
    )


def _is_recomputed(layer):
    """Whether the scope in which the layer was made recomputes it, or a model around it."""
    scope = layer._remat_mode  # Keras has no public name for it
    if scope is None:
        return False
    named = scope.mode == "list_of_layers" and layer.name in scope.layer_names
    return scope.mode in ("full", "larger_than") or named
