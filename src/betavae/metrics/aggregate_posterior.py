"""Measure the aggregate posterior of a trained VAE, and classify labels from its posterior means."""

import itertools
import math
import warnings

import torch
from torch import Tensor

from betavae.models.priors import Prior, StandardNormal, require_labels
from betavae.models.vae import VAE, Posterior

NEIGHBORS = 5  # of the nearest-neighbor classifier, which needs as many training images


@torch.no_grad()
def decompose_kl(posterior: Posterior, prior: Prior, seed: int = 0, chunk_size: int = 500) -> dict[str, float]:
    """Split the mean KL of N images into mutual information and marginal KL (Hoffman & Johnson 2016).

    Both depend on the aggregate posterior q(z) = 1/N sum_n q(z|x_n). Both are estimated with one sample z of each
    q(z|x_n) and the exact sum over n. The mutual information is at most log N. Where it comes near that limit, N images
    are too few to fill the latent space, and `marginal_kl` is far above its value for unseen images.

    Args:
        posterior: Of N images, in double precision.
        prior: p(z).
        seed: Seed of the samples z.
        chunk_size: Samples z that are compared with all N posteriors at once.

    Returns:
        In nats: `mutual_information` of z and the image number n, its limit log N as `mutual_information_limit`,
        `marginal_kl` = KL(q(z) || p(z)), and for p(z) = N(0, I) `moments_kl`, the KL of a normal distribution with the
        mean and covariance of q(z). The last is a lower bound of `marginal_kl` that does not suffer from few images.
    """
    mean, logvar = posterior
    n, dimensions = mean.shape
    z = posterior.rsample(torch.randn(n, dimensions, generator=torch.Generator().manual_seed(seed)).double())
    precision = torch.exp(-logvar)
    # sum_d (z - mean)^2 / var as two matrix products, for all pairs of z and n.
    constant = (mean**2 * precision + logvar).sum(1)
    log_q = torch.cat(
        [
            (-0.5 * (chunk**2 @ precision.T + constant) + chunk @ (mean * precision).T).logsumexp(1) - math.log(n)
            for chunk in z.split(chunk_size)
        ]
    )
    # Both as in log_q, without the constant that all three share.
    like = next(itertools.chain(prior.parameters(), prior.buffers()))
    log_p = prior.log_prob(z.to(like)).to(z) + 0.5 * dimensions * math.log(2 * math.pi)
    log_q_given_x = -0.5 * ((z - mean) ** 2 * precision + logvar).sum(1)
    centered = mean - mean.mean(0)
    covariance = centered.T @ centered / n + torch.diag(logvar.exp().mean(0))
    moments_kl = 0.5 * (covariance.trace() + (mean.mean(0) ** 2).sum() - dimensions - covariance.logdet())
    result = {
        "mutual_information": (log_q_given_x - log_q).mean().item(),
        "mutual_information_limit": math.log(n),
        "marginal_kl": (log_q - log_p).mean().item(),
    }
    return result | ({"moments_kl": moments_kl.item()} if isinstance(prior, StandardNormal) else {})


def decompose_kl_by_class(posterior: Posterior, vae: VAE, labels: Tensor | None) -> dict[str, float | bool]:
    """Average `decompose_kl` over the classes of a conditional model: it splits KL(q(z|x, y) || p(z|y)).

    Args:
        posterior: Of N images, in double precision.
        vae: The model.
        labels: `(N,)`. A class has the weight of its images.

    Raises:
        ValueError: If there are no labels.
    """
    labels = require_labels(labels)
    splits = []
    for label in labels.unique():
        rows = labels == label
        part = Posterior(*(values[rows] for values in posterior))
        split = decompose_kl(part, vae.given(label[None]).prior, seed=int(label))  # errors of one seed would add up
        splits.append((rows.double().mean().item(), split))
    return {name: sum(share * split[name] for share, split in splits) for name in splits[0][1]} | {"by_class": True}


@torch.no_grad()
def encode_means(vae: VAE, x: Tensor, labels: Tensor) -> Tensor:
    """Encode images `(N, C, H, W)` with labels to posterior means `(N, latent_dim)` on the CPU."""
    device, batches = next(vae.parameters()).device, zip(x.split(1000), labels.split(1000), strict=True)
    return torch.cat([vae.given(some).encode(batch.to(device)).mean.cpu() for batch, some in batches])


def probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """Classify posterior means `(N, D)`; return the test accuracy of 5 neighbors and of a linear model."""
    from sklearn.linear_model import LogisticRegression  # imported here, since it takes a second
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifiers = {
        "knn_accuracy": KNeighborsClassifier(NEIGHBORS, algorithm="brute"),
        "linear_accuracy": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    }
    x_train, y_train, x_test, y_test = (tensor.numpy() for tensor in (train, train_labels, test, test_labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of rare classes and of unfinished optimization
        return {
            name: float(classifier.fit(x_train, y_train).score(x_test, y_test))
            for name, classifier in classifiers.items()
        }
