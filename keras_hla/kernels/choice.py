"""Chooses between the kernels and the portable implementation, and gives the reason."""

from typing import Any, NamedTuple, get_args

import keras

from keras_hla import operators
from keras_hla.backend.compiling import is_torch_compiling
from keras_hla.checks import check_choice
from keras_hla.kernels import device, proof
from keras_hla.kernels.passes import passes_of
from keras_hla.operators import Operator
from keras_hla.types import Form, Implementation, Tensor

IMPLEMENTATIONS = get_args(Implementation)
_MEASURED = operators.HLA2(), operators.AHLA(), operators.HLA3(), operators.Linear()
_ACCURATE_WITH_WIDE_DECAYS = operators.HLA2(), operators.Linear()
_LARGEST_DIM = 128


class Choice(NamedTuple):
    """An implementation, `"portable"` or `"triton"`, and the reason for it in words."""

    implementation: str
    reason: str


def choose(
    operator: str | Operator = "hla2",
    dtype: str = "bfloat16",
    key_dim: int = 64,
    value_dim: int = 64,
    implementation: Implementation = "auto",
    decays: bool = False,
    tensor: Tensor | None = None,
    form: Form = "chunked",
    causal: bool = True,
    normalize: bool = False,
    chunk_size: int | None = None,
    context_parallel: Any = None,
) -> Choice:
    """Returns the implementation of `keras_hla.ops.higher_order_attention`, and the reason.

    On a CUDA GPU on which the kernels were not measured, `"auto"` first compiles the kernels for
    small cases and compares them with the portable implementation. The result is remembered for
    the process. If they differ, there is one warning.

    Args:
        operator: Name of an operator, or an operator.
        dtype: Dtype of query, key and value. In the `HLA` layer, its compute dtype.
        key_dim: Size of each query and key head.
        value_dim: Size of each value head.
        implementation: `"auto"`, `"portable"` or `"triton"`.
        decays: Whether there are log-decays, or segments, which need them.
        tensor: A tensor `(batch, length, ...)`, for its device and its shape. `None` is
            Keras' default device and a known shape.
        form: As in `higher_order_attention`, as are the arguments after it.
        causal: As in `higher_order_attention`.
        normalize: As in `higher_order_attention`.
        chunk_size: As in `higher_order_attention`.
        context_parallel: As in `higher_order_attention`.

    Returns:
        The named tuple `(implementation, reason)`. A single token, which is a step, and
        an empty sequence are always portable. With `context_parallel` the lengths of
        shards do not matter, so that all devices choose the same implementation.

    Raises:
        ValueError: if `implementation="triton"` cannot run that, with the reason.

    Example:

    >>> choice = keras_hla.kernels.choose("hla2", dtype="bfloat16", key_dim=64, value_dim=64)
    >>> choice.implementation, choice.reason  # on a machine without a GPU
    ('portable', 'there is no CUDA GPU')
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    split = context_parallel is not None
    settled = _why_portable_always(implementation, None if split else tensor, form)
    if settled:
        return Choice("portable", settled)
    operator = operators.get(operator)
    obstacle = (
        _outside_of_kernels(operator, dtype, (key_dim, value_dim))
        or _outside_of_form(form, causal, normalize, chunk_size, context_parallel)
        or device.why_not(tensor)
    )
    if implementation == "triton":
        if obstacle:
            raise ValueError(
                f"With implementation='triton' the kernels must be able to run, but {obstacle}. "
                "Use 'auto' or 'portable'. Received: implementation='triton'"
            )
        return Choice("triton", "implementation='triton' was given")
    # All devices of a sequence need the same collectives, however long their shards are.
    obstacle = (
        obstacle
        or device.why_not_faster(None if split else tensor)
        or _not_known_to_be_faster(operator, dtype, (key_dim, value_dim), decays)
    )
    if obstacle:
        return Choice("portable", obstacle)
    return _by_trust(operator, dtype, (key_dim, value_dim), decays, tensor)


def choose_token(operator, dtype, dims, implementation, tensor):
    """As `choose`, for one token after states: the kernel of `keras_hla.kernels.token` or not."""
    if implementation == "portable":
        return Choice("portable", "implementation='portable' was given")
    obstacle = (
        _outside_of_kernels(operator, dtype, dims)
        or device.why_not(tensor)
        or ("its chain has too many passes" if _chain_of(operator) is None else None)
    )
    if obstacle:
        return Choice("portable", obstacle)
    if implementation == "triton":
        return Choice("triton", "implementation='triton' was given")
    return Choice("portable", "the kernel of a token is not known to be faster")


def _chain_of(operator):
    from keras_hla.kernels.token import chain_of  # which imports Triton

    return chain_of(operator)


def _by_trust(operator, dtype, dims, decays, tensor):
    """The kernels, where they were measured or agree with the portable implementation."""
    if device.is_measured(tensor):
        return Choice("triton", "the kernels are faster on this GPU")
    name, dtype = operators.name_of(operator), keras.backend.standardize_dtype(dtype)
    proven, reason = proof.prove(name, dtype, dims, decays, device.place_of(tensor))
    return Choice("triton" if proven else "portable", reason)


def _why_portable_always(implementation, tensor, form):
    """Why the implementation is portable whatever the kernels can do, or `None`."""
    if implementation == "portable":
        return "implementation='portable' was given"
    if tensor is not None and tensor.shape[1] == 1 and form == "chunked":
        return "a single token is a step, not a sequence"
    if tensor is not None and tensor.shape[1] == 0:
        return "there is no token in an empty sequence"
    return None


def _outside_of_kernels(operator, dtype, dims):
    if passes_of(operator) is None:
        return (
            "the kernels take operators that are passes over their states and sums of these, "
            f"not {operator}"
        )
    dtype = keras.backend.standardize_dtype(dtype)
    if dtype not in ("bfloat16", "float16", "float32"):
        return f"the kernels take bfloat16, float16 and float32, not {dtype}"
    if max(dims) > _LARGEST_DIM:
        return f"the kernels take `key_dim` and `value_dim` up to {_LARGEST_DIM}, not {dims}"
    return None


def _not_known_to_be_faster(operator, dtype, dims, decays):
    """Why the kernels may be slower or less accurate, or `None`."""
    dtype = keras.backend.standardize_dtype(dtype)
    if dtype != "bfloat16":
        return f"the kernels are known to be faster only in bfloat16, not in {dtype}"
    if operator not in _MEASURED:
        return f"the kernels were not measured with the operator {operator}"
    if min(dims) < 64:
        return f"the kernels are known to be faster only for dims of 64 to 128, not {dims}"
    if decays and max(dims) > 64 and operator not in _ACCURATE_WITH_WIDE_DECAYS:
        return (
            "with decays and dims above 64 the kernels are known to be accurate only for 'hla2' "
            "and 'linear'"
        )
    return None


def _outside_of_form(form, causal, normalize, chunk_size, context_parallel):
    if form != "chunked" or not causal:
        return (
            f"the kernels need form='chunked' and causal=True, not form='{form}', causal={causal}"
        )
    if normalize:
        return "the kernels would round the sum by which normalize=True divides"
    if chunk_size is not None:
        return f"the kernels choose the chunk size, and cannot take chunk_size={chunk_size}"
    if context_parallel is not None and is_torch_compiling():
        return "`torch.compile` does not support the kernels with `context_parallel`"
    return None
