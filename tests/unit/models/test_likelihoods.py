import json
import math

import numpy as np
import pytest
import torch
from torch import distributions as D

from betavae.models.likelihoods import LIKELIHOODS, Bernoulli, ContinuousBernoulli, Gaussian, Laplace
from betavae.models.location_scale import MIN_LOG_SCALE
from tests.commands import TINY, run

pytestmark = pytest.mark.forked  # for autograd

SHAPE = (3, 4, 1, 5, 5)  # 3 posterior samples of 4 images


def reference(likelihood, params):
    if isinstance(likelihood, Gaussian):
        return (D.Laplace if isinstance(likelihood, Laplace) else D.Normal)(
            params, likelihood.log_scale.exp().to(params)
        )
    cls = D.ContinuousBernoulli if isinstance(likelihood, ContinuousBernoulli) else D.Bernoulli
    return cls(logits=params, validate_args=False)


@pytest.mark.parametrize("likelihood", [Bernoulli(), ContinuousBernoulli(), Gaussian(), Laplace()])
def test_log_prob_and_gradient_equal_torch_distributions(likelihood):
    if isinstance(likelihood, Gaussian):
        likelihood.log_scale.data.fill_(-0.7)
    x = torch.rand(SHAPE[1:], dtype=torch.float64)
    params = (3 * torch.randn(SHAPE, dtype=torch.float64)).requires_grad_()
    ours = likelihood.log_prob(x, params)
    theirs = reference(likelihood, params).log_prob(x.expand(SHAPE)).sum((-3, -2, -1))
    assert ours.shape == (3, 4)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    mine, other = (torch.autograd.grad(value.sum(), params)[0] for value in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(likelihood.mean(params), reference(likelihood, params).mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("likelihood", "distribution"), [(Gaussian, D.Normal), (Laplace, D.Laplace)])
def test_a_scale_per_value_equals_torch_distributions(likelihood, distribution):
    made = likelihood("per_value")
    assert made.params_per_channel == 2 and not list(made.parameters())
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    params = (2 * torch.randn(2, 4, 6, 5, 5, dtype=torch.float64)).requires_grad_()
    location, raw = params[:, :, :3], params[:, :, 3:]  # all locations before all log-scales
    scale = (MIN_LOG_SCALE + torch.nn.functional.softplus(raw - MIN_LOG_SCALE)).exp()
    expected = distribution(location, scale).log_prob(x).sum((-3, -2, -1))
    found = made.log_prob(x, params)
    torch.testing.assert_close(found, expected)
    mine, other = (torch.autograd.grad(value.sum(), params)[0] for value in (found, expected))
    torch.testing.assert_close(mine, other)
    assert torch.equal(made.mean(params), location)
    start = made.params_from_mean(x)
    torch.testing.assert_close(
        made.log_prob(x, start), distribution(x, 1.0).log_prob(x).sum((1, 2, 3)), rtol=5e-3, atol=0
    )
    draw = made.sample(start.detach()[:1].expand(2000, -1, -1, -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(draw.mean(0), x[0], rtol=0, atol=0.2)
    torch.testing.assert_close(draw.std(0), distribution(0, torch.ones(3, 5, 5).double()).stddev, rtol=0.15, atol=0)


@pytest.mark.parametrize("likelihood", [Gaussian("per_value"), Laplace("per_value")])
def test_the_density_of_a_constant_value_is_bounded(likelihood):
    """A decoder that is certain of a constant column gains at most the bound, and can leave it."""
    params = torch.tensor([0.0, -1e4]).view(1, 2, 1, 1).requires_grad_()
    value = likelihood.log_prob(torch.zeros(1, 1, 1, 1), params)
    assert value.item() == pytest.approx(-MIN_LOG_SCALE - math.log(2 * math.pi) / 2, abs=0.3)
    params = torch.tensor([0.1, MIN_LOG_SCALE]).view(1, 2, 1, 1).requires_grad_()
    likelihood.log_prob(torch.zeros(1, 1, 1, 1), params).sum().backward()
    assert params.grad[0, 1].item() > 1


def test_continuous_bernoulli_series_near_zero_is_exact():
    params = torch.tensor([-0.0499, -0.03, 0.02, 0.049], dtype=torch.float64).view(4, 1, 1, 1)
    x = torch.rand(4, 1, 1, 1, dtype=torch.float64)
    constant = (params / torch.tanh(params / 2)).log()
    expected = constant + x * params - torch.nn.functional.softplus(params)
    torch.testing.assert_close(ContinuousBernoulli().log_prob(x, params), expected.flatten(), rtol=0, atol=1e-10)


def test_is_discrete_for_binary_and_byte_likelihoods():
    found = {how: {name for name in LIKELIHOODS if LIKELIHOODS[name]().is_discrete(how)} for how in ("none", "dynamic")}
    assert found == {"none": {"logistic_mixture"}, "dynamic": {"bernoulli"}}


@pytest.mark.slow
def test_surrogates_are_noted_in_record_table_and_log(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (60, 6, 6), dtype=np.uint8))
    names = ["bernoulli", "continuous_bernoulli", "gaussian", "logistic_mixture"]
    data = ["data=arrays", "data.root=x.npy", "data.validation_size=9", "data.test_size=9", "data.batch_size=9"]
    sweep = [f"model.likelihood={','.join(names)}", "hydra.sweep.dir=sweep", "trainer.max_epochs=1"]
    text = run("-m", *TINY, *data, *sweep, cwd=tmp_path)
    notes = [LIKELIHOODS[name]().describe("none", "pixels in [0, 1]") for name in names[:2]]
    assert "may be above 0" in notes[1] and "surrogate" in notes[0]
    for name, note in zip(names, [*notes, notes[1], None], strict=True):
        (path,) = tmp_path.glob(f"sweep/*likelihood_{name},*/metrics.json")
        assert json.loads(path.read_text()).get("note") == note
    job_lines, table = text.split("test, in nats per image:")
    assert [job_lines.count(f"note  {note}") for note in notes] == [1, 2]
    assert [table.count(f"note  {note}") for note in notes] == [1, 1]
    report = run("sweep=sweep", cwd=tmp_path, script="scripts/sweep_report.py")
    assert all(report.count(f"Note: {note}.") == 1 for note in notes) and "have different scales" in report


def test_bernoulli_gradient_is_exact_and_twice_differentiable():
    params = (5 * torch.randn(2, 1, 3, 3, dtype=torch.float64)).requires_grad_()
    x = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: Bernoulli().log_prob(x, p), params)
    assert torch.autograd.gradgradcheck(lambda p: Bernoulli().log_prob(x, p), params)


def test_continuous_bernoulli_starts_at_the_mean_image():
    mean = torch.tensor([0.06, 0.3, 0.5, 0.51, 0.94])
    likelihood = ContinuousBernoulli()
    torch.testing.assert_close(likelihood.mean(likelihood.params_from_mean(mean)), mean, atol=1e-5, rtol=0)
    assert likelihood.params_from_mean(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([-20, 20])


@pytest.mark.parametrize("likelihood", [Bernoulli(), ContinuousBernoulli()])
@pytest.mark.parametrize("logit", [-100.0, 100.0])
def test_large_logits_are_finite_with_the_right_gradient(likelihood, logit):
    x = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    params = torch.full((1, 1, 1, 3), logit, requires_grad=True)
    value = likelihood.log_prob(x, params)
    (gradient,) = torch.autograd.grad(value.sum(), params)
    normaliser = 3 * torch.log(torch.tensor(100.0)) if isinstance(likelihood, ContinuousBernoulli) else 0.0
    # Per pixel x l - log(1 + e^l), plus the log of l / tanh(l / 2), which is |l| here.
    torch.testing.assert_close(value, (-150.0 + normaliser) * torch.ones(1))
    slope = (1 / logit) if isinstance(likelihood, ContinuousBernoulli) else 0.0
    torch.testing.assert_close(gradient, x - float(logit > 0) + slope)


def test_continuous_bernoulli_integrates_to_one():
    likelihood = ContinuousBernoulli()
    x = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    for logit in (-40.0, -1.0, -0.049, 0.0, 1e-6, 0.051, 3.0, 40.0):
        params = torch.full((len(x), 1, 1, 1), logit, dtype=torch.float64)
        density = likelihood.log_prob(x.view(-1, 1, 1, 1), params).exp()
        assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-5)
        mean = torch.trapezoid(density * x, x).item()
        assert likelihood.mean(params[0]).item() == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("likelihood", [Bernoulli(), ContinuousBernoulli(), Gaussian(), Laplace()])
def test_samples_have_the_mean_and_follow_the_generator(likelihood):
    params = torch.tensor([-6.0, -0.5, 0.0, 2.0]).view(4, 1, 1, 1)
    many = params.expand(4, 1, 200, 200)
    draw = likelihood.sample(many, torch.Generator().manual_seed(3))
    assert torch.equal(draw, likelihood.sample(many, torch.Generator().manual_seed(3)))
    error = (draw.mean((1, 2, 3)) - likelihood.mean(params).flatten()).abs().max()
    assert error < 0.03  # six standard errors of the widest, the Gaussian


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_half_precision_sums_pixels_in_float32(name, dtype):
    likelihood = LIKELIHOODS[name]()
    x = (torch.randint(256, (16, 3, 64, 64)) / 255).to(dtype)
    params = (5 * torch.randn(16, 3 * likelihood.params_per_channel, 64, 64)).to(dtype).requires_grad_()
    value = likelihood.to(dtype).log_prob(x, params)
    (gradient,) = torch.autograd.grad(value.mean(), params)
    expected = likelihood.double().log_prob(x.double(), params.double())
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert gradient.isfinite().all()
