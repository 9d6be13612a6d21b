import math

import numpy as np
import pytest
import torch
from torch import distributions as D
from torch import nn
from torch.nn import functional as F

from betavae.errors import UserError
from betavae.models.vae import VAE, Posterior
from betavae.objectives import LossTerms, dreg, elbo, iwae
from tests.conftest import MODEL

pytestmark = pytest.mark.forked  # for autograd


@pytest.fixture
def vae():
    return VAE(**MODEL)


@pytest.fixture
def x():
    return torch.rand(16, 1, 28, 28)


def tutorial_loss(vae, x, noise):
    """The tutorial's own expressions on the same weights: sigmoid, BCE, KLD, all summed."""
    fc1, head, fc3, fc4 = vae.encoder[1], vae.encoder[3], vae.decoder[0], vae.decoder[2]
    fc21, fc22 = ((head.weight[i], head.bias[i]) for i in (slice(0, 20), slice(20, 40)))
    h1 = torch.relu(fc1(x.view(-1, 784)))
    mu, logvar = F.linear(h1, *fc21), F.linear(h1, *fc22)
    z = mu + noise * torch.exp(0.5 * logvar)
    recon_x = torch.sigmoid(fc4(torch.relu(fc3(z))))
    bce = nn.functional.binary_cross_entropy(recon_x, x.view(-1, 784), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return bce, kld


def test_elbo_and_gradients_equal_the_tutorial(vae, x):
    noise = torch.randn(1, 16, 20)
    terms = elbo(vae, x, noise, beta=1.0)
    bce, kld = tutorial_loss(vae, x, noise[0])
    torch.testing.assert_close(terms.recon.mean(), bce / 16, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.kl.sum(1).mean(), kld / 16, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.loss, (bce + kld) / 16, rtol=1e-5, atol=0)
    ours = torch.autograd.grad(terms.loss, list(vae.parameters()))
    theirs = torch.autograd.grad((bce + kld) / 16, list(vae.parameters()))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_terms_equal_torch_distributions_with_several_samples(vae, x):
    vae, x = vae.double(), x.double()
    noise = torch.randn(5, 16, 20, dtype=torch.float64)
    terms = elbo(vae, x, noise, beta=3.0)
    posterior = D.Normal(vae.encode(x).mean, (0.5 * vae.encode(x).logvar).exp())
    z = posterior.mean + posterior.stddev * noise
    log_px = torch.stack(
        [D.Bernoulli(logits=vae.decode_params(zk), validate_args=False).log_prob(x).sum((1, 2, 3)) for zk in z]
    )
    kl = D.kl_divergence(posterior, D.Normal(0.0, 1.0))
    torch.testing.assert_close(terms.recon, -log_px.mean(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms.kl, kl, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms.loss, (-log_px.mean(0) + 3 * kl.sum(1)).mean(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms.posterior.mean, posterior.mean)


def test_beta_scales_only_the_gradient_of_the_kl(vae, x):
    noise, weights = torch.randn(1, 16, 20), [vae.encoder[1].weight, vae.decoder[2].weight]
    gradient = {b: torch.autograd.grad(elbo(vae, x, noise, b).loss, weights) for b in (0.0, 1.0, 4.0)}
    for at_0, at_1, at_4 in zip(*gradient.values(), strict=True):
        torch.testing.assert_close(at_4 - at_0, 4 * (at_1 - at_0), rtol=1e-3, atol=1e-5)
    assert torch.equal(gradient[0.0][1], gradient[4.0][1])  # the decoder does not see the KL


def test_batch_loss_is_the_mean_over_its_images(vae, x):
    noise = torch.randn(1, 16, 20)
    whole = elbo(vae, x, noise, 2.0)
    alone = [elbo(vae, x[[i]], noise[:, [i]], 2.0) for i in range(16)]
    torch.testing.assert_close(whole.loss, torch.stack([t.loss for t in alone]).mean())
    torch.testing.assert_close(whole.recon, torch.cat([t.recon for t in alone]))
    torch.testing.assert_close(whole.kl, torch.cat([t.kl for t in alone]))


def test_free_bits_floor_each_dimension(vae, x):
    noise = torch.randn(1, 16, 20)
    terms = elbo(vae, x, noise, 1.0, free_bits=0.01)
    rate = terms.kl.mean(0).clamp(min=0.01).sum()
    assert (terms.kl.mean(0) < 0.01).any() and (terms.kl.mean(0) > 0.01).any()
    torch.testing.assert_close(terms.loss, terms.recon.mean() + rate)
    torch.testing.assert_close(elbo(vae, x, noise, 1.0, free_bits=50.0).loss, terms.recon.mean() + 50 * 20)


TINY = MODEL | {"hidden_dims": [4], "latent_dim": 1, "activation": "tanh", "image_shape": [1, 2, 2]}


def gradients(loss, vae):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(vae.parameters()))])


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_iwae_and_gradient_equal_the_plain_estimator(vae, x, beta):
    vae, x = vae.double(), x.double()
    noise = torch.randn(6, 16, 20, dtype=torch.float64)
    mean, logvar = vae.encode(x)
    q = D.Normal(mean, (0.5 * logvar).exp())
    weights = []
    for z in q.mean + q.stddev * noise:
        log_px = -F.binary_cross_entropy_with_logits(vae.decode_params(z), x, reduction="none").flatten(1).sum(1)
        ratio = D.Normal(0.0, 1.0).log_prob(z).sum(1) - q.log_prob(z).sum(1)
        weights.append(torch.exp(log_px + beta * ratio + 600))  # so that no weight is 0
    plain = -(torch.log(sum(weights) / 6) - 600).mean()
    terms = iwae(vae, x, noise, beta)
    torch.testing.assert_close(terms.loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(terms.loss, vae), gradients(plain, vae), rtol=1e-8, atol=1e-10)
    reference = elbo(vae, x, noise, beta)
    for part in ("recon", "kl", "posterior"):
        torch.testing.assert_close(getattr(terms, part), getattr(reference, part))
    torch.testing.assert_close(dreg(vae, x, noise, beta).loss, terms.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_dreg_has_the_expected_gradient_of_iwae(beta):
    """The expectation over both samples' noise is an integral in the plane: by Gauss-Hermite quadrature, exactly."""
    vae, x = VAE(**TINY).double(), torch.tensor([1.0, 0, 1, 1], dtype=torch.float64).view(1, 1, 2, 2)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(torch.randn_like(parameter))
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    expected = {iwae: 0.0, dreg: 0.0}
    for a, weight_a in zip(nodes, weights, strict=True):
        for b, weight_b in zip(nodes, weights, strict=True):
            noise = torch.tensor([a, b]).view(2, 1, 1)
            for objective in expected:
                gradient = gradients(objective(vae, x, noise, beta).loss, vae)
                expected[objective] = expected[objective] + weight_a * weight_b / (2 * math.pi) * gradient
    torch.testing.assert_close(expected[dreg], expected[iwae], rtol=1e-4, atol=1e-5)


def test_dreg_encoder_gradient_has_less_variance(vae, x):
    encoder, decoder = vae.encoder[3].weight, vae.decoder[2].weight
    draws = {iwae: [], dreg: []}
    for _ in range(40):
        noise = torch.randn(64, 1, 20)
        gradient = {f: torch.autograd.grad(f(vae, x[:1], noise, 1.0).loss, [encoder, decoder]) for f in draws}
        torch.testing.assert_close(gradient[iwae][1], gradient[dreg][1])
        for objective in draws:
            draws[objective].append(gradient[objective][0])
    assert torch.stack(draws[dreg]).var(0).sum() < 0.5 * torch.stack(draws[iwae]).var(0).sum()


@pytest.mark.parametrize("resample", [1, 3])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_resampled_dreg_has_the_expected_gradient_of_dreg(beta, resample):
    vae, image = VAE(**TINY).double(), torch.tensor([1.0, 0, 1, 1], dtype=torch.float64).view(1, 1, 2, 2)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(torch.randn_like(parameter))
    noise = torch.randn(6, 1, 1, dtype=torch.float64)
    whole = dreg(vae, image, noise, beta)
    exact = gradients(whole.loss, vae)
    draws = 20_000
    terms = dreg(vae, image.expand(draws, -1, -1, -1), noise.expand(-1, draws, -1), beta, resample)
    torch.testing.assert_close(terms.loss, whole.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(terms.recon[:1], whole.recon)
    error = (gradients(terms.loss, vae) - exact).norm() / exact.norm()
    one = (gradients(dreg(vae, image, noise, beta, resample).loss, vae) - exact).norm() / exact.norm()
    assert error < 0.02 and one > 3 * error
    with torch.no_grad():
        torch.testing.assert_close(dreg(vae, image, noise, beta, resample).loss, whole.loss)


def test_kl_is_summed_in_float32_under_autocast():
    vae, x, noise = VAE(**MODEL), torch.rand(64, 1, 28, 28), torch.randn(1, 64, 20)
    vae.encoder[-1].bias.data[:20] += 1.3  # a KL of 17 nats, whose next neighbours in bfloat16 are 0.125 away
    with torch.autocast("cpu", torch.bfloat16):
        terms = elbo(vae, x, noise, 1.0)
    assert terms.kl.dtype == terms.recon.dtype == terms.loss.dtype == torch.float32
    exact = terms.recon.double().mean() + terms.kl.double().sum(1).mean()
    assert terms.loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_an_extra_term_is_a_scalar_or_one_number_per_image():
    terms = LossTerms(torch.tensor(1.0), torch.ones(4), torch.ones(4, 2), Posterior(torch.ones(4, 2), torch.ones(4, 2)))
    sums = terms._replace(extra_terms={"scalar": torch.tensor(0.5), "each": torch.arange(4.0)}).batch_sums()
    assert sums["scalar"] / 4 == 0.5 and sums["each"] == 6
    for shape in ((1,), (4, 1), (4, 2), (2, 4)):
        with pytest.raises(UserError, match=r"its extra term odd has shape .*; expected \(4,\), one number per image"):
            terms._replace(extra_terms={"odd": torch.ones(shape)}).batch_sums()
