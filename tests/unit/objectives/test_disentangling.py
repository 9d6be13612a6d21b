"""The objectives that are made to disentangle, each against an independent formula."""

import itertools
import math

import pytest
import torch
from torch import distributions as D

from betavae.models.vae import VAE, Posterior
from betavae.objectives import OBJECTIVES, build_objective, elbo
from betavae.objectives.disentangling import beta_tcvae, capacity_vae, dip_vae, kl_decomposition
from tests.conftest import MODEL

pytestmark = pytest.mark.forked  # for autograd

SMALL = MODEL | {"hidden_dims": [8], "latent_dim": 3, "activation": "tanh", "image_shape": [1, 2, 3]}


@pytest.fixture
def vae():
    return VAE(**SMALL).double()


@pytest.fixture
def x():
    return torch.rand(7, 1, 2, 3, dtype=torch.float64)


def aggregate(posterior):
    """q(z) of all images, and q(z_d) of each dimension, by torch's own mixtures."""
    mean, scale = posterior.mean, (0.5 * posterior.logvar).exp()
    even = D.Categorical(torch.ones(len(mean), dtype=mean.dtype))
    joint = D.MixtureSameFamily(even, D.Independent(D.Normal(mean, scale), 1))
    return joint, [D.MixtureSameFamily(even, D.Normal(mean[:, d], scale[:, d])) for d in range(mean.shape[1])]


@pytest.mark.parametrize("sampling", ["stratified", "weighted"])
def test_kl_parts_are_exact_for_the_whole_data_set(sampling):
    posterior = Posterior(torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64))
    noise = torch.randn(5, 6, 3, dtype=torch.float64)
    parts = kl_decomposition(posterior, noise, num_train_images=6, sampling=sampling)
    joint, marginals = aggregate(posterior)
    z = posterior.mean + (0.5 * posterior.logvar).exp() * noise
    log_qz, log_product = joint.log_prob(z), sum(q.log_prob(z[..., d]) for d, q in enumerate(marginals))
    log_qzx = D.Normal(posterior.mean, (0.5 * posterior.logvar).exp()).log_prob(z).sum(-1)
    log_pz = D.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(parts["mutual_information"], (log_qzx - log_qz).mean(0))
    torch.testing.assert_close(parts["total_correlation"], (log_qz - log_product).mean(0))
    torch.testing.assert_close(parts["dimension_wise_kl"], (log_product - log_pz).mean(0))


def test_stratified_sampling_is_unbiased_for_q():
    """The mean over every batch of 3 of 6 images that has image 0 in it is q(z) of all six."""
    posterior = Posterior(torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64))
    noise = torch.randn(1, 1, 2, dtype=torch.float64)
    estimates = []
    for others in itertools.combinations(range(1, 6), 2):
        batch = Posterior(posterior.mean[[0, *others]], posterior.logvar[[0, *others]])
        parts = kl_decomposition(batch, noise.expand(1, 3, 2), num_train_images=6)
        z = batch.mean[0] + (0.5 * batch.logvar[0]).exp() * noise[0, 0]
        log_qzx = D.Normal(batch.mean[0], (0.5 * batch.logvar[0]).exp()).log_prob(z).sum()
        estimates.append((log_qzx - parts["mutual_information"][0]).exp())
    torch.testing.assert_close(torch.stack(estimates).mean(), aggregate(posterior)[0].log_prob(z).exp())


def test_weighted_sampling_has_the_gradient_of_the_paper():
    """Chen et al. 2018, equation 5: log q(z) is about log 1 / (N B) sum_j q(z|x_j), z's own image among the j."""
    mean = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    posterior, noise = Posterior(mean, torch.zeros(6, 3, dtype=torch.float64)), torch.randn(1, 6, 3).double()
    parts = kl_decomposition(posterior, noise, num_train_images=1000, sampling="weighted")
    same = kl_decomposition(posterior, noise, num_train_images=6)
    assert all(torch.equal(parts[name], same[name]) for name in parts)
    log_q = D.Normal(mean, 1.0).log_prob((mean + noise[0]).unsqueeze(1))  # (z, j, D)
    paper = log_q.sum(-1).logsumexp(1) - math.log(6000) - (log_q.logsumexp(1) - math.log(6000)).sum(-1)
    correlation = parts["total_correlation"]
    torch.testing.assert_close(paper - correlation, torch.full_like(paper, 2 * math.log(6000)) - 2 * math.log(6))
    gradients = [torch.autograd.grad(value.sum(), mean, retain_graph=True)[0] for value in (paper, correlation)]
    torch.testing.assert_close(*gradients)


def test_kl_parts_vanish_for_one_dimension_or_one_image():
    one = Posterior(torch.randn(6, 1), torch.randn(6, 1))
    assert kl_decomposition(one, torch.randn(2, 6, 1), 6)["total_correlation"].abs().max() < 1e-5
    alone = Posterior(torch.randn(1, 4), torch.randn(1, 4))
    parts = kl_decomposition(alone, torch.randn(2, 1, 4), 1)
    assert parts["mutual_information"].abs().max() < 1e-5
    assert parts["total_correlation"].abs().max() < 1e-5


def test_total_correlation_of_equal_dimensions_is_exact():
    """z_1 and z_2 are the same standard normal but for noise of variance s2 each: TC is -log(1 - r^2) / 2."""
    n, s2 = 4000, 0.25
    position = D.Normal(0.0, 1.0).icdf((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    posterior = Posterior(position[:, None].expand(n, 2), torch.full((n, 2), math.log(s2), dtype=torch.float64))
    parts = kl_decomposition(posterior, torch.randn(1, n, 2, dtype=torch.float64), n)
    r = 1 / (1 + s2)
    assert parts["total_correlation"].mean().item() == pytest.approx(-0.5 * math.log(1 - r**2), abs=0.03)
    # I(x; z) = h(z) - h(z|x), for a Gaussian with this covariance.
    information = 0.5 * math.log((1 + s2) ** 2 - 1) - math.log(s2)
    assert parts["mutual_information"].mean().item() == pytest.approx(information, abs=0.04)


def test_beta_tcvae_reweights_one_part_of_the_elbo(vae, x):
    noise = torch.randn(4, 7, 3, dtype=torch.float64)
    reference = elbo(vae, x, noise, 1.0)
    at_1, at_6 = (beta_tcvae(vae, x, noise, beta, num_train_images=7, sampling="stratified") for beta in (1.0, 6.0))
    torch.testing.assert_close(at_1.loss, reference.loss)
    joint, marginals = aggregate(vae.encode(x))
    z = vae.encode(x).rsample(noise)
    correlation = joint.log_prob(z) - sum(q.log_prob(z[..., d]) for d, q in enumerate(marginals))
    torch.testing.assert_close(at_6.loss - at_1.loss, 5 * correlation.mean())
    for terms in (at_1, at_6):
        torch.testing.assert_close(terms.recon, reference.recon)
        torch.testing.assert_close(terms.kl, reference.kl)
        assert not any(part.requires_grad for part in (terms.recon, terms.kl, *terms.posterior))
    torch.testing.assert_close(at_6.extra_terms["total_correlation"], correlation.mean(0))


def test_beta_tcvae_gradient_equals_finite_differences(vae, x):
    noise, weight = torch.randn(1, 7, 3, dtype=torch.float64), vae.encoder[1].weight
    loss = lambda: beta_tcvae(vae, x, noise, 4.0, num_train_images=50, sampling="stratified").loss  # noqa: E731
    (gradient,) = torch.autograd.grad(loss(), weight)
    for place in ((0, 0), (3, 4), (7, 5)):
        with torch.no_grad():
            weight[place] += 1e-5
            above = loss()
            weight[place] -= 2e-5
            below = loss()
            weight[place] += 1e-5
        assert ((above - below) / 2e-5).item() == pytest.approx(gradient[place].item(), rel=1e-5, abs=1e-8)


BOUNDS = {"ciwae": {"elbo_weight": 0.5}, "miwae": {"groups": 2}, "piwae": {"groups": 2}, "mmd_vae": {"mmd_weight": 9.0}}


@pytest.mark.parametrize("images", [1, 7])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_accept_one_dimension_and_one_image(x, name, images):
    own = {"dip_vae": {"variant": "i", "off_diagonal": 2.0, "diagonal": 5.0}, "capacity_vae": {"gamma": 9.0}}
    own |= {"beta_tcvae": {"sampling": "stratified"}} | BOUNDS
    objective = build_objective({"name": name, "kl_decomposition": True, "num_train_images": 9, **own.get(name, {})})
    vae = VAE(**SMALL | {"latent_dim": 1}).double()
    terms = objective(vae, x[:images], torch.randn(2, images, 1, dtype=torch.float64), 2.0)
    terms.loss.backward()
    assert terms.loss.isfinite() and all(value.isfinite() for value in terms.batch_sums().values())
    assert all(weight.grad.isfinite().all() for weight in vae.parameters())


@pytest.mark.parametrize("variant", ["i", "ii"])
def test_dip_vae_penalizes_a_covariance_off_the_identity(vae, x, variant):
    noise = torch.randn(1, 7, 3, dtype=torch.float64)
    reference = elbo(vae, x, noise, 3.0)
    mean, logvar = vae.encode(x)
    centred = mean - mean.mean(0)
    covariance = sum(torch.outer(row, row) for row in centred) / 7
    if variant == "ii":
        covariance = covariance + torch.diag(logvar.exp().mean(0))
    price = sum(
        5 * (covariance[i, i] - 1) ** 2 if i == j else 2 * covariance[i, j] ** 2
        for i, j in itertools.product(range(3), repeat=2)
    )
    terms = dip_vae(vae, x, noise, 3.0, variant, off_diagonal=2.0, diagonal=5.0)
    torch.testing.assert_close(terms.loss, reference.loss + price)
    torch.testing.assert_close(terms.extra_terms["covariance_penalty"], price.expand(7))
    weight = vae.encoder[1].weight
    whole, without = (torch.autograd.grad(loss, weight)[0] for loss in (terms.loss, reference.loss))
    (of_price,) = torch.autograd.grad(price, weight)
    torch.testing.assert_close(whole - without, of_price)


def test_capacity_vae_holds_the_kl_at_beta_nats(vae, x):
    noise = torch.randn(1, 7, 3, dtype=torch.float64)
    reference = elbo(vae, x, noise, 1.0)
    recon, kl = reference.recon.mean(), reference.kl.sum(1).mean()
    for nats in (0.0, kl.item() / 2, kl.item() + 3):
        loss = capacity_vae(vae, x, noise, nats, gamma=10.0).loss
        torch.testing.assert_close(loss, recon + 10 * abs(kl - nats))
    torch.testing.assert_close(capacity_vae(vae, x, noise, 0.0, gamma=4.0).loss, elbo(vae, x, noise, 4.0).loss)


def test_any_objective_can_log_the_kl_decomposition(vae, x):
    noise = torch.randn(2, 7, 3, dtype=torch.float64)
    parts = kl_decomposition(vae.encode(x), noise, 20)
    own = {
        "beta_tcvae": {"num_train_images": 20, "sampling": "stratified"},
        "dip_vae": {"variant": "i", "off_diagonal": 1.0, "diagonal": 1.0},
        "capacity_vae": {"gamma": 1.0},
    } | BOUNDS
    for name in OBJECTIVES:
        settings = {"name": name, "k": 2, "num_train_images": 20, **own.get(name, {})}
        plain = build_objective(settings)(vae, x, noise, 2.0)
        measured = build_objective(settings | {"kl_decomposition": True})(vae, x, noise, 2.0)
        assert torch.equal(plain.loss, measured.loss)
        for part, value in parts.items():
            torch.testing.assert_close(measured.extra_terms[part], value)
            assert name == "beta_tcvae" or part not in plain.extra_terms
