"""The definitions of the operators, compared with each other. All of it is torch."""

from backends import relative_error
from definitions import Reference, index_sum, serial
from family import PROBLEMS, VARIANTS, draw, draw_problem, split
import numpy as np
import pytest


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_definitions_agree(rng, variant, problem):
    inputs, log_decay, normalize = draw_problem(rng, 17, variant, problem)
    operator, options = split(variant)
    sums, steps = (
        Reference(definition, operator, inputs, log_decay, normalize=normalize, **options)
        for definition in (index_sum, serial)
    )
    weight = rng.standard_normal(sums.output.shape)
    assert relative_error(steps.output, sums.output) <= 1e-11
    for a, b in zip(steps.gradients(weight), sums.gradients(weight), strict=True):
        assert relative_error(a, b) <= 1e-10


def test_gradients_of_the_definition_against_finite_differences(rng):
    inputs, log_decay = draw(rng, 6, "per_token", batch=1)
    arrays = [x.astype("float64") for x in (*inputs, log_decay)]
    weight = rng.standard_normal((1, 6, 2, 5))

    def loss(arrays):
        return np.sum(Reference(index_sum, "hla3", arrays[:3], arrays[3]).output * weight)

    found = Reference(index_sum, "hla3", inputs, log_decay).gradients(weight)
    step = 1e-6
    for n, gradient in enumerate(found):
        direction = rng.standard_normal(arrays[n].shape)
        ahead, behind = list(arrays), list(arrays)
        ahead[n], behind[n] = arrays[n] + step * direction, arrays[n] - step * direction
        slope = (loss(ahead) - loss(behind)) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-6)
