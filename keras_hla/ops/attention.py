"""The operators over sequences, and over one token."""

from typing import Any

from keras import ops

from keras_hla import kernels, operators
from keras_hla.backend.devices import devices_of
from keras_hla.checks import (
    check_choice,
    check_noncausal,
    check_number,
    check_positive_int,
    check_rank,
    check_segments_allowed,
)
from keras_hla.evaluate import evaluate
from keras_hla.inputs import prepare, prepare_state
from keras_hla.operators import Operator
from keras_hla.ops.functional import functional
from keras_hla.types import Form, Implementation, State, Tensor

FORMS = ("chunked", "recurrent", "matrix")


@functional
def higher_order_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operator: str | Operator = "hla2",
    form: Form = "chunked",
    log_decay: Tensor | None = None,
    masked: bool = True,
    normalize: bool = False,
    epsilon: float = 1e-6,
    ridge: float = 0.0,
    causal: bool = True,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: Implementation = "auto",
    context_parallel: Any = None,
) -> Any:
    """Mixes a sequence by higher-order linear attention.

    Output `t` is a weighted sum of the values up to token `t`. For the default
    operator `"hla2"`, with `a(j→t)` the product of the decays of the tokens after
    `j` up to `t`:

        o_t = Σ_{i≤j≤t} a(i→t) a(j→t) (q_t·k_i) (k_i·q_j) v_j

    The classes in `keras_hla.operators` define the other operators. Time and
    memory are linear in the length, except for `form="matrix"`. The queries are
    not scaled, and without `normalize` the outputs grow with the length.

    Args:
        query: Tensor of shape `(batch, length, heads, dim)`.
        key: Tensor of shape `(batch, length, key_value_heads, dim)`, where
            `key_value_heads` divides `heads`: consecutive query heads share a
            key and value head.
        value: Tensor of shape `(batch, length, key_value_heads, value_dim)`.
            All three have the same floating dtype.
        operator: Name of an operator, or an operator; see
            `keras_hla.operators.get`.
        form: `"chunked"`, the parallel form; `"recurrent"`, one token after the
            other; or `"matrix"`, the definition with its length x length
            weights, which neither takes nor returns a state.
        log_decay: Logarithm of the decay, `log a_t <= 0`: a number or a tensor
            broadcastable to `(batch, length, heads)`. `-inf` resets the state
            before the token. The sign is checked for numbers and NumPy arrays. With
            one value per query head, each query head has its own moment of the
            keys that it shares. `None` means no decay.
        masked: `False` selects the paper's prefix-unmasked variant, of second and
            third order: the sum over all `i, j <= t`, `q_tᵀ S_t C_t` for
            `"hla2"`. It is causal, too.
        normalize: Whether to divide each output by the sum of its weights, plus
            `epsilon`. The states have one more column then.
        epsilon: Positive number. The denominator can be near zero or negative:
            nothing in the definition prevents it.
        ridge: `λ >= 0`. Adds `λ I` to the key moment of second order operators,
            as in the paper's Algorithm 1.
        causal: `False` lets each token read the whole sequence, in linear time:
            `(A Aᵀ) V`, `A = Q Kᵀ`, for `"hla2"`, `A A V` for `"ahla"`, `A Aᵀ A V`
            for `"hla3"`. It needs no decay, no state, and `form="chunked"` or
            `"matrix"`.
        mask: Boolean (or integer) tensor of shape `(batch, length)`, true for
            unmasked tokens. A masked token leaves the state unchanged, whatever it
            holds, and has an output of zero.
        segment_ids: Integer tensor of shape `(batch, length)`, for packed
            sequences: a new segment, with a state of zeros, starts where it
            changes from one unmasked token to the next. The first segment
            continues from the initial state.
        initial_state: List of states as returned with `return_state=True`.
        return_state: Whether to return the state after the last token.
        chunk_size: Largest number of tokens of a chunk, for the causal
            `form="chunked"`. It affects time and memory, not the result. `None`
            chooses it automatically.
        implementation: Implementation of the causal `form="chunked"`: `"portable"`
            runs everywhere; `"triton"` runs fused kernels on GPUs, under PyTorch
            and JAX; `"auto"` chooses the kernels where they are known to be faster
            and were checked on the GPU at hand. `keras_hla.kernels.choose` returns
            the choice and the reason.
        context_parallel: Devices over which the sequence is split along its length.
            Each of them calls this function with its own contiguous shard of the
            tokens, and gets the outputs that these tokens have in the whole
            sequence. Under JAX this is the name of a mesh axis, inside of
            `jax.shard_map`; under PyTorch a `torch.distributed.ProcessGroup` or a
            one-dimensional `DeviceMesh`, whose processes may hold shards of
            different lengths. `log_decay`, `mask` and `segment_ids` belong to the
            shard. `initial_state` is the state before the whole sequence, and the
            returned state the one after it: each is the same on all devices. Each
            pass of the operator gathers one state per device, whatever the length,
            and in the backward pass its gradient; with `segment_ids` also the last
            id of each shard. Gradients are those of the sum of the losses of all
            devices; under PyTorch each process holds its share of the gradient of
            `initial_state`, as of the gradients of weights. It needs
            `form="chunked"` and `causal=True`.

    Returns:
        The output, shape `(batch, length, heads, value_dim)`, in the dtype of
        the inputs but computed in float32 at least (by the kernels, in products
        of the dtype of the inputs, summed in float32). With `return_state=True`
        the tuple `(output, state)`, the state a list of float32 tensors
        (float64 for float64 inputs), in the order of the operator's
        `state_names`: for `"hla2"` `S`, `(batch, key_value_heads, dim, dim)`,
        and `F`, `(batch, heads, dim, value_dim)`. A sequence of length 0 leaves
        the state unchanged.

    Raises:
        ValueError: if shapes, dtypes, names, numbers or options do not fit
            together; if `context_parallel` is not among its allowed values; and if
            it is given under TensorFlow, which does not support it.

    Example:

    >>> q = k = v = keras.random.normal((2, 100, 4, 16))
    >>> output, state = keras_hla.ops.higher_order_attention(
    ...     q, k, v, log_decay=-0.1, return_state=True
    ... )
    >>> tuple(output.shape), [tuple(s.shape) for s in state]
    ((2, 100, 4, 16), [(2, 4, 16, 16), (2, 4, 16, 16)])

    A sequence that is split over all devices, under JAX:

    ```python
    mesh = jax.sharding.Mesh(jax.devices(), ("sequence",))
    attention = functools.partial(
        keras_hla.ops.higher_order_attention, log_decay=-0.1, context_parallel="sequence"
    )
    shard = jax.sharding.PartitionSpec(None, "sequence")
    attention = jax.shard_map(attention, mesh=mesh, in_specs=shard, out_specs=shard)
    output = jax.jit(attention)(q, k, v)
    ```
    """
    operator = operators.get(operator, masked, ridge)
    check_choice("form", form, FORMS)
    check_positive_int("chunk_size", chunk_size, optional=True)
    if chunk_size is not None and (form != "chunked" or not causal):
        raise ValueError(
            "Argument `chunk_size` needs form='chunked' and causal=True. "
            f"Received: form={form!r}, causal={causal}"
        )
    if form == "matrix" and (return_state or initial_state is not None):
        raise ValueError(
            "Arguments `initial_state` and `return_state` need form='chunked' or "
            "form='recurrent'. Received: form='matrix'"
        )
    if not causal:
        if form == "recurrent" or return_state or initial_state is not None:
            raise ValueError(
                "With `causal=False` there is no state: it goes with form='chunked' or 'matrix', "
                f"and without `initial_state` and `return_state`. Received: form={form!r}"
            )
        check_noncausal(operator, log_decay, masked)
    if segment_ids is not None:
        check_segments_allowed(operator, causal)
    if context_parallel is not None and (form != "chunked" or not causal):
        raise ValueError(
            "Argument `context_parallel` needs form='chunked' and causal=True. "
            f"Received: form={form!r}, causal={causal}"
        )
    devices = devices_of(context_parallel)
    query, key, value = check_rank(
        4, "(batch, length, heads, dim)", query=query, key=key, value=value
    )
    check_number("epsilon", epsilon, "a positive number", lambda x: x > 0)
    inputs = prepare(query, key, value, log_decay, mask, segment_ids, devices)
    if initial_state is not None:
        sizes = inputs.state_shapes(operator, normalize)
        initial_state = prepare_state("initial_state", initial_state, operator, sizes, inputs)
    how = kernels.choose(
        operator,
        dtype=inputs.query.dtype,
        key_dim=inputs.query.shape[-1],
        value_dim=inputs.value.shape[-1],
        implementation=implementation,
        decays=inputs.log_decay is not None,
        tensor=inputs.query,
        form=form,
        causal=causal,
        normalize=normalize,
        chunk_size=chunk_size,
        context_parallel=context_parallel,
    )
    output, state = evaluate(
        operator,
        inputs,
        initial_state,
        form=form,
        causal=causal,
        return_state=return_state,
        epsilon=epsilon if normalize else None,
        chunk_size=chunk_size,
        implementation=how.implementation,
        devices=devices,
    )
    return (output, state) if return_state else output


def causal_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    mask: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
) -> Any:
    """First-order causal linear attention, the primitive of the whole family.

        o_t = q_tᵀ H_t,   H_t = a_t H_{t-1} + k_t v_tᵀ

    Args:
        query: Tensor of shape `(batch, length, heads, dim)`.
        key: Tensor of shape `(batch, length, key_value_heads, dim)`.
        value: Tensor of shape `(batch, length, key_value_heads, value_dim)`.
        log_decay: `log a_t`, as in `higher_order_attention`.
        mask: Boolean tensor of shape `(batch, length)`.
        initial_state: List that holds `H`, shape
            `(batch, key_value_heads, dim, value_dim)`.
        return_state: Whether to return the state after the last token.
        chunk_size: Largest number of tokens of a chunk. `None` chooses.

    Returns:
        The output, `(batch, length, heads, value_dim)`, or with
        `return_state=True` the tuple `(output, [H])`.

    Raises:
        ValueError: as `higher_order_attention`.

    Example:

    >>> q = k = v = keras.random.normal((2, 100, 4, 16))
    >>> tuple(keras_hla.ops.causal_linear_attention(q, k, v).shape)
    (2, 100, 4, 16)
    """
    return higher_order_attention(
        query,
        key,
        value,
        operator="linear",
        log_decay=log_decay,
        mask=mask,
        initial_state=initial_state,
        return_state=return_state,
        chunk_size=chunk_size,
    )


@functional
def attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    operator: str | Operator = "hla2",
    log_decay: Tensor | None = None,
    masked: bool = True,
    normalize: bool = False,
    epsilon: float = 1e-6,
    ridge: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    """One token of `higher_order_attention`, at a cost that does not depend on the past.

    Args:
        query: Tensor of shape `(batch, heads, dim)`.
        key: Tensor of shape `(batch, key_value_heads, dim)`.
        value: Tensor of shape `(batch, key_value_heads, value_dim)`.
        state: List of states before the token, as returned by this function or
            by `higher_order_attention(return_state=True)`.
        operator: Name of an operator, or an operator.
        log_decay: A number or a tensor broadcastable to `(batch, heads)`.
        masked: As in `higher_order_attention`.
        normalize: As in `higher_order_attention`.
        epsilon: As in `higher_order_attention`.
        ridge: As in `higher_order_attention`.

    Returns:
        The tuple `(output, state)`: the output of shape
        `(batch, heads, value_dim)` and the list of new states.

    Raises:
        ValueError: as `higher_order_attention`.

    Example:

    >>> q = k = v = keras.random.normal((2, 4, 16))
    >>> state = [keras.ops.zeros((2, 4, 16, 16))] * 2
    >>> output, state = keras_hla.ops.attention_step(q, k, v, state)
    """
    operator = operators.get(operator, masked, ridge)
    query, key, value = check_rank(3, "(batch, heads, dim)", query=query, key=key, value=value)
    query, key, value = (ops.expand_dims(x, 1) for x in (query, key, value))
    if log_decay is not None and _rank(log_decay) == 2:
        log_decay = ops.expand_dims(log_decay, 1)
    check_number("epsilon", epsilon, "a positive number", lambda x: x > 0)
    inputs = prepare(query, key, value, log_decay, None)
    state = prepare_state(
        "state", state, operator, inputs.state_shapes(operator, normalize), inputs
    )
    output, new_state = evaluate(
        operator, inputs, state, form="step", epsilon=epsilon if normalize else None
    )
    return output[:, 0], new_state


def _rank(x):
    """The number of axes of a tensor, or of nested lists of numbers."""
    if isinstance(x, list | tuple):
        return 1 + (_rank(x[0]) if x else 0)
    return len(x.shape) if hasattr(x, "shape") else 0
