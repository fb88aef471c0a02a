"""The tokenizer that goes with the backbone."""

from typing import Any

import keras
from keras_hub.tokenizers import BytePairTokenizer

from keras_hla.hub.hla_backbone import HLABackbone


@keras.saving.register_keras_serializable(package="keras_hla")
class HLATokenizer(BytePairTokenizer):
    """Byte-pair encoding, with `"<|endoftext|>"` before and after each text.

    Any vocabulary of byte pairs that holds this token will do, such as that of
    GPT-2.

    Args:
        vocabulary: Dictionary of tokens and their ids, or path of a JSON file.
        merges: List of merge rules, `"a b"`, or path of a file with one a line.
        **kwargs: Arguments of `keras_hub.tokenizers.BytePairTokenizer`.

    Call arguments:
        inputs: String, or list of strings.

    Returns:
        The token ids: an integer tensor, or a list of lists.

    Raises:
        ValueError: if `"<|endoftext|>"` is not in the vocabulary.

    Example:

    >>> vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
    >>> tokenizer = keras_hla.hub.HLATokenizer(vocabulary, merges=["a b"])
    >>> tokenizer(["abba", "b"])
    [[3, 2, 1], [2]]
    >>> tokenizer.detokenize([3, 2, 1])
    'abba'
    """

    backbone_cls = HLABackbone

    def __init__(self, vocabulary: Any = None, merges: Any = None, **kwargs: Any) -> None:
        self._add_special_token("<|endoftext|>", "start_token")
        self._add_special_token("<|endoftext|>", "end_token")
        self.pad_token_id = 0  # Any id will do: padding is masked, and generation knows it apart.
        super().__init__(vocabulary=vocabulary, merges=merges, **kwargs)
