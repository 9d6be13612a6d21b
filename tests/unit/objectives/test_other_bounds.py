import numpy as np
import pytest
import torch

from betavae.models.vae import VAE
from betavae.objectives import ciwae, elbo, iwae, miwae, mmd_vae, piwae
from betavae.objectives.mmd import mmd_to_normal
from tests.conftest import MODEL

pytestmark = pytest.mark.forked  # for autograd

SMALL = MODEL | {"hidden_dims": [8], "latent_dim": 3, "image_shape": [1, 2, 3]}


@pytest.fixture(params=("standard", "mixture"))
def vae(request):
    vae = VAE(**SMALL, prior={"name": request.param} | ({"components": 4} if request.param == "mixture" else {}))
    return vae.double()


@pytest.fixture
def x():
    return torch.rand(5, 1, 2, 3).double()


@pytest.fixture
def noise():
    return torch.randn(12, 5, 3).double()


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)


@pytest.mark.parametrize("weight", (0.0, 0.3, 1.0))
def test_ciwae_is_between_the_elbo_and_iwae(vae, x, noise, weight):
    single = torch.stack([iwae(vae, x, one[None], 0.7).loss for one in noise]).mean()
    wanted = weight * single + (1 - weight) * iwae(vae, x, noise, 0.7).loss
    terms = ciwae(vae, x, noise, 0.7, weight)
    torch.testing.assert_close(terms.loss, wanted)
    torch.testing.assert_close(gradients(terms.loss, vae), gradients(wanted, vae))


@pytest.mark.parametrize("groups", (1, 3, 12))
def test_miwae_is_the_mean_over_groups_of_samples(vae, x, noise, groups):
    wanted = torch.stack([iwae(vae, x, part, 0.7).loss for part in noise.chunk(groups)]).mean()
    terms = miwae(vae, x, noise, 0.7, groups)
    torch.testing.assert_close(terms.loss, wanted)
    torch.testing.assert_close(gradients(terms.loss, vae), gradients(wanted, vae))


@pytest.mark.parametrize("groups", (1, 3, 12))
def test_piwae_trains_encoder_and_decoder_by_their_bounds(vae, x, noise, groups):
    terms, one, other = piwae(vae, x, noise, 0.7, groups), iwae(vae, x, noise, 0.7), miwae(vae, x, noise, 0.7, groups)
    torch.testing.assert_close(terms.loss, one.loss)
    torch.testing.assert_close(gradients(terms.loss, vae.decoder), gradients(one.loss, vae.decoder))
    torch.testing.assert_close(gradients(terms.loss, vae.encoder), gradients(other.loss, vae.encoder))
    if len(list(vae.prior.parameters())):
        torch.testing.assert_close(gradients(terms.loss, vae.prior), gradients(one.loss, vae.prior))


def test_piwae_encoder_learns_from_groups_without_weight(vae, x, noise):
    """Samples whose weight in all of them underflows still count within their group."""
    noise = noise.clone()
    noise[:6] *= 200
    terms, other = piwae(vae, x, noise, 1.0, 2), miwae(vae, x, noise, 1.0, 2)
    torch.testing.assert_close(gradients(terms.loss, vae.encoder), gradients(other.loss, vae.encoder))


def test_terms_are_those_of_the_elbo(vae, x, noise):
    reference = elbo(vae, x, noise, 1.0)
    for terms in (ciwae(vae, x, noise, 1.0, 0.5), miwae(vae, x, noise, 1.0, 4), piwae(vae, x, noise, 1.0, 4)):
        for name in ("recon", "kl", "posterior"):
            torch.testing.assert_close(getattr(terms, name), getattr(reference, name))


@pytest.mark.parametrize("dimensions", (1, 2))
def test_mmd_equals_the_kernel_means_by_quadrature(dimensions):
    z = 1.3 * torch.randn(7, dimensions).double() + 0.4
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(40))
    points = torch.cartesian_prod(*[nodes] * dimensions).view(-1, dimensions)
    mass = torch.cartesian_prod(*[weights / weights.sum()] * dimensions).view(-1, dimensions).prod(1)

    def kernel(a, b):
        return torch.exp(-(torch.cdist(a, b) ** 2) / dimensions)

    within = sum(kernel(z[[i]], z[[j]]) for i in range(7) for j in range(7) if i != j) / 42
    wanted = within - 2 * (kernel(z, points) @ mass).mean() + mass @ kernel(points, points) @ mass
    torch.testing.assert_close(mmd_to_normal(z), wanted.squeeze())


def test_mmd_vanishes_for_samples_of_the_prior():
    estimates = torch.stack([mmd_to_normal(torch.randn(50, 4).double()) for _ in range(400)])
    assert estimates.mean().abs() < 4 * estimates.std() / 20
    assert mmd_to_normal(torch.randn(50, 4).double() + 1) > estimates.max()


def test_mmd_vae_adds_the_mmd_to_the_elbo(x, noise):
    vae = VAE(**SMALL).double()
    terms, reference = mmd_vae(vae, x, noise[:1], 0.3, 50.0), elbo(vae, x, noise[:1], 0.3)
    mmd = mmd_to_normal(vae.encode(x).rsample(noise[0]))
    torch.testing.assert_close(terms.loss, reference.loss + 50 * mmd)
    torch.testing.assert_close(terms.extra_terms["mmd"], mmd)
    alone = mmd_vae(vae, x[:1], noise[:1, :1], 0.3, 50.0)
    torch.testing.assert_close(alone.loss, elbo(vae, x[:1], noise[:1, :1], 0.3).loss)
