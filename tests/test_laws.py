"""Laws that hold for every operator, on random shapes, splits, decays and chunk sizes."""

import dataclasses

from backends import relative_error, run, to_numpy
from family import FORMS, VARIANTS, attend
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
import keras
import numpy as np
import pytest

from keras_hla import ops

every_variant = pytest.mark.parametrize("variant", VARIANTS)
# JAX compiles anew for every shape: there, a few problems that are always the same.
ON_JAX = keras.config.backend() == "jax"
some = settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit] if ON_JAX else list(Phase),
)
many = settings(max_examples=5, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs with their log-decay, a place to cut them, and a form with its options."""

    length: int
    cut: int
    decay_heads: int
    form: str = "chunked"
    chunk_size: int | None = None
    batch: int = 2
    key_heads: int = 2
    group: int = 2
    dim: int = 4
    value_dim: int = 3
    strongest: float = 0.2
    seed: int = 0

    @property
    def options(self):
        size = {} if self.chunk_size is None else {"chunk_size": self.chunk_size}
        return {"form": self.form, **size}

    def draw(self):
        rng = np.random.default_rng(self.seed)
        shape = (self.batch, self.length)
        q = rng.standard_normal((*shape, self.key_heads * self.group, self.dim))
        k = rng.standard_normal((*shape, self.key_heads, self.dim))
        v = rng.standard_normal((*shape, self.key_heads, self.value_dim))
        log_decay = -rng.uniform(0, self.strongest, (*shape, self.decay_heads))
        return [x.astype("float32") for x in (q, k, v, log_decay)]


@st.composite
def problems(draw, forms=FORMS):
    length, form = draw(st.integers(2, 90)), draw(st.sampled_from(forms))
    key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    return Problem(
        length=length,
        cut=draw(st.integers(1, length - 1)),
        decay_heads=draw(st.sampled_from([1, key_heads, key_heads * group])),
        form=form,
        chunk_size=draw(st.integers(1, 40)) if form == "chunked" else None,
        batch=draw(st.integers(1, 2)),
        key_heads=key_heads,
        group=group,
        dim=draw(st.integers(1, 6)),
        value_dim=draw(st.integers(1, 6)),
        strongest=draw(st.sampled_from([0.01, 1.0])),
        seed=draw(seeds),
    )


# The random ones begin with the smallest. These are tried in any case: cut inside of a chunk, and
# the last one not full; between two chunks; in more chunks than are scanned in one product; and the
# other forms.
INSIDE = Problem(length=43, cut=21, decay_heads=4, chunk_size=8)
BETWEEN = Problem(length=40, cut=16, decay_heads=2, chunk_size=8)
GROUPS = Problem(length=140, cut=131, decay_heads=2, chunk_size=2)
RECURRENT = Problem(length=20, cut=9, decay_heads=4, form="recurrent")
MATRIX = Problem(length=20, cut=9, decay_heads=4, form="matrix")
FOR_JAX = (INSIDE, GROUPS)  # for which the laws share what they compile


def tried_on(*problems, others=()):
    """Has hypothesis try a law on each of the problems, with the other arguments."""

    def decorate(law):
        for problem in problems:
            if problem in FOR_JAX or not ON_JAX:
                law = example(problem, *others)(law)
        return law

    return decorate


def attend_and_keep(inputs, log_decay, **options):
    """The output of `attend`, by the function that returns states, too, if there are any."""
    if options["form"] == "matrix":
        return attend(inputs, log_decay, **options)
    return attend(inputs, log_decay, return_state=True, **options)[0]


@every_variant
def test_any_split_is_the_whole(variant):
    @tried_on(INSIDE, BETWEEN, GROUPS, RECURRENT)
    @some
    @given(problems(forms=("chunked", "recurrent")))
    def law(problem):
        arrays, cut = problem.draw(), problem.cut
        options = {**problem.options, **VARIANTS[variant], "return_state": True}
        *inputs, log_decay = arrays
        whole, last = attend(inputs, log_decay, **options)
        *inputs, log_decay = [x[:, :cut] for x in arrays]
        first, state = attend(inputs, log_decay, **options)
        *inputs, log_decay = [x[:, cut:] for x in arrays]
        second, state = attend(inputs, log_decay, state, **options)
        pieces = np.concatenate([to_numpy(first), to_numpy(second)], axis=1)
        assert relative_error(pieces, whole) <= 1e-5
        for a, b in zip(state, last, strict=True):
            assert relative_error(a, b) <= 1e-5

    law()


@every_variant
def test_step_by_step_is_the_whole(variant):
    @tried_on(INSIDE, BETWEEN)
    @some
    @given(problems(forms=("chunked",)))
    def law(problem):
        *inputs, log_decay = problem.draw()
        whole = attend_and_keep(inputs, log_decay, **problem.options, **VARIANTS[variant])
        for form in ("recurrent", "matrix"):
            other = attend(inputs, log_decay, form=form, **VARIANTS[variant])
            assert relative_error(whole, other) <= 1e-5

    law()


@every_variant
def test_a_token_leaves_earlier_outputs_bitwise_equal(variant):
    @tried_on(INSIDE, BETWEEN, GROUPS, RECURRENT, MATRIX)
    @some
    @given(problems())
    def law(problem):
        arrays, cut = problem.draw(), problem.cut
        options = {**problem.options, **VARIANTS[variant]}
        before = to_numpy(attend_and_keep(arrays[:3], arrays[3], **options))
        changed = [x.copy() for x in arrays]
        for x in changed[:3]:
            x[:, cut] = -3 * x[:, cut] + 1
        changed[3][:, cut] = -0.7
        after = to_numpy(attend_and_keep(changed[:3], changed[3], **options))
        np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
        assert not np.array_equal(before[:, cut], after[:, cut])

    law()


@every_variant
def test_masked_tokens_do_not_exist(variant):
    @tried_on(INSIDE, BETWEEN, RECURRENT, MATRIX, others=(0, True))
    @some
    @given(problems(), seeds, st.booleans())
    def law(problem, seed, normalize):
        arrays = problem.draw()
        for x in arrays[:2]:  # denominators far from zero
            np.abs(x, out=x)
        if "published" in variant:  # whose denominators decay makes negative
            arrays[3][:] = 0
        options = {**problem.options, **VARIANTS[variant], "normalize": normalize}
        batch, length = arrays[0].shape[:2]
        keep = np.random.default_rng(seed).random(length) < 0.6
        keep[0] = True
        padded = [x.copy() for x in arrays]
        for x in padded[:3]:
            x[:, ~keep] = np.nan
        *inputs, log_decay = (x[:, keep] for x in arrays)
        alone = attend(inputs, log_decay, **options)

        def masked(q, k, v, log_decay):
            mask = np.broadcast_to(keep, (batch, length))
            return ops.higher_order_attention(q, k, v, log_decay=log_decay, mask=mask, **options)

        output = to_numpy(run(masked, *padded))
        assert relative_error(output[:, keep], alone) <= 1e-5
        assert np.all(output[:, ~keep] == 0)

    law()


# The laws below need no new shapes.


def draw_values(seed):
    rng = np.random.default_rng(seed)
    shapes = [(3, 40, 4, 6), (3, 40, 2, 6), (3, 40, 2, 5)]
    inputs = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    log_decay = -rng.uniform(0, 1, (3, 40, 2)).astype("float32")
    return rng, inputs, log_decay


@every_variant
def test_linear_in_the_values(variant):
    @many
    @given(seeds, st.floats(-2, 2, width=32))
    def law(seed, factor):
        rng, (q, k, v), log_decay = draw_values(seed)
        w = rng.standard_normal(v.shape).astype("float32")
        of_v, of_w, of_sum = (
            attend((q, k, x), log_decay, chunk_size=16, **VARIANTS[variant])
            for x in (v, w, v + np.float32(factor) * w)
        )
        assert relative_error(of_sum, to_numpy(of_v) + factor * to_numpy(of_w)) <= 1e-5

    law()


@pytest.mark.parametrize(
    ("variant", "queries", "keys"),
    [
        ("linear", 1, 1),
        ("hla2", 2, 2),
        ("hla2 unmasked", 2, 2),
        ("hla2_published", 2, 2),
        ("ahla", 2, 2),
        ("hla3", 3, 3),
        ("hla3 unmasked", 3, 3),
        ("hla3_published", 3, 3),
    ],
)
def test_powers_of_queries_and_keys(variant, queries, keys):
    @many
    @given(seeds, st.integers(-4, 4), st.integers(-4, 4))
    def law(seed, i, j):
        _, (q, k, v), log_decay = draw_values(seed)
        output, scaled = (
            attend(inputs, log_decay, chunk_size=16, **VARIANTS[variant])
            for inputs in ((q, k, v), (q * np.float32(2.0**i), k * np.float32(2.0**j), v))
        )
        # Powers of two leave floating point exact.
        np.testing.assert_array_equal(
            to_numpy(scaled), to_numpy(output) * 2.0 ** (i * queries + j * keys)
        )

    law()


@every_variant
def test_sequences_and_heads_do_not_mix(variant):
    @many
    @given(seeds)
    def law(seed):
        rng, inputs, log_decay = draw_values(seed)
        options = {"chunk_size": 16, **VARIANTS[variant]}
        output = to_numpy(attend(inputs, log_decay, **options))
        rows, groups = rng.permutation(3), rng.permutation(2)
        heads = np.stack([2 * groups, 2 * groups + 1], axis=1).ravel()
        orders = (heads, groups, groups)
        q, k, v = (x[rows][:, :, order] for x, order in zip(inputs, orders, strict=True))
        permuted = attend((q, k, v), log_decay[rows][:, :, groups], **options)
        assert relative_error(permuted, output[rows][:, :, heads]) <= 1e-6

    law()


def test_noncausal_outputs_move_with_the_tokens():
    @many
    @given(seeds)
    def law(seed):
        rng, inputs, _ = draw_values(seed)
        order = rng.permutation(40)
        for operator in ("linear", "hla2", "ahla", "hla3"):
            output = to_numpy(attend(inputs, operator=operator, causal=False))
            moved = attend([x[:, order] for x in inputs], operator=operator, causal=False)
            assert relative_error(moved, output[:, order]) <= 1e-5

    law()
