"""Layers on shards of a sequence: the cases of `test_context_parallel.py`, and their arrays."""

import dataclasses

import keras
import numpy as np
import split_layers
import stage_definitions
import torch

BACKEND = keras.config.backend()
LENGTH = 40
SPLITS = {2: (20, 20), 4: (10, 10, 10, 10), "uneven": (7, 0, 20, 13)}


def parts_of(case):
    """The lengths of the shards."""
    return tuple(x * case.length // LENGTH for x in SPLITS[case.split])


def draw_mask(rng, case, parts):
    """The mask of a case, or `None`: shards of some rows hold nothing."""
    if not case.mask:
        return None
    mask = rng.uniform(size=(2, case.length)) < 0.7
    mask[0, : parts[0] + 1] = False
    mask[1, parts[0] : parts[0] + 2] = False
    mask[1, case.length - parts[-1] :] = False
    return mask


def draw_segments(rng, case, parts):
    """The segments of a case, or `None`."""
    if not case.segments:
        return None
    changes = rng.uniform(size=(2, case.length)) < max(0.1, 2 / case.length)
    if case.segments == "at borders":
        changes[:] = False
        changes[0, np.cumsum(parts)[:-1]] = True
        changes[1, np.cumsum(parts)[-2]] = True
    return np.cumsum(changes, axis=1).astype("int32") % 3


def starts_of(segments, unmasked):
    """Where segments of unmasked tokens start, but for the first ones."""
    starts = np.zeros(unmasked.shape, bool)
    if segments is None:
        return starts
    for row in range(2):
        tokens = np.flatnonzero(unmasked[row])
        ids = segments[row, tokens]
        starts[row, tokens[1:]] = ids[1:] != ids[:-1]
    return starts


@dataclasses.dataclass
class LayerCase:
    """A layer, and what it is given."""

    kind: str
    options: dict
    split: object = 4
    state: bool = True
    mask: bool = False
    segments: str = ""
    length: int = LENGTH
    dtype: str = "float64"
    definition: object = None


LAYERS = {
    "every option": LayerCase(
        "HLA",
        {
            "num_key_value_heads": 1,
            "decay": "input",
            "conv_kernel_size": 3,
            "output_gate": "silu",
            "qk_norm": True,
            "normalize": True,
            "feature_map": "softplus",
        },
        mask=True,
        segments="anywhere",
    ),
    "a window of several shards": LayerCase(
        "HLA",
        {"conv_kernel_size": 4, "operator": "ahla"},
        mask=True,
        segments="anywhere",
        length=8,
    ),
    "one token each": LayerCase("HLA", {"conv_kernel_size": 4, "use_bias": True}, length=4),
    "the last output": LayerCase(
        "HLA", {"return_sequences": False, "decay": (0.9, 0.5, 0.3)}, mask=True
    ),
    "the last output without a mask": LayerCase(
        "HLA", {"return_sequences": False, "rope_max_wavelength": None}, split=2, state=False
    ),
    "zeros for masked tokens": LayerCase(
        "HLA", {"zero_output_for_mask": True, "operator": "hla3"}, mask=True, segments="at borders"
    ),
    "rematerialization": LayerCase("HLA", {"remat_length": 5, "conv_kernel_size": 4}),
    "a layer in float32": LayerCase(
        "HLA",
        {"decay": "learned", "output_norm": False},
        split=2,
        state=False,
        segments="anywhere",
        dtype="float32",
    ),
    "a layer by kernels": LayerCase(
        "HLA",
        {"implementation": "triton", "conv_kernel_size": 3, "decay": "input"},
        mask=True,
        segments="anywhere",
        dtype="float32",
    ),
    "a block": LayerCase(
        "HLADecoderBlock",
        {"num_heads": 3, "key_dim": 4, "decay": "input"},
        state=False,
        mask=True,
        segments="anywhere",
        definition=stage_definitions.decoder_block,
    ),
    "a model": LayerCase("model", {}, state=False),
}
if BACKEND == "torch":
    # Some parts are rematerialized, and some are not.
    again = {"remat_length": 10, "conv_kernel_size": 4, "decay": "input"}
    LAYERS["uneven"] = LayerCase("HLA", again, split="uneven", mask=True)
    LAYERS["uneven, packed"] = LayerCase("HLA", again, split="uneven", segments="anywhere")
    # By kernels and without states, the stages are one function.
    fused = {"implementation": "triton", "conv_kernel_size": 4, "qk_norm": True}
    options = {"state": False, "dtype": "float32"}
    LAYERS["one function"] = LayerCase(
        "HLA", {**fused, "use_bias": True, "remat_length": 10}, split="uneven", **options
    )
    LAYERS["one function, packed"] = LayerCase(
        "HLA", {**fused, "decay": "input"}, segments="anywhere", length=8, **options
    )
    LAYERS["one function, one token each"] = LayerCase(
        "HLA", {**fused, "qk_norm": False, "operator": "ahla"}, length=4, **options
    )
    LAYERS["a block as one function"] = LayerCase(
        "HLADecoderBlock",
        {**fused, "num_heads": 3, "key_dim": 4, "decay": "input", "remat_length": 10},
        split="uneven",
        segments="anywhere",
        definition=stage_definitions.decoder_block,
        **options,
    )
LAYER_SIZES = {
    f"of {n}": LayerCase("HLA", {"conv_kernel_size": 3}, mask=True, segments="anywhere", length=n)
    for n in (64, 512)
}


class LayerProblem:
    """The arrays of a case, and what the definition makes of them."""

    def __init__(self, case):
        rng = np.random.default_rng(1)
        self.case, self.parts = case, parts_of(case)
        self.mask = draw_mask(rng, case, self.parts)
        self.segments = draw_segments(rng, case, self.parts)
        self.unmasked = np.ones((2, case.length), bool) if self.mask is None else self.mask
        self.options = case.options
        if case.kind != "model":
            self.options = {
                "num_heads": 3,
                "key_dim": 4,
                "return_state": case.state,
                **case.options,
            }
        layer = split_layers.build(case.kind, **self.options)

        def draw(*shape):
            return rng.standard_normal(shape).astype(case.dtype)

        # No weight has as many rows as the batch, or columns as there are tokens.
        self.weights = {
            w.path.partition("/")[2]: 0.4 * draw(*w.shape) + ("scale" in w.path)
            for w in layer.trainable_weights
        }
        shape = (2, case.length)
        self.inputs = {"sequences": draw(*shape, split_layers.FEATURES)}
        if case.kind == "model":
            self.inputs = {"token_ids": rng.integers(0, 11, size=shape, dtype="int32")}
        self.state, shapes = None, []
        if case.state:
            shapes = [(2, *size) for size in layer.cell.state_size]
            self.state = [draw(*x) for x in shapes]
            if layer.cell.rope_max_wavelength is not None:
                self.state[-1][:] = 1, 65520  # a block of positions is soon full
        output = (*shape, split_layers.FEATURES)
        if not case.options.get("return_sequences", True):
            output = output[:1] + output[2:]
        self.loss_weights = [draw(*x) for x in (output, *shapes)]
        if case.definition:  # which says nothing of the outputs of masked tokens
            self.loss_weights[0] *= self.unmasked[..., None]

    def to_run(self):
        given = {"mask": self.mask, "segment_ids": self.segments}
        weights = {f"weight {i:02}": x for i, x in enumerate(self.weights.values())}
        return {
            "layer": (self.case.kind, {**self.options, "dtype": self.case.dtype}),
            "arrays": self.inputs | weights | {k: x for k, x in given.items() if x is not None},
            "starts": starts_of(self.segments, self.unmasked),
            "state": self.state,
            "weights": self.loss_weights,
            "parts": self.parts,
            "shape": (2, self.case.length),
            "beside": self._beside(),
        }

    def _beside(self):
        """What it is compared with: the loop of its cell, one device, or no other layer."""
        if self.case in LAYER_SIZES.values() or self.case.definition:
            return None
        return "loop" if self.case.kind == "HLA" else "one device"

    def reference(self):
        """Outputs, zero at masked tokens, and gradients, each segment by itself."""
        x, *weights = leaves = [
            torch.tensor(x, dtype=torch.float64, requires_grad=True)
            for x in (self.inputs["sequences"], *self.weights.values())
        ]
        weights = dict(zip(self.weights, weights, strict=True))
        starts, output = starts_of(self.segments, self.unmasked), torch.zeros_like(x)
        for row in range(2):
            tokens = np.flatnonzero(self.unmasked[row])
            for document in np.split(tokens, np.flatnonzero(starts[row, tokens])):
                made = self.case.definition(weights, x[row, document], **self.options)
                output = output.index_put((torch.tensor(row), torch.tensor(document)), made)
        gradients = torch.autograd.grad((output * torch.tensor(self.loss_weights[0])).sum(), leaves)
        return [output.detach().numpy()], [x.numpy() for x in gradients]
