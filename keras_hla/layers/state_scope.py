"""The states of all layers of a model, handed in and out from outside of it."""

import threading

from keras import ops

# Not a context variable, which `torch.compile` cannot trace; nor with a default of its class, of
# which that takes no notice when the attribute of the instance changes.
_current = threading.local()


def current_state_scope():
    """The scope in which a layer is called, or `None`."""
    return getattr(_current, "scope", None)


def check_not_split(layer):
    """Raises a `ValueError` if an `HLA` layer is split over devices."""
    if layer.context_parallel is not None:
        raise ValueError(
            "A stream is read by one device, which holds its states: layer "
            f"'{layer.name}' must have context_parallel=None, as "
            "`keras_hla.distribution.split_sequence(model, None)` makes it. "
            f"Received: context_parallel={layer.context_parallel!r}"
        )


class StateScope:
    """Inside, each call of an `HLA` layer starts from one state and leaves another here.

    This is what makes a model of any depth stream: its layers meet the scope one
    after the other, always in the same order.

    Args:
        states: List of the lists of states before the piece, one for each call
            of a layer. `None` is the state before the first token. Where the
            model masks tokens by itself, their outputs repeat the one before
            them, which may be of the piece before: that is one more state then.
        mask: Boolean tensor of shape `(batch, length)`, true for unmasked tokens,
            for all layers. `None` masks nothing.
    """

    def __init__(self, states=None, mask=None):
        self.layers = []  # those met, once per call
        self.carries = []  # whether an output is among the states of each
        self.states = []  # their lists of states after the piece
        self._given = states
        self._mask = mask

    def __enter__(self):
        self._around, _current.scope = current_state_scope(), self
        return self

    def __exit__(self, *_):
        _current.scope = self._around

    def enter(self, layer, sequences, initial_state, mask, segment_ids):
        """The state from which `layer` starts, its mask, and the output before, or `None`."""
        for name, value in (("initial_state", initial_state), ("segment_ids", segment_ids)):
            if value is not None:
                raise ValueError(
                    "A stream hands the states from piece to piece, and each sequence is another "
                    f"stream: make the model without `{name}` of layer '{layer.name}'"
                )
        check_not_split(layer)
        for name, needed in (("causal", True), ("go_backwards", False)):
            if getattr(layer, name) != needed:
                raise ValueError(
                    "A stream is read in order, and its future is unknown: layer "
                    f"'{layer.name}' must have {name}={needed}. Received: {name}={not needed}"
                )
        repeats = not (layer.return_sequences and layer.zero_output_for_mask)
        self.layers.append(layer)
        self.carries.append(mask is not None and repeats)
        if self._mask is not None:
            mask = self._mask if mask is None else ops.logical_and(mask, self._mask)
        if self._given is None:
            return layer.get_initial_state(ops.shape(sequences)[0]), mask, None
        states, output = self._given[len(self.layers) - 1], None
        if self.carries[-1]:
            *states, output = states
        return states, mask, output

    def leave(self, states, output):
        """Takes the states after the piece, and the output of its last unmasked token."""
        states = list(states)
        if self.carries[-1]:
            states.append(ops.cast(output, self.layers[-1].cell.state_dtype))
        self.states.append(states)
