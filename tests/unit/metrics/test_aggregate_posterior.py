import math

import pytest
import torch
from torch import distributions as D

from betavae.metrics.aggregate_posterior import decompose_kl, encode_means, probe_accuracy
from betavae.models.priors import StandardNormal
from betavae.models.vae import VAE, Posterior
from tests.conftest import MODEL


def test_probes_find_separable_labels_only():
    means, labels = torch.randn(300, 3), torch.arange(300) % 3
    apart = means + 20 * torch.nn.functional.one_hot(labels, 3)
    assert probe_accuracy(apart[:200], labels[:200], apart[200:], labels[200:]) == {
        "knn_accuracy": 1,
        "linear_accuracy": 1,
    }
    chance = probe_accuracy(means[:200], labels[:200], means[200:], labels[200:])
    assert all(0.1 < accuracy < 0.6 for accuracy in chance.values())
    vae, x = VAE(**MODEL), torch.rand(1003, 1, 28, 28)
    torch.testing.assert_close(encode_means(vae, x, torch.zeros(len(x))), vae.encode(x).mean)


def test_kl_parts_match_a_known_aggregate_posterior():
    n, d = 4000, 2
    torch.manual_seed(1)  # `decompose_kl` draws z with seed 0
    mean = torch.randn(n, d).double() * torch.tensor([1.2, 0.3]) + torch.tensor([0.5, 0.0])
    logvar = torch.tensor([0.2, 0.5]).double().log().expand(n, d)
    result = decompose_kl(Posterior(mean, logvar), StandardNormal(d).double())
    # The aggregate posterior is close to normal, with these variances.
    variance = torch.tensor([1.2**2 + 0.2, 0.3**2 + 0.5])
    wanted = 0.5 * (variance - 1 - variance.log()).sum() + 0.5 * 0.5**2
    assert result["moments_kl"] == pytest.approx(wanted.item(), abs=0.06)
    covariance = mean.T.cov(correction=0) + torch.diag(logvar.exp()[0])
    normal = D.MultivariateNormal(mean.mean(0), covariance)
    standard = D.MultivariateNormal(torch.zeros(d).double(), torch.eye(d).double())
    assert result["moments_kl"] == pytest.approx(D.kl_divergence(normal, standard).item())
    assert result["marginal_kl"] == pytest.approx(wanted.item(), abs=0.06)
    information = 0.5 * (1 + torch.tensor([1.2**2 / 0.2, 0.3**2 / 0.5])).log().sum()
    assert result["mutual_information"] == pytest.approx(information.item(), abs=0.06)
    # Posteriors that do not overlap identify the image.
    apart = decompose_kl(
        Posterior(1000 * torch.randn(50, d).double(), torch.zeros(50, d).double()), StandardNormal(d).double()
    )
    assert apart["mutual_information"] == pytest.approx(math.log(50), abs=1e-6)
