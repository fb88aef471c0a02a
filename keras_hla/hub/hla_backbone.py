"""The stack of blocks, without a head."""

from collections.abc import Sequence
from typing import Any

import keras
from keras_hub.models import Backbone

from keras_hla.checks import check_positive_int
from keras_hla.hub.layout import check_layouts, layout_map
from keras_hla.layers import HLA, HLACell, HLADecoderBlock
from keras_hla.layers.arguments import plain, split_arguments
from keras_hla.layers.quantized import layer_options, policy_with_quantized
from keras_hla.layers.rms_normalization import RMSNormalization
from keras_hla.operators import Operator
from keras_hla.types import DType, Seed, State, Tensor

# The operators of a model that is asked for none: see `docs/evidence.md`.
_ALTERNATING = ["linear", "hla2"]
# Arguments of the blocks that generation leaves no choice of.
_FIXED: dict[str, Any] = {"return_state": True, "stateful": False, "causal": True}


@keras.saving.register_keras_serializable(package="keras_hla")
class HLABackbone(Backbone):
    """Token embedding, a stack of `HLADecoderBlock`, and a final norm.

    Args:
        vocabulary_size: Number of token ids.
        num_layers: Number of blocks.
        num_heads: Number of query heads of each block.
        hidden_dim: Number of features of the embedding and of the blocks.
        intermediate_dim: Size of the MLPs, as in `HLADecoderBlock`.
        key_dim: Size of each query and key head. `None` is
            `hidden_dim / num_heads`.
        operator: Operator of the blocks, as in `HLACell`, or a list of operators,
            which the blocks alternate. `None` means `["linear", "hla2"]`, which
            recall and generate better together than alone, or `"hla2"` for a
            single block.
        dropout: Fraction in [0, 1) of the outputs of the mixers and of the MLPs
            that training drops.
        norm_epsilon: Positive number, added to the mean squares of the norms.
        tie_word_embeddings: Whether the logits of a language model are computed
            with the weights of the embedding, or with separate weights.
        seed: Integer, seed of the dropout.
        name: Name of the model.
        trainable: Whether the weights are trained.
        dtype: Dtype policy of all layers. States are float32 under every policy
            up to float32.
        **kwargs: Other arguments of `HLADecoderBlock` (`decay`,
            `num_key_value_heads`, `output_gate`, ...) but `return_state`,
            `stateful` and `causal`.

    Call arguments:
        inputs: Dictionary of `"token_ids"`, integers of shape `(batch, length)`,
            and `"padding_mask"`, booleans or integers of the same shape, true
            for unmasked tokens. Masked ones leave the states as they are.

    Returns:
        A tensor of shape `(batch, length, hidden_dim)`.

    Raises:
        ValueError: if an argument is not among its allowed values.

    Example:

    >>> backbone = keras_hla.hub.HLABackbone(
    ...     vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32
    ... )
    >>> token_ids = keras.random.randint((2, 12), 0, 100)
    >>> padding_mask = keras.ops.ones((2, 12), "int32")
    >>> outputs = backbone({"token_ids": token_ids, "padding_mask": padding_mask})
    >>> tuple(outputs.shape)
    (2, 12, 32)
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        intermediate_dim: int | None = None,
        key_dim: int | None = None,
        operator: str | Operator | Sequence[str | Operator] | None = None,
        dropout: float = 0.0,
        norm_epsilon: float = 1e-6,
        tie_word_embeddings: bool = True,
        seed: Seed | None = None,
        name: str | None = None,
        trainable: bool = True,
        dtype: DType | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs, others = split_arguments(kwargs, HLADecoderBlock, HLA, HLACell)
        if others:
            raise ValueError(
                f"Unrecognized keyword arguments passed to {type(self).__name__}: {others}"
            )
        check_positive_int("vocabulary_size", vocabulary_size)
        check_positive_int("num_layers", num_layers)
        check_positive_int("num_heads", num_heads)
        check_positive_int("hidden_dim", hidden_dim)
        for argument in _FIXED:
            if argument in kwargs:
                raise ValueError(
                    f"A backbone takes no argument `{argument}`: its blocks are causal and return "
                    f"their states, for generation. Received: {argument}={kwargs[argument]!r}"
                )
        if key_dim is None and hidden_dim % num_heads:
            raise ValueError(
                "Argument `hidden_dim` must be a multiple of `num_heads`, or `key_dim` be given. "
                f"Received: hidden_dim={hidden_dim}, num_heads={num_heads}, key_dim=None"
            )
        if operator is None:
            operator = _ALTERNATING[-num_layers:]
        alternating: list = list(operator) if isinstance(operator, (list, tuple)) else [operator]
        if not 0 < len(alternating) <= num_layers:
            raise ValueError(
                "Argument `operator` must be an operator, or a list of at least one and at most "
                f"`num_layers` of them. Received: operator={operator!r}, num_layers={num_layers}"
            )
        self.token_embedding = keras.layers.ReversibleEmbedding(
            int(vocabulary_size),  # which may be NumPy's
            int(hidden_dim),
            tie_weights=tie_word_embeddings,
            name="token_embedding",
            **layer_options(keras.dtype_policies.get(dtype), "token_embedding"),
        )
        self.decoder_blocks = [
            HLADecoderBlock(
                num_heads,
                hidden_dim // num_heads if key_dim is None else key_dim,
                intermediate_dim,
                operator=alternating[i % len(alternating)],
                dropout=dropout,
                norm_epsilon=norm_epsilon,
                seed=None if seed is None else seed + i,  # or all blocks would drop alike
                dtype=dtype,
                name=f"decoder_block_{i}",
                **_FIXED,
                **kwargs,
            )
            for i in range(num_layers)
        ]
        check_layouts(vocabulary_size, hidden_dim, self.decoder_blocks[0])
        self.norm = RMSNormalization(epsilon=norm_epsilon, dtype=dtype, name="norm")
        # Both treat each token alone. If they do not say so, Keras warns that a mask ends there.
        self.token_embedding.supports_masking = self.norm.supports_masking = True

        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
        x = self.token_embedding(token_ids)
        for block in self.decoder_blocks:
            x, *_ = block(x, mask=padding_mask)
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=self.norm(x),
            name=name,
            trainable=trainable,
            dtype=dtype,
        )
        self.vocabulary_size = vocabulary_size
        self.num_layers = num_layers
        self.hidden_dim = hidden_dim
        self.tie_word_embeddings = tie_word_embeddings
        self._period = len(alternating)

    @staticmethod
    def get_layout_map(
        device_mesh: Any,
        model_parallel_dim_name: str = "model",
        data_parallel_dim_name: str = "batch",
    ) -> Any:
        """Returns where the weights are on a mesh of devices, for JAX.

        Heads, the features within MLPs and the token ids are split over one axis of the mesh, the
        features of blocks over the other. A backbone that is made in the scope of the distribution
        must have sizes that are multiples of the devices along these axes: of `num_heads`,
        `num_key_value_heads`, `intermediate_dim` and `vocabulary_size` the first, of `hidden_dim`
        the second. Weights that the map does not name are on all devices.

        Args:
            device_mesh: A `keras.distribution.DeviceMesh`.
            model_parallel_dim_name: Name of the first axis.
            data_parallel_dim_name: Name of the second axis.

        Returns:
            A `keras.distribution.LayoutMap`, for `keras.distribution.ModelParallel`.

        Raises:
            ValueError: if `device_mesh` is not a mesh, or has no such axis.

        Example:

        >>> devices = keras.distribution.list_devices()
        >>> mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
        >>> layout_map = keras_hla.hub.HLABackbone.get_layout_map(mesh)
        >>> layout_map["decoder_block_0/mixer/cell/query/kernel"].axes
        ('batch', 'model')
        """
        return layout_map(device_mesh, model_parallel_dim_name, data_parallel_dim_name)

    def get_initial_state(self, batch_size: int) -> list[Tensor]:
        """Returns the states before the first token.

        Args:
            batch_size: Number of rows of the batch.

        Returns:
            For each block the list of its states, zeros.
        """
        return [block.get_initial_state(batch_size) for block in self.decoder_blocks]

    def call_with_states(
        self, token_ids: Tensor, states: State, padding_mask: Tensor | None = None
    ) -> Any:
        """Reads the next tokens of sequences whose beginning the states hold.

        Args:
            token_ids: Integer tensor of shape `(batch, length)`.
            states: States before these tokens, as this method returns them, or
                as `get_initial_state` does.
            padding_mask: Tensor of shape `(batch, length)`, as in a call of the
                backbone, or `None` if no token is masked.

        Returns:
            The tuple `(outputs, states)`: a tensor of shape `(batch, length,
            hidden_dim)`, and the states after these tokens.
        """
        x, new_states = self.token_embedding(token_ids), []
        for block, state in zip(self.decoder_blocks, states, strict=True):
            x, *new_state = block(x, initial_state=state, mask=padding_mask)
            new_states.append(new_state)
        return self.norm(x), new_states

    def get_config(self) -> dict[str, Any]:
        # The blocks differ in their names, in their seeds, which count up from the first, and in
        # their operators.
        block, *others = (x.get_config() for x in self.decoder_blocks[: self._period])
        if others:
            block["operator"] = [x["operator"] for x in (block, *others)]
        for argument in _FIXED:
            del block[argument]
        config = {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(policy_with_quantized(self)),
            "vocabulary_size": self.vocabulary_size,
            "num_layers": self.num_layers,
            "hidden_dim": self.hidden_dim,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        return {**block, **plain(config)}
