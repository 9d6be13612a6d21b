"""Anomaly scores of images under a trained VAE; a higher score is more anomalous.

The score of an image does not depend on the other images: all share the noise of the posterior samples. Images `x` are
`(N, C, H, W)` in [0, 1].
"""

import math
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from betavae.models.vae import VAE, Posterior
from betavae.objectives import elbo
from betavae.objectives.importance_weighted import log_mean_exp, log_prior_over_posterior


class OneClassSVM(TypedDict):
    """A fitted one-class SVM with a Gaussian kernel: S support vectors in D dimensions."""

    vectors: Tensor  # (S, D)
    weights: Tensor  # (S,)
    offset: float
    gamma: float


class GaussianMixture(TypedDict):
    """A fitted Gaussian mixture of K components in D dimensions."""

    weights: Tensor  # (K,)
    means: Tensor  # (K, D)
    roots: Tensor  # (K, D, D), each times its transpose is a precision matrix


def antithetic_noise(vae: VAE, pairs: int) -> Tensor:
    """Draw fixed noise `(2 * pairs, 1, latent_dim)` in antithetic pairs.

    It has variance 1 in each dimension.
    """
    noise = torch.randn(pairs, 1, vae.latent_dim, generator=torch.Generator().manual_seed(0))
    noise = noise / noise.square().mean(0).sqrt()
    return torch.cat((noise, -noise)).to(next(vae.parameters()))


def neg_elbo(vae: VAE, x: Tensor) -> Tensor:
    """Estimate the negative ELBO from eight posterior samples, `(N,)` in nats (Kingma & Welling 2014)."""
    terms = elbo(vae, x, antithetic_noise(vae, 4).expand(-1, len(x), -1), 1.0)
    return terms.recon + terms.kl.sum(1)


def nll(vae: VAE, x: Tensor, pairs: int = 32) -> Tensor:
    """Bound -log p(x) by importance weighting of 2 * pairs samples, `(N,)` in nats (Burda et al. 2016)."""
    posterior, z, params = vae(x, antithetic_noise(vae, pairs).expand(-1, len(x), -1))
    return -log_mean_exp(vae.likelihood.log_prob(x, params) + log_prior_over_posterior(vae, z, posterior))


def likelihood_regret(vae: VAE, x: Tensor, steps: int = 50, lr: float = 0.1) -> Tensor:
    """Compute the likelihood regret, `(N,)` in nats, at least 0 (Xiao, Yan & Amit 2020).

    It is the gain in ELBO from optimizing the posterior mean and log-variance of each image with Adam, starting at the
    encoder's output, with a fixed decoder and fixed noise. The best step counts. (The paper optimizes the whole encoder
    for each image; this optimizes the encoder's two output vectors for all images at once.)
    """
    noise = antithetic_noise(vae, 4)
    bounds = []
    with torch.enable_grad():
        mean, logvar = (part.detach().clone().requires_grad_() for part in vae.encode(x))
        optimizer = torch.optim.Adam([mean, logvar], lr)
        for _ in range(steps + 1):
            posterior = Posterior(mean, logvar)
            z = posterior.rsample(noise)
            log_px = vae.likelihood.log_prob(x, vae.decode_params(z)).mean(0)
            bound = log_px - vae.kl(posterior, z).sum(1)
            bounds.append(bound.detach())
            mean.grad, logvar.grad = torch.autograd.grad(-bound.sum(), [mean, logvar])
            optimizer.step()
    return torch.stack(bounds).amax(0) - bounds[0]


def unexplained_nats(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Return KL(Bernoulli(x) || Bernoulli(reconstruction)) summed over pixels, `(N,)` in nats.

    It is the cross-entropy minus the entropy of the pixels themselves, for which the model is not responsible. It
    applies to any likelihood. Means are clamped to [0.001, 0.999].
    """
    near, mean = x.clamp(0.001, 0.999), reconstruction.clamp(0.001, 0.999)
    pixels = F.binary_cross_entropy(mean, near, reduction="none") - F.binary_cross_entropy(near, near, reduction="none")
    return pixels.sum((1, 2, 3))


def statistics(vae: VAE, x: Tensor, is_unit: bool = True) -> Tensor:
    """Compute eight statistics of encoder and decoder, `(N, 8)`, as in Morningstar et al. 2021.

    They are the neg. ELBO, recon, KL, |mean|^2, the sum of the posterior variances, the sum of the posterior
    log-variances, and the squared error and `unexplained_nats` of the reconstruction; the last one only if `x` is in
    [0, 1].
    """
    posterior = vae.encode(x)
    mean, logvar = posterior
    reconstruction = vae.decode(mean)
    kl = vae.kl(posterior, posterior.rsample(antithetic_noise(vae, 4))).sum(1)
    bound = neg_elbo(vae, x)
    squares = (x - reconstruction).square().sum((1, 2, 3))
    rows: tuple[Tensor, ...] = (
        bound,
        bound - kl,
        kl,
        mean.square().sum(1),
        logvar.exp().sum(1),
        logvar.sum(1),
        squares,
    )
    if is_unit:
        rows += (unexplained_nats(x, reconstruction),)
    return torch.stack(rows, 1).double()


def kernel_density(values: Tensor, at: Tensor) -> Tensor:
    """Estimate the log-density of each column separately, with a normal kernel and Scott's bandwidth.

    Args:
        values: The points of the density, `(M, S)`.
        at: Where to evaluate it, `(N, S)`.

    Returns:
        Log-densities `(N, S)`.
    """
    width = (values.std(0) * len(values) ** -0.2).clamp(min=1e-9)
    scaled, centers = at / width, values / width
    logs = [(-0.5 * (a[:, None] - c).square()).logsumexp(1) for a, c in zip(scaled.T, centers.T, strict=True)]
    return torch.stack(logs, 1) - torch.log(len(values) * math.sqrt(2 * math.pi) * width)


def svm_decision(svm: OneClassSVM, at: Tensor) -> Tensor:
    """Evaluate the `decision_function` of a scikit-learn `OneClassSVM` for rows `at`, `(N,)`.

    It is positive for inliers.
    """
    distances = torch.cdist(at, svm["vectors"], compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.exp(-svm["gamma"] * distances) @ svm["weights"] + svm["offset"]


def mixture_log_density(mixture: GaussianMixture, at: Tensor) -> Tensor:
    """Compute the log-density `(N,)` of rows `at` under a Gaussian mixture with full covariances."""
    roots = mixture["roots"]
    distances = (at @ roots - (mixture["means"][:, None] @ roots)).square().sum(2)  # (K, N)
    logs = mixture["weights"].log() + roots.diagonal(dim1=1, dim2=2).log().sum(1)
    return (logs[:, None] - 0.5 * distances).logsumexp(0) - 0.5 * at.shape[1] * math.log(2 * math.pi)


def latent_and_unexplained(vae: VAE, x: Tensor, background: float | None) -> tuple[Tensor, Tensor]:
    """Compute the posterior means `(N, latent_dim)`, and `unexplained_nats` per unit of ink `(N,)`.

    Ink is the difference from `background`, the most frequent gray level of the training images. Without one, for
    values that are not in [0, 1] and for tables, it is -log p(x|z) at the posterior mean instead.
    """
    mean = vae.encode(x).mean
    if background is None:
        return mean.double(), -vae.likelihood.log_prob(x, vae.decode_params(mean)).double()
    ink = (x - background).abs().sum((1, 2, 3)).clamp(min=1)
    return mean.double(), (unexplained_nats(x, vae.decode(mean)) / ink).double()


def pixel_surprise(vae: VAE, x: Tensor) -> Tensor:
    """Compute -log p(x|z) at the posterior mean for each pixel, summed over channels: `(N, H, W)` in nats.

    For a table it is that of each column, `(N, C, 1)`: the columns become the rows of an image. Each pixel is passed to
    the likelihood as an image of its own, since pixels are independent given z.
    """

    def split_pixels(images: Tensor) -> Tensor:
        return images.movedim(1, 3).flatten(0, 2)[..., None, None]

    params = vae.decode_params(vae.encode(x).mean)
    if x.shape[2:] == (1, 1):
        x, params = x.unflatten(1, (1, -1)).squeeze(3), params.unflatten(1, (-1, x.shape[1])).squeeze(3)
    return -vae.likelihood.log_prob(split_pixels(x), split_pixels(params)).view(len(x), *x.shape[2:])
