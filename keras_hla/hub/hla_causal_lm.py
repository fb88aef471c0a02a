"""The language model."""

from typing import Any

import keras
from keras import ops
from keras_hub.models import CausalLM

from keras_hla.checks import check_choice
from keras_hla.hub.hla_backbone import HLABackbone
from keras_hla.hub.hla_causal_lm_preprocessor import HLACausalLMPreprocessor
from keras_hla.layers.state_scope import check_not_split
from keras_hla.streaming.snapshot import Snapshot
from keras_hla.types import Tensor


@keras.saving.register_keras_serializable(package="keras_hla")
class HLACausalLM(CausalLM):
    """Language model that writes from a state of constant size.

    Each generated token costs the same, however long the text is. What
    `generate` writes is what the model would write if it read the whole text
    anew for each token.

    Args:
        backbone: A `keras_hla.hub.HLABackbone`.
        preprocessor: A `keras_hla.hub.HLACausalLMPreprocessor`, or `None`: then
            the model takes token ids, not strings.
        **kwargs: Arguments of `keras_hub.models.CausalLM`: `name`, and
            `compile`.

    Call arguments:
        inputs: Dictionary of `"token_ids"` and `"padding_mask"`, as in
            `HLABackbone`.

    Returns:
        The logits of the next token after each, `(batch, length,
        vocabulary_size)`.

    Example:

    >>> backbone = keras_hla.hub.HLABackbone(
    ...     vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32
    ... )
    >>> causal_lm = keras_hla.hub.HLACausalLM(backbone)
    >>> causal_lm.compile(sampler="greedy")
    >>> prompts = {
    ...     "token_ids": keras.ops.array([[5, 6, 7, 0, 0, 0], [8, 0, 0, 0, 0, 0]]),
    ...     "padding_mask": keras.ops.array([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]),
    ... }
    >>> outputs = causal_lm.generate(prompts, stop_token_ids=None)
    >>> outputs["token_ids"].shape
    (2, 6)
    """

    backbone_cls = HLABackbone
    preprocessor_cls = HLACausalLMPreprocessor
    _snapshot = None  # of what `generate` has compiled

    def __init__(self, backbone: Any, preprocessor: Any = None, **kwargs: Any) -> None:
        self.backbone = backbone
        self.preprocessor = preprocessor
        inputs = backbone.input
        outputs = backbone.token_embedding(backbone(inputs), reverse=True)
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    def make_generate_function(self) -> Any:
        """As that of keras-hub, but anew where layers have other variables, as after LoRA."""
        if self._snapshot is None or not self._snapshot.matches(self):
            self._snapshot = Snapshot(self, self._forget)
            self._forget()
        return super().make_generate_function()

    def _forget(self):
        self.generate_function = None

    def generate_step(self, inputs: Tensor, stop_token_ids: Any = None) -> Any:
        """Continues a batch of prompts; `generate` compiles it.

        Args:
            inputs: Dictionary of `"token_ids"`, the prompts, padded on the right
                to the length to generate, and `"padding_mask"`, true in the
                prompts. The first token of a row is a prompt in any case.
            stop_token_ids: Token ids at which a row ends, or `None`.

        Returns:
            Dictionary of `"token_ids"` and `"padding_mask"`, false after the end
            of a row.
        """
        for block in self.backbone.decoder_blocks:
            check_not_split(block.mixer)
        token_ids = ops.cast(inputs["token_ids"], "int32")
        batch_size, length = ops.shape(token_ids)
        positions = ops.arange(length)
        given = ops.logical_or(ops.cast(inputs["padding_mask"], "bool"), positions == 0)
        start = ops.min(ops.sum(ops.cast(given, "int32"), axis=1))

        # The sampler feeds the token before the one it samples, that is, `start - 1` first. A state
        # must take in each token once: all up to that one are read here, and it is not.
        states = self.backbone.get_initial_state(batch_size)
        before = ops.logical_and(given, positions < start - 1)
        _, states = self.backbone.call_with_states(token_ids, states, before)

        def next_logits(prompt, states, index):
            token = ops.slice(prompt, [0, index - 1], [ops.shape(prompt)[0], 1])
            hidden, states = self.backbone.call_with_states(token, states)
            logits = self.backbone.token_embedding(hidden, reverse=True)
            return ops.squeeze(logits, axis=1), ops.squeeze(hidden, axis=1), states

        sampled = self.sampler(
            next=next_logits,
            prompt=ops.where(given, token_ids, -1),  # Padding may be equal to a stop token.
            cache=states,
            index=start,
            mask=given,
            stop_token_ids=stop_token_ids,
            model=self,
        )
        padding_mask = ops.ones_like(given)
        if stop_token_ids is not None:
            stops = ops.any(sampled[..., None] == ops.array(stop_token_ids, "int32"), axis=-1)
            stops = ops.cast(ops.logical_and(stops, ops.logical_not(given)), "int32")
            padding_mask = ops.cumsum(stops, axis=1) == stops  # up to the first stop, with it
        return {
            "token_ids": ops.where(sampled < 0, token_ids, sampled),
            "padding_mask": padding_mask,
        }

    def score(
        self,
        token_ids: Tensor,
        padding_mask: Tensor | None = None,
        scoring_mode: str = "logits",
        target_ids: Tensor | None = None,
    ) -> Any:
        """Scores each token of a batch of texts.

        Args:
            token_ids: Integer tensor of shape `(batch, length)`.
            padding_mask: Tensor of the same shape, true for unmasked tokens, or
                `None` if all count.
            scoring_mode: `"logits"` or `"loss"`.
            target_ids: Integer tensor of the same shape: for `"loss"` the tokens
                to predict, each from the tokens up to its place in `token_ids`.

        Returns:
            The logits, `(batch, length, vocabulary_size)`, or the losses,
            `(batch, length)`.

        Raises:
            ValueError: if `scoring_mode` is another, or is `"loss"` without
                `target_ids`.
        """
        check_choice("scoring_mode", scoring_mode, ("logits", "loss"))
        if scoring_mode == "loss" and target_ids is None:
            raise ValueError(
                "Argument `target_ids` must be the tokens to predict with `scoring_mode='loss'`. "
                "Received: target_ids=None"
            )
        if padding_mask is None:
            padding_mask = ops.ones_like(token_ids)
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        logits = self({name: ops.convert_to_tensor(x) for name, x in inputs.items()})
        if scoring_mode == "logits":
            return logits
        return keras.losses.sparse_categorical_crossentropy(target_ids, logits, from_logits=True)
