"""What an `HLA` layer refuses: settings, devices, and arguments of calls."""

from keras_hla.backend.devices import check_context_parallel
from keras_hla.checks import (
    as_tensor,
    check_mask,
    check_noncausal,
    check_rank,
    check_segment_ids,
    check_segments_allowed,
    check_states,
)
from keras_hla.layers.state_scope import current_state_scope


def check_settings(layer):
    """Refuses what goes without an order of the tokens."""
    if layer.causal:
        return
    cell = layer.cell
    for name, value in (
        ("decay", cell.decay),
        ("conv_kernel_size", cell.conv_kernel_size),
        ("chunk_size", layer.chunk_size),
    ):
        if value is not None:
            raise ValueError(
                f"With `causal=False` tokens have no order: `{name}` must be None. "
                f"Received: {name}={value!r}"
            )
    for name in ("return_state", "go_backwards", "stateful"):
        if getattr(layer, name):
            raise ValueError(
                "With `causal=False` there is no state and no direction: "
                f"`{name}` must be False. Received: {name}={getattr(layer, name)!r}"
            )
    check_noncausal(cell.operator, cell.decay, cell.masked)


def check_split(layer, context_parallel):
    """Refuses devices whose shards of a sequence the layer cannot take."""
    check_context_parallel(context_parallel)
    for name, needed in (("causal", True), ("go_backwards", False)):
        if context_parallel is not None and getattr(layer, name) != needed:
            raise ValueError(
                "A sequence that is split over devices is read in order: layer "
                f"'{layer.name}' must have {name}={needed}. Received: {name}={not needed}"
            )


def check_call(layer, sequences, initial_state, mask, segment_ids):
    """Returns the mask and the segments, of which lists have become tensors."""
    check_rank(3, "(batch, length, features)", sequences=sequences)
    batch, length, _ = sequences.shape
    mask = as_tensor("mask", mask, optional=True)
    segment_ids = as_tensor("segment_ids", segment_ids, optional=True)
    if mask is not None:
        check_mask(mask, batch, length)
    if segment_ids is not None:
        check_segment_ids(segment_ids, batch, length)
        check_segments_allowed(layer.cell.operator, layer.causal)
    if not layer.causal and initial_state is not None:
        raise ValueError(
            "With `causal=False` there is no state: `initial_state` must be None. "
            f"Received: initial_state={initial_state}"
        )
    if initial_state is not None:
        cell = layer.cell
        check_states("initial_state", initial_state, batch, cell.state_size, cell.state_names)
    fixed = layer.stateful and current_state_scope() is None
    if fixed and batch not in (None, layer.states[0].shape[0]):
        raise ValueError(
            f"The batch size of a stateful layer is fixed to {layer.states[0].shape[0]}. "
            f"Received: sequences.shape={tuple(sequences.shape)}"
        )
    return mask, segment_ids
