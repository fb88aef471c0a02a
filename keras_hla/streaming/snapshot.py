"""What a compiled model depends on, but for the values of its variables."""

import weakref


class Snapshot:
    """The layers of a model, their variables, dtype policies and devices, as they are now.

    Weights that a layer has replaced are not kept in memory.

    Args:
        model: the model.
        forget: function of no arguments, called when one of them is no more: it drops what was
            compiled, since TensorFlow keeps in memory the weights for which it has compiled.
    """

    def __init__(self, model, forget):
        self._references = [weakref.ref(x, lambda _: forget()) for x in _parts(model)]
        self._settings = _settings(model)

    def matches(self, model):
        """Whether the model still has the same parts: values of variables may be others."""
        parts = _parts(model)
        return (
            len(parts) == len(self._references)
            and all(x is reference() for x, reference in zip(parts, self._references, strict=True))
            and _settings(model) == self._settings
        )


def _parts(model):
    return [*model._flatten_layers(), *model.variables]


def _settings(model):
    return [
        (layer.dtype_policy.name, getattr(layer, "context_parallel", None))
        for layer in model._flatten_layers()
    ]
