"""The comparisons of devices that tests/gpu makes, of the CPU with itself: they must not fail for their own reasons."""

import pytest

from betavae.models.priors import PRIORS
from betavae.objectives import OBJECTIVES
from tests.gpu.comparisons import compare_objectives, compare_priors

pytestmark = pytest.mark.forked  # for autograd


@pytest.mark.slow
def test_each_objective_is_compared():
    assert compare_objectives("cpu") == {name: [] for name in OBJECTIVES}


def test_each_prior_is_compared():
    assert compare_priors("cpu") == {name: [] for name in PRIORS}
