import math

import pytest
import torch
from torch import distributions as D

from betavae.metrics import likelihood as bounds
from betavae.metrics.likelihood import (
    RNG_GROUP,
    PerImageBounds,
    count_decode_floats,
    evaluate_resumable,
    importance_bounds,
    standard_error,
    summarize,
)
from betavae.models.vae import VAE
from betavae.objectives import elbo, iwae
from tests.conftest import MODEL

KS = [1, 10, 100, 1000]


def compute_bounds(*args, **kwargs) -> PerImageBounds:
    return PerImageBounds.concat(list(importance_bounds(*args, **kwargs)))


@pytest.fixture
def linear():
    """Build probabilistic PCA (Tipping & Bishop 1999) as a VAE, with images and their exact log p(x).

    x = W z + b + scale * noise, so x ~ N(b, W W^T + scale^2 I). The columns of W are orthogonal, so that the exact
    posterior has independent dimensions, like the encoder's.
    """
    model = {"hidden_dims": [], "latent_dim": 3, "likelihood": "gaussian", "image_shape": [1, 3, 4]}
    vae = VAE(**MODEL | model).double().requires_grad_(False)
    w = torch.linalg.qr(torch.randn(12, 3).double()).Q * torch.tensor([3.0, 2.0, 0.7])
    scale, decoder, encoder = 0.5, vae.decoder[0], vae.encoder[1]
    decoder.weight.copy_(w)
    vae.likelihood.log_scale.fill_(math.log(scale))
    variance = 1 / (1 + (w**2).sum(0) / scale**2)
    encoder.weight.copy_(torch.cat(((w * variance / scale**2).T, torch.zeros(3, 12))))
    encoder.bias.copy_(torch.cat((-encoder.weight[:3] @ decoder.bias, variance.log())))
    covariance = w @ w.T + scale**2 * torch.eye(12)
    x = D.MultivariateNormal(decoder.bias, covariance).sample((300,))
    log_px = D.MultivariateNormal(decoder.bias, covariance).log_prob(x)
    return vae, x.view(-1, 1, 3, 4), log_px


def test_bounds_are_exact_for_the_exact_posterior(linear):
    vae, x, log_px = linear
    nll = compute_bounds(vae, x, [1, 7, 20]).nll
    torch.testing.assert_close(nll, -log_px.unsqueeze(1).expand(-1, 3), rtol=1e-5, atol=1e-5)


def test_bounds_tighten_to_the_exact_likelihood(linear):
    vae, x, log_px = linear
    vae.encoder[1].bias[:3] += 0.3 * torch.tensor([0.2, -0.3, 0.5])
    vae.encoder[1].bias[3:] += torch.tensor([0.3, -0.2, 0.4])
    result = compute_bounds(vae, x, KS)
    gap = result.nll + log_px.unsqueeze(1)
    # K = 1 is the ELBO: -log p(x) + KL(q || exact posterior), here known in closed form.
    exact_mean, exact_variance = result.mean - torch.tensor([0.06, -0.09, 0.15]), result.logvar.exp()
    exact_variance = exact_variance / torch.tensor([0.3, -0.2, 0.4]).exp()
    posterior = D.Normal(exact_mean, exact_variance.sqrt())
    kl = D.kl_divergence(D.Normal(result.mean, (0.5 * result.logvar).exp()), posterior).sum(1)
    neg_elbo = result.recon + result.kl.sum(1)
    assert kl.mean() > 0.05
    for estimate in (gap[:, 0], neg_elbo + log_px):
        error = estimate - kl
        assert error.mean().abs() < 5 * standard_error(error)
    assert (gap.diff(dim=1) <= 1e-9).all()  # tighter for every image
    assert gap[:, 1].mean() < 0.5 * gap[:, 0].mean()
    assert gap[:, -1].mean().abs() < 1e-3 < gap[:, 0].mean()
    # The standard error is that of the mean over these images, as an estimate of the mean over all images.
    expected = 0.5 * torch.logdet(
        2 * math.pi * math.e * D.MultivariateNormal(torch.zeros(12).double(), covariance(vae)).covariance_matrix
    )
    nll = summarize(vae, result, KS)["nll_1000"]
    assert abs(nll["mean"] - expected) < 4 * nll["se"] and 0.05 < nll["se"] < 0.3


def covariance(vae):
    w = vae.decoder[0].weight
    return w @ w.T + (2 * vae.likelihood.log_scale).exp() * torch.eye(len(w))


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous_bernoulli", "gaussian"])
def test_bounds_agree_with_an_independent_slow_formula(likelihood):
    vae = VAE(**MODEL | {"hidden_dims": [9], "latent_dim": 5, "likelihood": likelihood, "image_shape": [1, 4, 5]})
    vae = vae.double().requires_grad_(False)
    x, samples = torch.rand(RNG_GROUP + 3, 1, 4, 5).double(), 12
    result = compute_bounds(vae, x, [1, 5, 12], seed=3)
    posterior = D.Normal(vae.encode(x).mean, (0.5 * vae.encode(x).logvar).exp())
    for image in (0, 1, RNG_GROUP - 1, RNG_GROUP, RNG_GROUP + 2):
        group, row = divmod(image, RNG_GROUP)
        noise = torch.randn(samples, RNG_GROUP, 5, generator=torch.Generator().manual_seed(3 + 1_000_003 * group))[
            :, row
        ]
        q = D.Normal(posterior.mean[image], posterior.stddev[image])
        log_px, weights = [], []
        for draw in noise.double():
            z = q.mean + q.stddev * draw
            params = vae.decoder(z.unsqueeze(0))[0]
            p = {
                "bernoulli": lambda params: D.Bernoulli(logits=params, validate_args=False),
                "continuous_bernoulli": lambda params: D.ContinuousBernoulli(logits=params),
                "gaussian": lambda params: D.Normal(params, 1.0),
            }[likelihood](params)
            log_px.append(p.log_prob(x[image]).sum())
            weights.append((log_px[-1] + D.Normal(0.0, 1.0).log_prob(z).sum() - q.log_prob(z).sum()).exp())
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(result.recon[image], -sum(log_px) / samples, **close)
        torch.testing.assert_close(result.nll[image, 0], -sum(w.log() for w in weights) / samples, **close)
        torch.testing.assert_close(result.nll[image, 2], -(sum(weights) / samples).log(), **close)
        fives = [sum(weights[i : i + 5]) / 5 for i in (0, 5)]  # the last two samples do not fill a group
        torch.testing.assert_close(result.nll[image, 1], -(fives[0].log() + fives[1].log()) / 2, **close)
        kl = D.kl_divergence(q, D.Normal(0.0, 1.0))
        torch.testing.assert_close(result.kl[image], kl, **close)


def test_bounds_do_not_depend_on_chunks_or_other_images():
    vae, x = VAE(**MODEL).requires_grad_(False), torch.rand(75, 1, 28, 28).round()
    results = [compute_bounds(vae, x, [1, 50, 130], memory_mb=size) for size in (1, 3, 500)]
    results.append(compute_bounds(vae, x[:40], [1, 50, 130]))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one[: len(two)], two, rtol=1e-6, atol=1e-4)
    assert not torch.equal(results[0].nll, compute_bounds(vae, x, [1, 50, 130], seed=1).nll)
    # A start at a later image gives the rest of the same bounds.
    rest = compute_bounds(vae, x, [1, 50, 130], start=2 * RNG_GROUP)
    for one, two in zip(results[0], rest, strict=True):
        torch.testing.assert_close(one[2 * RNG_GROUP :], two, rtol=1e-6, atol=1e-4)
    # The objectives give the same values for the same noise.
    noise = torch.randn(130, RNG_GROUP, 20, generator=torch.Generator().manual_seed(0))
    first = [part[:RNG_GROUP] for part in results[0]]
    torch.testing.assert_close(first[2][:, 2].mean().float(), iwae(vae, x[:RNG_GROUP], noise, 1.0).loss)
    terms = elbo(vae, x[:RNG_GROUP], noise, 1.0)
    torch.testing.assert_close((first[0].mean() + first[1].sum(1).mean()).float(), terms.loss)


def test_kl_per_dimension_is_to_the_prior_of_the_label():
    torch.manual_seed(0)
    prior = {"name": "mixture", "components": 2}
    vae = VAE(**MODEL | {"latent_dim": 2, "prior": prior, "classes": ["a", "b"]}).requires_grad_(False)
    vae.prior.mean.copy_(torch.tensor([[-3.0, 1.0], [5.0, 0.0]]))
    vae.prior.log_weights.copy_(100 * torch.eye(2))
    x, labels = torch.rand(6, *vae.image_shape), torch.tensor([0, 1, 1, 0, 1, 1])
    groups = [*importance_bounds(vae, x, [1], 0, labels=labels)]
    per_image = PerImageBounds(*map(torch.cat, zip(*groups, strict=True)))
    mean, logvar = vae.given(labels).encode(x)
    priors = D.Normal(vae.prior.mean[labels], vae.prior.log_scale.exp()[labels])
    wanted = D.kl_divergence(D.Normal(mean, (0.5 * logvar).exp()), priors).mean(0)
    found = summarize(vae, per_image, [1], labels)["kl_per_dimension"]
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-3, atol=1e-3)


def test_decode_floats_count_every_layer_output():
    """Count 400 numbers before and after the activation, the logits, unflattened, and four more of them."""
    floats = count_decode_floats(VAE(**MODEL))
    assert floats == 4 * 784 + 400 + 400 + 784 + 784
    # Of a mixture, four numbers of 8 bytes per component.
    assert count_decode_floats(VAE(**MODEL, prior={"name": "mixture", "components": 500})) == floats + 4000


def test_the_first_group_is_saved_and_not_computed_again(tmp_path, monkeypatch, capsys):
    vae, x = VAE(**MODEL).requires_grad_(False), torch.rand(2 * RNG_GROUP, 1, 28, 28)
    arguments = (vae, x, [1, 5], 0, 500, tmp_path / "partial", {"k": [1, 5]})

    def stop_after_one(*args, **kwargs):
        yield next(importance_bounds(*args, **kwargs))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bounds, "importance_bounds", stop_after_one)
        evaluate_resumable(*arguments)
    resumed = evaluate_resumable(*arguments)
    assert f"resuming after the {RNG_GROUP} images" in capsys.readouterr().out
    for one, two in zip(resumed, compute_bounds(vae, x, [1, 5]), strict=True):
        assert torch.equal(one, two)
