"""One token of a layer, from its projections to what its output projection reads, as one kernel.

Convolution, norms, rotation, decay, the passes of the operator over their states, output norm and
gate are one kernel launch: each state is read once and written once. Tensors are rounded where the
stages of a sequence round them.
"""

from keras_hla.kernels.token.function import TOKEN, chain_of

__all__ = ["TOKEN", "chain_of"]
