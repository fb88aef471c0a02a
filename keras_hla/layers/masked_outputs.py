"""The outputs at masked tokens, and those that others repeat."""

from keras import ops

from keras_hla import stages
from keras_hla.backend.tensors import where
from keras_hla.masking import fill_forward


def outputs_around(shard, output, mask):
    """The outputs of the last unmasked tokens before a `SequenceShard`, and of all shards."""
    around = shard.last_tokens(stages.last_window(output, 2, mask=mask))
    return [x[:, 0] for x in around]


def at_masked(output, mask, before, last, filled, return_sequences):
    """The outputs with those of masked tokens; and the last of all, where it is asked for.

    Args:
        output: tensor of shape `(batch, length, features)`.
        mask: boolean tensor of shape `(batch, length)`.
        before: the output before the first, `(batch, features)`. `None` is zero.
        last: the last one, where it is known.
        filled: whether masked tokens have the output before them, and not zero.
        return_sequences: whether all are asked for, and not the last one.

    Returns:
        The outputs, and the last one, which may be `None` if it is not asked for.
    """
    zeros = None if filled else where(mask[..., None], output, 0)
    if not filled and return_sequences:
        return zeros, None
    batch, features = ops.shape(output)[0], output.shape[-1]
    if before is None:
        before = ops.zeros((batch, features), output.dtype)
    entries = ops.concatenate([ops.cast(before, output.dtype)[:, None], output], axis=1)
    some = ops.concatenate([ops.ones((batch, 1), "bool"), mask], axis=1)
    outputs, _ = fill_forward(entries, some)
    return outputs[:, 1:] if filled else zeros, outputs[:, -1] if last is None else last
