"""The base class of operators: one computation in several forms, which the tests compare."""

from __future__ import annotations

import abc
from typing import Protocol

from keras import ops

from keras_hla.types import SegmentShapes, State, StateShapes, Tensor


class Scan(Protocol):
    """The primitive at the decays of a call, which a chain calls once for each pass."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: Tensor = None,
        power: int = 1,
        exclusive: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Returns the outputs and the last state."""

    def last_state(self, key: Tensor, value: Tensor, power: int = 1) -> Tensor:
        """Returns the last state alone, from zero.

        Args:
            key, value, power: As those of a call.

        Returns:
            The state, of shape `(..., d, dv)`.
        """


class Operator(abc.ABC):
    """A causal sequence mixer of the family.

    All tensors carry the axes `(batch, key heads, group)` in front, where a
    group is the query heads that share one key head (size 1 for keys, values
    and the states made of them alone). Products broadcast over the group, so
    shared keys are never repeated. `d` is the query and key size, `dv` that of
    the values. The decay `a_t` is a number in (0, 1] per head and token.

    A subclass defines `state_names` and the first four methods. `summarize` and
    `combine` are for operators whose segments compose.
    """

    #: Whether tokens read states as they were before them, that is in `exclusive` passes. Such an
    #: operator has no form without an order, and a token's decay cannot make it forget in time.
    exclusive = False

    @property
    @abc.abstractmethod
    def state_names(self) -> tuple[str, ...]:
        """Tuple of the names of the states, in the paper's letters and in order."""

    @property
    def segment_names(self) -> tuple[str, ...]:
        """Tuple of the names of what a segment holds besides the states."""
        return ()

    @abc.abstractmethod
    def state_shapes(self, key_heads: int, query_heads: int, d: int, dv: int) -> StateShapes:
        """The shapes of the states.

        Args:
            key_heads, query_heads: Numbers of heads.
            d: Size of each query and key head.
            dv: Size of each value head.

        Returns:
            A tuple of shapes `(heads, rows, columns)`, in the order of `state_names`.
        """

    def segment_shapes(self, key_heads: int, query_heads: int, d: int, dv: int) -> SegmentShapes:
        """The shapes of what `segment_names` names.

        Args:
            key_heads, query_heads, d, dv: As those of `state_shapes`.

        Returns:
            A tuple of shapes `(heads, rows, columns)`, with `None` for what is not known.
        """
        return ()

    @abc.abstractmethod
    def weights(self, query: Tensor, key: Tensor, decay: Tensor) -> Tensor:
        """The definition: the weight of value `j` in output `t`.

        Args:
            query, key: shape `(..., n, d)`.
            decay: `(..., n, n)`, the product of the decays after token `j` up
                to token `t`; zero for `j > t`. Without decay, the causal mask;
                without causality, ones.

        Returns:
            Shape `(..., n, n)`; the outputs are `weights @ value`.
        """

    @abc.abstractmethod
    def step(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, decay: Tensor
    ) -> tuple[Tensor, State]:
        """The recurrence: takes in one token.

        Args:
            state: tuple of the states before the token.
            query, key: shape `(..., d)`.
            value: shape `(..., dv)`.
            decay: `a_t`, shape `(..., 1, 1)`, or the number 1.

        Returns:
            The output, `(..., dv)`, and the tuple of the new states.
        """

    @abc.abstractmethod
    def chain(
        self, scan: Scan, state: State, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, State]:
        """The parallel form: a chain of passes of the primitive.

        Args:
            scan: `scan(query, key, value, state, power, exclusive)`, the
                primitive at the decays of the call; it returns the outputs and
                the last state.
            state: tuple of the states before the first token; `None` is zero.
            query, key: shape `(..., chunks, chunk_size, d)`.
            value: shape `(..., chunks, chunk_size, dv)`.

        Returns:
            The outputs, `(..., chunks, chunk_size, dv)`, and the tuple of the
            last states.
        """

    def summarize(self, scan: Scan, query: Tensor, key: Tensor, value: Tensor) -> State:
        """What a segment hands on: its last states, from zero, and what `segment_names` names.

        Args:
            scan, query, key, value: As those of `chain`. `scan.last_state(key, value, power)`
                gives a sum alone.

        Returns:
            A tuple of tensors.

        Raises:
            ValueError: if the segments of the operator do not compose.
        """
        raise ValueError(f"The segments of {type(self).__name__} do not compose.")

    def combine(self, left: State, right: State, decay: Tensor) -> State:
        """The segment that is `left`, then `right`.

        Args:
            left, right: tuples as `summarize` returns them.
            decay: `ρ`, the product of the decays of `right`, shape `(..., 1, 1)`.

        Returns:
            A tuple as `summarize` returns it.

        Raises:
            ValueError: if the segments of the operator do not compose.
        """
        raise ValueError(f"The segments of {type(self).__name__} do not compose.")

    def composes_with(self, other: Operator) -> bool:
        """Whether segments of this operator and of another one compose.

        Args:
            other: An `Operator`.

        Returns:
            A boolean.
        """
        return self == other

    def with_options(self, masked: bool, ridge: float) -> Operator:
        """This operator with options of the paper.

        Args:
            masked, ridge: As those of `get`.

        Returns:
            An `Operator`.

        Raises:
            ValueError: if the operator does not have the options.
        """
        raise ValueError(
            f"Operator {type(self).__name__} knows neither `masked=False` nor a `ridge`. "
            f"Received: masked={masked}, ridge={ridge}"
        )


def outer(row: Tensor, column: Tensor) -> Tensor:
    """The outer product `r cᵀ`.

    Args:
        row: `r`, of shape `(..., d)`.
        column: `c`, of shape `(..., dv)`.

    Returns:
        Tensor of shape `(..., d, dv)`.
    """
    return row[..., :, None] * column[..., None, :]


def read(matrix: Tensor, vector: Tensor) -> Tensor:
    """What a vector reads off a state: `xᵀ M`.

    Args:
        matrix: `M`, of shape `(..., d, dv)`.
        vector: `x`, of shape `(..., d)`.

    Returns:
        Tensor of shape `(..., dv)`.
    """
    return (vector[..., None, :] @ matrix)[..., 0, :]


def scores(query: Tensor, key: Tensor) -> Tensor:
    """The products of all queries with all keys, `Q Kᵀ`.

    Args:
        query, key: Of shape `(..., n, d)`.

    Returns:
        Tensor of shape `(..., n, n)`.
    """
    return query @ ops.swapaxes(key, -1, -2)
