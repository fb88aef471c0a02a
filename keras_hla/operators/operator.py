"""What an operator is: four views of one computation, which the tests hold to each other."""

import abc

from keras import ops


class Operator(abc.ABC):
    """A causal sequence mixer of the family.

    All tensors carry the axes `(batch, key heads, group)` in front, where a
    group is the query heads that share one key head (size 1 for keys, values
    and the states made of them alone). Products broadcast over the group, so
    shared keys are never repeated. `d` is the query and key size, `dv` that of
    the values. The decay `a_t` is a number in (0, 1] per head and token.
    """

    #: The name under which `keras_hla.operators.get` finds it.
    name: str
    #: Names of the states in the paper's letters, in order.
    state_names: tuple[str, ...]

    @abc.abstractmethod
    def state_shapes(self, key_heads, query_heads, d, dv):
        """The shapes `(heads, rows, columns)` of the states, in order."""

    @abc.abstractmethod
    def weights(self, query, key, decay):
        """The definition: the weight of value `j` in output `t`.

        Args:
            query, key: shape `(..., n, d)`.
            decay: `(..., n, n)`, the product of the decays after token `j` up
                to token `t`; zero for `j > t`. Without decay, the causal mask.

        Returns:
            Shape `(..., n, n)`; the outputs are `weights @ value`.
        """

    @abc.abstractmethod
    def step(self, state, query, key, value, decay):
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
    def chunked(self, scan, state, query, key, value):
        """The parallel form: a chain of chunked passes.

        Args:
            scan: `scan(query, key, value, state, power)`, the primitive
                `LA_power` at the call's decays; returns outputs and last state.
            state: tuple of the states before the first token; `None` is zero.
            query, key: shape `(..., chunks, chunk_size, d)`.
            value: shape `(..., chunks, chunk_size, dv)`.

        Returns:
            The outputs, `(..., chunks, chunk_size, dv)`, and the tuple of the
            last states.
        """


def outer(row, column):
    """`r cᵀ`, shape `(..., d, dv)`."""
    return row[..., :, None] * column[..., None, :]


def read(matrix, vector):
    """`xᵀ M`, shape `(..., dv)`."""
    return ops.matmul(vector[..., None, :], matrix)[..., 0, :]
