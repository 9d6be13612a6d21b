import pytest

from betavae.objectives.schedules import BETA_SCHEDULES, cyclical, linear
from betavae.optim import lr_factor


def test_beta_schedules():
    assert [linear(s, 100, warmup=0.5) for s in (0, 25, 50, 99)] == [0, 0.5, 1, 1]
    assert [linear(s, 100, warmup=0.0) for s in (0, 1)] == [1, 1]  # no warm-up
    assert [cyclical(s, 80, cycles=2, ramp=0.5) for s in (0, 10, 20, 39, 40, 50, 80, 90)] == [
        0,
        0.5,
        1,
        1,
        0,
        0.5,
        1,
        1,
    ]
    assert BETA_SCHEDULES["constant"](7, 10) == 1


def test_learning_rate_schedules():
    assert [lr_factor(s, 100, "constant", 0.0) for s in (0, 99)] == [1, 1]
    assert [lr_factor(s, 100, "linear", 0.0) for s in (0, 50, 100, 150)] == [1, 0.5, 0, 0]
    assert [lr_factor(s, 100, "cosine", 0.0) for s in (50, 100, 170)] == pytest.approx([0.5, 0, 0])
    warm = [lr_factor(s, 100, "linear", 0.1) for s in range(101)]
    assert 0 < warm[0] < warm[5] < warm[9] < 1 == warm[10] and warm[55] == pytest.approx(0.5)
