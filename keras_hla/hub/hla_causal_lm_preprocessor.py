"""From strings to what the language model takes, and back."""

import keras
from keras_hub.models import CausalLMPreprocessor

from keras_hla.hub.hla_backbone import HLABackbone
from keras_hla.hub.hla_tokenizer import HLATokenizer


@keras.saving.register_keras_serializable(package="keras_hla")
class HLACausalLMPreprocessor(CausalLMPreprocessor):
    """Packs strings into token ids, padding mask, labels and weights.

    Args:
        tokenizer: A `keras_hla.hub.HLATokenizer`, or another of keras-hub that
            has a start, an end and a padding token.
        sequence_length: Length to which texts are cut or padded.
        add_start_token: Whether texts begin with the start token.
        add_end_token: Whether texts for training end with the end token.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        x: String, or list of strings.
        y: `None`: the labels come from `x`.
        sample_weight: `None`: the weights, too.
        sequence_length: In place of that of the layer.

    Returns:
        The tuple `(x, y, sample_weight)`: a dictionary of `"token_ids"` and
        `"padding_mask"`, the token ids that follow each, and true where those
        are not padding; all of shape `(batch, sequence_length)`.

    Example:

    >>> vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
    >>> tokenizer = keras_hla.hub.HLATokenizer(vocabulary, merges=["a b"])
    >>> preprocessor = keras_hla.hub.HLACausalLMPreprocessor(tokenizer, sequence_length=6)
    >>> x, y, sample_weight = preprocessor(["abba", "b"])
    >>> keras.ops.convert_to_numpy(y).tolist()
    [[3, 2, 1, 0, 0, 0], [2, 0, 0, 0, 0, 0]]
    """

    backbone_cls = HLABackbone
    tokenizer_cls = HLATokenizer
