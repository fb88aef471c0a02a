"""Generation: a language model continues a prompt."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_hla.checks import check_positive_int
from keras_hla.streaming.drawing import Drawing, check_prompt
from keras_hla.streaming.writer import write, writer_of
from keras_hla.types import Tensor


def generate(
    model: keras.Model,
    prompt: Any,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: int | Sequence[int] = (),
    seed: int | None = None,
    tokens_per_call: int = 32,
    inputs: dict[str, Tensor] | None = None,
) -> Any:
    """Continues sequences of tokens with a language model.

    The prompt is read in parallel (prefill). Then a compiled loop draws one token
    after the other. Its memory depends neither on the length of the prompt nor on
    the number of new tokens.

    Args:
        model: Model that `keras_hla.streaming_model` takes, from integer tokens
            `(batch, length)` to logits `(batch, length, vocabulary)`. It may have
            further inputs that are not sequences, such as a condition.
        prompt: The tokens to continue: a sequence of integers, or a list of such
            sequences, which may have different lengths. No prompt may be empty.
        max_new_tokens: Largest number of tokens to draw for each prompt.
        temperature: Number `>= 0` by which logits are divided. 0 always takes the
            most likely token.
        top_k: Draw from this many of the most likely tokens. `None` means all.
        top_p: Draw from the most likely tokens that together have this
            probability, in (0, 1]. `None` means all.
        stop_tokens: Integer or sequence of integers. A continuation ends with the
            first of these.
        seed: Integer. The same seed draws the same tokens on the same backend,
            whatever else is in the batch. `None` draws different tokens each time.
        tokens_per_call: Number of tokens drawn per call of the compiled loop.
        inputs: Dictionary of the other inputs of the model, by name: arrays
            without the batch axis for a single prompt, or with one entry per
            prompt.

    Returns:
        The new tokens, an int32 array, or a list of them for a list of prompts.

    Raises:
        ValueError: if an argument is not among its allowed values, or the model
            returns logits that are NaN, or all minus infinity.

    Example:

    >>> tokens = keras.Input((None,), dtype="int32", name="tokens")
    >>> x = keras.layers.Embedding(256, 32)(tokens)
    >>> x = keras_hla.layers.HLADecoderBlock(num_heads=2, key_dim=16)(x)
    >>> model = keras.Model(tokens, keras.layers.Dense(256)(x))
    >>> keras_hla.generate(model, [72, 105], max_new_tokens=5, seed=0).shape
    (5,)
    """
    pieces = list(
        generate_stream(
            model,
            prompt,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stop_tokens,
            seed=seed,
            tokens_per_call=tokens_per_call,
            inputs=inputs,
        )
    )
    if _is_single(prompt):
        return np.concatenate(pieces)
    return [np.concatenate(row) for row in zip(*pieces, strict=True)]


def generate_stream(
    model: keras.Model,
    prompt: Any,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: int | Sequence[int] = (),
    seed: int | None = None,
    tokens_per_call: int = 8,
    decode: Callable[[Any], Any] | None = None,
    inputs: dict[str, Tensor] | None = None,
) -> Iterator[Any]:
    """Yields the tokens of `generate` as they are drawn.

    Args:
        model: As in `generate`, as are the other arguments up to `seed`.
        tokens_per_call: Largest number of tokens per yield.
        decode: Function from an int32 array of new tokens to text.
        inputs: As in `generate`.

    Yields:
        The new tokens since the last yield, an int32 array, or the text that
        `decode` returns for them. For a list of prompts, a list of these, empty
        for continuations that have ended.

    Example:

    ```python
    for text in keras_hla.generate_stream(model, prompt, 500, decode=tokenizer.decode):
        print(text, end="", flush=True)
    ```
    """
    writer = writer_of(model)
    single = _is_single(prompt)
    prompts = _check_prompts([prompt] if single else prompt, writer.vocabulary_size)
    inputs = writer.check_inputs(inputs, None if single else len(prompts))
    check_positive_int("tokens_per_call", tokens_per_call)
    drawing = Drawing(
        writer.vocabulary_size, max_new_tokens, temperature, top_k, top_p, stop_tokens, seed
    )
    pieces = write(model, prompts, inputs, drawing, tokens_per_call)
    return _deliver(pieces, single, decode or (lambda tokens: tokens))


def _deliver(pieces, single, decode):
    for piece in pieces:
        yield decode(piece[0]) if single else [decode(tokens) for tokens in piece]


def _is_single(prompt):
    return len(prompt) > 0 and np.ndim(prompt[0]) == 0


def _check_prompts(prompts, vocabulary_size):
    """The list of the prompts as arrays."""
    prompts = list(prompts)
    if not prompts:
        raise ValueError("Argument `prompt` must hold at least one token. Received: none")
    return [check_prompt(x, vocabulary_size) for x in prompts]
