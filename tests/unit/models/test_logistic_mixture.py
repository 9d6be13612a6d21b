import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from betavae.models.logistic_mixture import MAX_LOG_SCALE, LogisticMixture

pytestmark = pytest.mark.forked  # for autograd

BYTES = torch.arange(256).double() / 255
finite = {"allow_nan": False, "allow_infinity": False}


def one_pixel(components, **groups):
    """Parameters `(1, 3 * components, 1, 1)` in double."""
    rows = [groups[name] for name in ("logits", "means", "log_scales")]
    return torch.tensor(rows, dtype=torch.float64).view(1, -1, 1, 1)


@st.composite
def parameters(draw, largest=50.0):
    components = draw(st.integers(1, 5))

    def some(low, high):
        return draw(st.lists(st.floats(low, high, **finite), min_size=components, max_size=components))

    return components, one_pixel(
        components, logits=some(-largest, largest), means=some(-largest, largest), log_scales=some(-20, 20)
    )


@given(parameters())
@settings(max_examples=60, deadline=None)
def test_all_bytes_together_have_probability_one(case):
    components, params = case
    assert LogisticMixture(components).probabilities(params).sum().item() == pytest.approx(1, abs=1e-12)


@given(parameters())
@settings(max_examples=60, deadline=None)
def test_log_prob_stays_finite_where_probabilities_underflow(case):
    components, params = case
    likelihood = LogisticMixture(components)
    log_prob = likelihood.log_prob(BYTES.view(-1, 1, 1, 1), params.expand(256, -1, 1, 1))
    probabilities = likelihood.probabilities(params).flatten()
    assert log_prob.isfinite().all() and (log_prob <= 1e-12).all()
    seen = probabilities > 1e-300
    torch.testing.assert_close(log_prob[seen], probabilities[seen].log(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("components", [1, 3])
def test_probabilities_are_differences_of_logistic_cdfs(components):
    logits, means, log_scales = torch.randn(3, components).double()
    log_scales = log_scales - 2
    params = one_pixel(components, logits=logits.tolist(), means=means.tolist(), log_scales=log_scales.tolist())
    edges = (torch.arange(1, 256).double().unsqueeze(1) - 0.5) / 255
    cdf = (torch.sigmoid((edges - means) / log_scales.exp()) * logits.softmax(0)).sum(1)
    expected = torch.diff(cdf, prepend=torch.zeros(1).double(), append=torch.ones(1).double())
    torch.testing.assert_close(LogisticMixture(components).probabilities(params).flatten(), expected)


def test_log_prob_is_linear_in_the_far_tail():
    # P(b) of one logistic, far above its mean: e^-(distance of the lower edge) (1 - e^-width).
    params = one_pixel(1, logits=[0.0], means=[0.1], log_scales=[-9.0])
    scale = math.exp(-9)
    expected = -((128 - 0.5) / 255 - 0.1) / scale + math.log1p(-math.exp(-1 / 255 / scale))
    value = LogisticMixture(1).log_prob(torch.full((1, 1, 1, 1), 128, dtype=torch.float64) / 255, params)
    assert expected < -3000  # exp of it is 0
    assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("byte", [0, 1, 77, 254, 255])
@pytest.mark.parametrize("log_scale", [-8.0, -4.0, 0.0, 6.0])
@pytest.mark.parametrize("mean", [-2.0, 0.3, 3.0])
def test_gradient_equals_finite_differences_in_the_tails(byte, log_scale, mean):
    params = one_pixel(2, logits=[0.5, -0.5], means=[mean, 0.6], log_scales=[log_scale, log_scale + 0.5])
    x = torch.full((1, 1, 1, 1), byte).double() / 255
    assert torch.autograd.gradcheck(LogisticMixture(2).log_prob, (x, params.requires_grad_()), eps=1e-7, rtol=1e-4)


def test_mixture_has_the_shapes_of_any_likelihood():
    likelihood = LogisticMixture(2)
    params = torch.randn(3, 4, 6 * 3, 5, 7)
    x = torch.randint(256, (4, 3, 5, 7)) / 255
    each = torch.stack([likelihood.log_prob(x, draw) for draw in params])
    torch.testing.assert_close(likelihood.log_prob(x, params), each)
    table = likelihood.probabilities(params)
    assert table.shape == (3, 4, 3, 5, 7, 256)
    index = (255 * x).round().long().expand(3, -1, -1, -1, -1).unsqueeze(-1)
    torch.testing.assert_close(each, table.gather(-1, index).log().sum((-4, -3, -2, -1)), rtol=1e-4, atol=1e-3)
    assert likelihood.mean(params).shape == likelihood.sample(params).shape == (3, 4, 3, 5, 7)


def test_half_precision_params_are_read_at_image_precision():
    likelihood = LogisticMixture(3)
    params = torch.randn(2, 9, 4, 4).bfloat16().requires_grad_()
    x = torch.randint(256, (2, 1, 4, 4)) / 255
    value = likelihood.log_prob(x, params)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.detach(), likelihood.log_prob(x, params.detach().float()))
    assert torch.autograd.grad(value.sum(), params)[0].dtype == torch.bfloat16


def test_float32_is_within_a_thousandth_of_a_nat():
    likelihood = LogisticMixture(3)
    params = torch.randn(8, 9, 28, 28) * torch.tensor([1.0, 0.5, 2.0]).repeat_interleave(3).view(9, 1, 1)
    params[:, 6:] -= 3
    x = torch.randint(256, (8, 1, 28, 28)).double() / 255
    single, double = likelihood.log_prob(x.float(), params), likelihood.log_prob(x, params.double())
    torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=1e-3)


@given(parameters(largest=2.0))
@settings(max_examples=30, deadline=None)
def test_mean_is_within_half_a_byte_of_the_byte_mean(case):
    components, params = case
    likelihood = LogisticMixture(components)
    expected = (likelihood.probabilities(params) * BYTES).sum().item()
    assert likelihood.mean(params).item() == pytest.approx(expected, abs=0.5 / 255 + 1e-9)


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("level", [0.0, 0.2, 1.0])
def test_params_from_mean_have_about_that_mean(components, level):
    likelihood = LogisticMixture(components)
    params = likelihood.params_from_mean(torch.full((2, 4, 5), level))
    assert params.shape == (3 * components * 2, 4, 5)
    assert likelihood.mean(params.unsqueeze(0)) == pytest.approx(torch.full((1, 2, 4, 5), level), abs=0.08)


def test_samples_follow_the_probabilities():
    likelihood, draws = LogisticMixture(3), 300_000
    params = one_pixel(3, logits=[0.0, 1.0, -1.0], means=[-0.02, 0.4, 1.0], log_scales=[-4.0, -2.0, -3.0])
    many = params.expand(-1, -1, 1, draws)
    sample = likelihood.sample(many, torch.Generator().manual_seed(5))
    assert torch.equal(sample, likelihood.sample(many, torch.Generator().manual_seed(5)))
    counts = (255 * sample).round().long().flatten().bincount(minlength=256).double()
    expected = likelihood.probabilities(params).flatten() * draws
    common = expected > 5
    statistic = ((counts - expected) ** 2 / expected)[common].sum().item()
    assert counts[~common].sum() < 3 * expected[~common].sum() + 20
    assert statistic < chi2.ppf(1 - 1e-4, int(common.sum()))


def test_scales_beyond_the_limit_are_clamped_without_gradient():
    likelihood = LogisticMixture(1)
    x = torch.full((1, 1, 1, 1), 0.4).double()
    at, beyond = (one_pixel(1, logits=[0.0], means=[0.1], log_scales=[MAX_LOG_SCALE * factor]) for factor in (1, 2))
    assert likelihood.log_prob(x, at) == likelihood.log_prob(x, beyond)
    (gradient,) = torch.autograd.grad(likelihood.log_prob(x, beyond.requires_grad_()), beyond)
    assert gradient[0, 2] == 0 and gradient.isfinite().all()
