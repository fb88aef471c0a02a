"""Language models for keras-hub: from text to text, with its samplers, presets and LoRA."""

try:
    import keras_hub  # noqa: F401
except ImportError as error:
    if error.name != "keras_hub":  # It is there, and something that it needs is not.
        raise
    raise ImportError(
        '`keras_hla.hub` needs keras-hub. Install it with `pip install "keras-hla[hub]"`.'
    ) from error

from keras_hla.hub.hla_backbone import HLABackbone
from keras_hla.hub.hla_causal_lm import HLACausalLM
from keras_hla.hub.hla_causal_lm_preprocessor import HLACausalLMPreprocessor
from keras_hla.hub.hla_tokenizer import HLATokenizer

__all__ = ["HLABackbone", "HLACausalLM", "HLACausalLMPreprocessor", "HLATokenizer"]
