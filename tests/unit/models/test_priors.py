import copy
import math

import pytest
import torch
from torch import distributions as D

from betavae.errors import UserError
from betavae.metrics.aggregate_posterior import decompose_kl, decompose_kl_by_class
from betavae.metrics.likelihood import PerImageBounds, importance_bounds
from betavae.models.priors import PRIORS, Flow, Mixture, StandardNormal, VampPrior
from betavae.models.vae import VAE, Posterior
from betavae.objectives import check_prior, dreg, elbo, iwae
from betavae.objectives.disentangling import capacity_vae
from tests.conftest import MODEL

SMALL = MODEL | {"hidden_dims": [16], "latent_dim": 3, "image_shape": [1, 3, 4]}
LEARNED = {
    "mixture": {"components": 5},
    "vamp": {"components": 5},
    "flow": {"transforms": 4, "hidden_dims": [16]},
}


def build_vae(prior: str, **model) -> VAE:
    """Build a small VAE in double precision, whose prior is far from N(0, I)."""
    settings = {"name": prior} | LEARNED.get(prior, {})
    vae = VAE(**SMALL | model, prior=settings).double()
    with torch.no_grad():
        for parameter in vae.prior.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return vae


@pytest.mark.forked
def test_mixture_of_one_standard_normal_is_the_standard_prior():
    standard, mixture = (VAE(**SMALL, prior={"name": name} | more).double() for name, more in NAMED_PRIORS)
    mixture.load_state_dict(standard.state_dict(), strict=False)
    torch.nn.init.zeros_(mixture.prior.mean)
    x, noise = torch.rand(8, 1, 3, 4).double(), torch.randn(6, 8, 3).double()
    for objective, settings in ((elbo, {"free_bits": 0.3}), (iwae, {}), (dreg, {}), (capacity_vae, {"gamma": 3.0})):
        one, other = (objective(vae, x, noise, 0.7, **settings) for vae in (standard, mixture))
        for name in ("loss", "recon", "kl"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name))
        gradients = [
            torch.autograd.grad(terms.loss, vae.encoder[1].weight) for terms, vae in ((one, standard), (other, mixture))
        ]
        torch.testing.assert_close(*gradients)
    bounds = [PerImageBounds.concat(list(importance_bounds(vae, x, [1, 50]))) for vae in (standard, mixture)]
    for one, other in zip(*bounds, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(standard.neg_elbo(x, noise), mixture.neg_elbo(x, noise))
    posterior = Posterior(*bounds[0][3:])
    splits = [decompose_kl(posterior, vae.prior) for vae in (standard, mixture)]
    assert splits[1]["marginal_kl"] == pytest.approx(splits[0]["marginal_kl"])
    torch.testing.assert_close(standard.prior.moments(), mixture.prior.moments())


NAMED_PRIORS = (("standard", {}), ("mixture", {"components": 1}))


CASES = [*((name, None) for name in PRIORS), *((name, label) for name in ("mixture", "flow") for label in (0, 2))]


def build_prior(name: str, label: int | None):
    """Build p(z) in two dimensions, or with a label p(z|y) of three classes."""
    vae = build_vae(name, latent_dim=2, classes=None if label is None else "abc")
    return vae.prior if label is None else vae.given(torch.tensor([label])).prior


@pytest.mark.parametrize(("name", "label"), CASES)
def test_density_integrates_to_one_in_two_dimensions(name, label):
    prior = build_prior(name, label)
    axis = torch.linspace(-12, 12, 481, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    total = prior.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize(("name", "label"), CASES)
@torch.no_grad()
def test_samples_have_the_moments_of_the_density(name, label):
    prior = build_prior(name, label)
    axis = torch.linspace(-12, 12, 481, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    density = prior.log_prob(grid).exp()
    density /= density.sum()
    mean = density @ grid
    std = (density @ (grid - mean) ** 2).sqrt()
    z = prior.sample(40_000, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(z.std(0), std, rtol=0.03, atol=0)
    found = [part.double() for part in prior.moments()]
    torch.testing.assert_close(found[0], mean, rtol=0, atol=0.05)
    torch.testing.assert_close(found[1], std, rtol=0.05, atol=0)


@pytest.mark.parametrize("labels", (7, [7], torch.tensor(7)))
def test_labels_are_a_tensor_of_one_dimension(labels):
    with pytest.raises(TypeError, match=r"in vae.given\(torch.tensor\(\[7\]\)\)"):
        build_vae("flow", classes="abc").given(labels)


@pytest.mark.parametrize("name", ("mixture", "flow"))
@torch.no_grad()
def test_each_label_has_its_own_prior(name):
    vae, labels = build_vae(name, classes="abc"), torch.tensor([2, 0, 0, 1])
    if name == "mixture":  # far apart
        vae.prior.mean.mul_(10)
        vae.prior.log_weights.mul_(5)
    x, noise = torch.rand(4, 1, 3, 4).double(), torch.randn(5, 4, 3).double()
    together = vae.given(labels).prior
    alone = [vae.given(label[None]).prior for label in labels]
    wanted = torch.stack([prior.log_prob(noise[:, i]) for i, prior in enumerate(alone)], 1)
    torch.testing.assert_close(together.log_prob(noise), wanted)
    assert (alone[0].log_prob(noise[:, 1]) - alone[1].log_prob(noise[:, 1])).abs().min() > 1e-3
    drawn = together.transform(noise[0], torch.full((4,), 0.4))
    for i, prior in enumerate(alone):
        torch.testing.assert_close(drawn[[i]], prior.transform(noise[0, [i]], torch.full((1,), 0.4)))
    moments = [vae.given(torch.tensor([label])).prior.moments() for label in range(3)]
    for label, (mean, std) in enumerate(moments):
        drawn = vae.given(torch.tensor([label])).prior.sample(20_000, generator=torch.Generator().manual_seed(1))
        assert ((drawn.mean(0) - mean).abs() < 0.05 * std).all()
    means = torch.stack([mean for mean, _ in moments])
    assert ((means[0] - means[2]).abs() > 0.1 * std).any()
    assert ((vae.prior.moments()[0] - means.mean(0)).abs() < 0.05 * std).all()  # all classes alike
    # The bound of an image is that under the prior of its label.
    bounds = PerImageBounds.concat(list(importance_bounds(vae, x, [3], labels=labels)))
    for i, label in enumerate(labels):
        draws = torch.randn(3, 32, 3, generator=torch.Generator().manual_seed(0))[:, [i]].double()
        torch.testing.assert_close(bounds.nll[i, 0], iwae(vae.given(label[None]), x[[i]], draws, 1.0).loss)
    with pytest.raises(ValueError, match="needs the labels"):
        vae.prior.log_prob(noise)
    assert vae.prior.labels is None and vae.labels is None


def test_conditional_prior_is_compiled_with_its_labels():
    vae, labels = build_vae("flow", classes="abc"), torch.tensor([2, 0, 0, 1])
    compiled = torch.compile(lambda z, labels: vae.given(labels).prior.log_prob(z), backend="eager", fullgraph=True)
    z = torch.randn(4, 3).double()
    torch.testing.assert_close(compiled(z, labels), vae.given(labels).prior.log_prob(z))


@torch.no_grad()
def test_kl_is_split_within_the_classes():
    """With the aggregate posterior of each class as p(z|y), the whole KL is mutual information."""
    vae = VAE(**SMALL, prior={"name": "mixture", "components": 9}, classes="ab").double()
    labels = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0, 0])
    mean, logvar = vae.given(labels).encode(3 * torch.rand(9, 1, 3, 4).double())
    vae.prior.mean.copy_(mean)
    vae.prior.log_scale.copy_(0.5 * logvar)
    vae.prior.log_weights.copy_(torch.where(labels == torch.tensor([[0], [1]]), 0.0, -1000.0))
    split = decompose_kl_by_class(Posterior(mean, logvar), vae, labels)
    assert split["marginal_kl"] == pytest.approx(0, abs=1e-9) and split["by_class"]
    # Where each posterior is the prior of its label, no dimension is used.
    vae.prior.mean.copy_(torch.where(torch.arange(9)[:, None] < 5, 2.0, -1.0))
    vae.prior.log_scale.zero_()
    vae.prior.log_weights.copy_(torch.where((torch.arange(9) < 5) == torch.tensor([[True], [False]]), 0.0, -1000.0))
    collapsed = Posterior(torch.where(labels[:, None] == 0, 2.0, -1.0).expand(9, 3).double(), torch.zeros_like(mean))
    torch.testing.assert_close(vae.given(labels).kl_per_dimension(collapsed), torch.zeros_like(mean))
    assert split["mutual_information_limit"] == pytest.approx((6 * math.log(6) + 3 * math.log(3)) / 9)


def test_classes_have_samples_of_their_own():
    vae, (mean, logvar) = build_vae("standard", classes="ab"), torch.randn(2, 5, 3).double()
    twice = Posterior(mean.repeat(2, 1), logvar.repeat(2, 1))
    split = decompose_kl_by_class(twice, vae, torch.arange(2).repeat_interleave(5))
    parts = [decompose_kl(Posterior(mean, logvar), vae.prior, seed=seed)["marginal_kl"] for seed in (0, 1)]
    assert split["marginal_kl"] == pytest.approx(sum(parts) / 2) and parts[0] != parts[1]


def test_mixture_equals_torch_distributions():
    prior = build_vae("mixture").prior
    parts = D.Independent(D.Normal(prior.mean, prior.log_scale.exp()), 1)
    wanted = D.MixtureSameFamily(D.Categorical(logits=prior.log_weights), parts)
    z = 3 * torch.randn(4, 7, 3).double()
    torch.testing.assert_close(prior.log_prob(z), wanted.log_prob(z))


def test_narrow_mixture_keeps_its_digits_in_single_precision():
    prior = Mixture(40, 50)
    with torch.no_grad():
        prior.mean.mul_(10)
        prior.log_scale.fill_(math.log(1e-3))
        z = prior.mean[:8] + 1e-3 * torch.randn(8, 40)
    parts = D.Independent(D.Normal(prior.mean.double(), prior.log_scale.double().exp()), 1)
    wanted = D.MixtureSameFamily(D.Categorical(logits=prior.log_weights.double()), parts)
    torch.testing.assert_close(prior.log_prob(z).double(), wanted.log_prob(z.double()), rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(prior.log_prob(z).double(), wanted.log_prob(z.double()), rtol=1e-5, atol=0)


def test_weights_of_a_label_keep_their_digits():
    prior = build_vae("mixture", classes="abc").prior.float().given(torch.tensor([2, 0]))
    with torch.no_grad():
        prior.log_weights.mul_(20)
    z = torch.randn(2, 3)
    wanted = prior.log_prob(z)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(prior.log_prob(z), wanted, rtol=1e-6, atol=0)


def test_vamp_with_all_data_is_the_aggregate_posterior():
    vae = VAE(**SMALL, prior={"name": "vamp", "components": 9}).double()
    x = torch.rand(9, 1, 3, 4).double()
    assert isinstance(vae.prior, VampPrior)
    vae.prior.init_from_images(x)
    mean, logvar = vae.encode(x)
    parts = D.Independent(D.Normal(mean, (0.5 * logvar).exp()), 1)
    wanted = D.MixtureSameFamily(D.Categorical(torch.ones(9).double()), parts)
    z = torch.randn(50, 3).double()
    torch.testing.assert_close(vae.prior.log_prob(z), wanted.log_prob(z))
    # The whole KL is mutual information.
    split = decompose_kl(Posterior(mean.detach(), logvar.detach()), vae.prior)
    assert split["marginal_kl"] == pytest.approx(0, abs=1e-9)


@pytest.mark.forked
def test_flow_density_follows_from_its_jacobian():
    prior = build_vae("flow").prior
    assert isinstance(prior, Flow)

    def to_noise(z):
        for layer in prior.layers:
            z = layer(z)[0]
        return z

    for z in prior.sample(5).double():
        jacobian = torch.autograd.functional.jacobian(lambda z: to_noise(z[None])[0], z)
        wanted = D.Normal(0.0, 1.0).log_prob(to_noise(z[None])[0]).sum() + jacobian.slogdet().logabsdet
        torch.testing.assert_close(prior.log_prob(z[None])[0], wanted)


@pytest.mark.parametrize("labels", [None, [0, 2]])
def test_flow_runs_in_bfloat16(labels):
    torch.manual_seed(0)
    exact, z = build_vae("flow", classes="abc" if labels else None).float(), torch.randn(2, 3)
    reduced = copy.deepcopy(exact).bfloat16()
    given = None if labels is None else torch.tensor(labels)
    wanted, found = (vae.given(given).prior.log_prob(z) for vae in (exact, reduced))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("latent_dim", (2, 5))
def test_new_flow_is_the_standard_normal(latent_dim):
    flow, z = Flow(latent_dim, 3, [8]), torch.randn(4, 6, latent_dim)
    torch.testing.assert_close(flow.log_prob(z), StandardNormal(latent_dim).log_prob(z))


@pytest.mark.parametrize("name", LEARNED)
def test_elbo_equals_its_terms_at_the_samples(name):
    vae, x, noise = build_vae(name), torch.rand(8, 1, 3, 4).double(), torch.randn(20_000, 8, 3).double()
    with torch.no_grad():
        terms = elbo(vae, x, noise, 0.5)
        posterior = vae.encode(x)
        normal = D.Independent(D.Normal(posterior.mean, (0.5 * posterior.logvar).exp()), 1)
        z = posterior.rsample(noise)
        kl = (normal.log_prob(z) - vae.prior.log_prob(z)).mean(0)
        torch.testing.assert_close(terms.kl.sum(1), kl, rtol=0, atol=0.05)
        torch.testing.assert_close(terms.loss, (terms.recon + 0.5 * terms.kl.sum(1)).mean())
        torch.testing.assert_close(vae.neg_elbo(x, noise), terms.recon + terms.kl.sum(1))
        bound = iwae(vae, x, noise[:1], 1.0)
        wanted = normal.log_prob(z[0]) - vae.prior.log_prob(z[0]) - vae.likelihood.log_prob(x, vae.decode_params(z[0]))
        torch.testing.assert_close(bound.loss, wanted.mean())


@pytest.mark.forked
@pytest.mark.parametrize("name", LEARNED)
def test_every_parameter_of_a_prior_is_trained(name):
    vae = build_vae(name)
    elbo(vae, torch.rand(8, 1, 3, 4).double(), torch.randn(1, 8, 3).double(), 1.0).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in vae.prior.parameters())


@torch.no_grad()
def test_bounds_reach_the_likelihood_under_a_known_mixture():
    """x = W z + b + scale * noise with z from a mixture of Gaussians: x has a mixture of Gaussians as its density."""
    model = {"hidden_dims": [], "likelihood": "gaussian"}
    vae = VAE(**SMALL | model, prior={"name": "mixture", "components": 2}).double()
    assert isinstance(vae.prior, Mixture)
    vae.prior.mean.copy_(torch.tensor([[1.0, -1.0, 0.5], [-1.0, 0.5, 0.0]]))
    vae.prior.log_scale.copy_(torch.tensor([[-0.5, 0.0, -1.0], [0.2, -0.3, 0.0]]))
    vae.prior.log_weights.copy_(torch.tensor([0.7, 0.3]).log())
    w, scale = torch.linalg.qr(torch.randn(12, 3).double()).Q * torch.tensor([1.5, 1.0, 0.7]), 0.5
    vae.decoder[0].weight.copy_(w)
    vae.likelihood.log_scale.fill_(math.log(scale))
    # The encoder is the posterior under N(0, I): near enough for importance sampling.
    variance = 1 / (1 + (w**2).sum(0) / scale**2)
    vae.encoder[1].weight.copy_(torch.cat(((w * variance / scale**2).T, torch.zeros(3, 12))))
    vae.encoder[1].bias.copy_(torch.cat((-vae.encoder[1].weight[:3] @ vae.decoder[0].bias, variance.log())))
    covariances = w @ torch.diag_embed((2 * vae.prior.log_scale).exp()) @ w.T + scale**2 * torch.eye(12)
    parts = D.MultivariateNormal(vae.prior.mean @ w.T + vae.decoder[0].bias, covariances)
    density = D.MixtureSameFamily(D.Categorical(logits=vae.prior.log_weights), parts)
    x = density.sample((200,))
    result = PerImageBounds.concat(list(importance_bounds(vae, x.view(-1, 1, 3, 4), [1, 2000])))
    torch.testing.assert_close(result.nll[:, 1], -density.log_prob(x), rtol=0, atol=0.1)
    assert (result.nll[:, 1] + density.log_prob(x)).mean().item() == pytest.approx(0, abs=2e-3)
    assert result.nll[:, 0].mean() > result.nll[:, 1].mean() + 0.1
    torch.testing.assert_close(result.nll[:, 0].mean(), (result.recon + result.kl[:, 0]).mean(), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("objective", "setting"),
    (
        ({"name": "beta_tcvae"}, "objective=beta_tcvae"),
        ({"name": "dip_vae"}, "objective=dip_vae"),
        ({"name": "elbo", "kl_decomposition": True}, "objective.kl_decomposition"),
        ({"name": "elbo", "free_bits": 0.1}, "objective.free_bits"),
    ),
)
def test_objectives_of_the_standard_prior_are_rejected(objective, setting):
    check_prior(objective, "standard")
    with pytest.raises(UserError, match=f"{setting} needs prior=standard: .+"):
        check_prior(objective, "flow")


def test_flow_in_one_dimension_is_rejected():
    with pytest.raises(UserError, match="prior=flow needs model"):
        VAE(**SMALL | {"latent_dim": 1}, prior={"name": "flow", "transforms": 2, "hidden_dims": [4]})
