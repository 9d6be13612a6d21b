"""How strange an image is to a trained VAE: a number per image, higher: stranger.

A score depends on its image alone: the noise of the posterior's samples is the same for all images. Images `x` are
`(N, C, H, W)` in [0, 1].
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from betavae.models.vae import VAE, Posterior
from betavae.objectives import elbo
from betavae.objectives.elbo import gaussian_kl
from betavae.objectives.importance_weighted import log_mean_exp, log_prior_over_posterior


def antithetic_noise(vae: VAE, pairs: int) -> Tensor:
    """Fixed noise `(2 * pairs, 1, latent_dim)`, each with its negative, and of variance 1 in each dimension."""
    noise = torch.randn(pairs, 1, vae.latent_dim, generator=torch.Generator().manual_seed(0))
    noise = noise / noise.square().mean(0).sqrt()
    return torch.cat((noise, -noise)).to(next(vae.parameters()))


def neg_elbo(vae: VAE, x: Tensor) -> Tensor:
    """The negative ELBO of `x` `(N, C, H, W)` over eight draws, `(N,)` in nats (Kingma & Welling 2014)."""
    terms = elbo(vae, x, antithetic_noise(vae, 4).expand(-1, len(x), -1), 1.0)
    return terms.recon + terms.kl.sum(1)


def nll(vae: VAE, x: Tensor, pairs: int = 32) -> Tensor:
    """The importance-weighted bound on -log p(x) of 2 * pairs draws, `(N,)` in nats (Burda et al. 2016)."""
    posterior, z, params = vae(x, antithetic_noise(vae, pairs).expand(-1, len(x), -1))
    return -log_mean_exp(vae.likelihood.log_prob(x, params) + log_prior_over_posterior(z, posterior))


def likelihood_regret(vae: VAE, x: Tensor, steps: int = 50, lr: float = 0.1) -> Tensor:
    """Likelihood regret, `(N,)` in nats, at least 0 (Xiao, Yan & Amit 2020).

    By how much the ELBO of one image rises when mean and log-variance of its own posterior are optimised, by Adam from
    where the encoder puts them, with the decoder as it is. (The paper optimises the whole encoder for each image; here
    the two vectors that it gives, for all images at once.) The draws stay the same, and the best step counts.
    """
    noise = antithetic_noise(vae, 4)
    bounds = []
    with torch.enable_grad():
        mean, logvar = (part.detach().clone().requires_grad_() for part in vae.encode(x))
        optimizer = torch.optim.Adam([mean, logvar], lr)
        for _ in range(steps + 1):
            posterior = Posterior(mean, logvar)
            log_px = vae.likelihood.log_prob(x, vae.decode_params(posterior.rsample(noise))).mean(0)
            bound = log_px - gaussian_kl(posterior).sum(1)
            bounds.append(bound.detach())
            mean.grad, logvar.grad = torch.autograd.grad(-bound.sum(), [mean, logvar])
            optimizer.step()
    return torch.stack(bounds).amax(0) - bounds[0]


def unexplained_nats(x: Tensor, reconstruction: Tensor) -> Tensor:
    """What the reconstruction `(N, C, H, W)` leaves unexplained, `(N,)` in nats, at least 0.

    The KL divergence of Bernoulli pixels of mean x from those of mean `reconstruction`, summed: cross-entropy less the
    pixels' own entropy, which is no fault of the model. For any likelihood; means are kept 0.001 away from 0 and 1.
    """
    near, mean = x.clamp(0.001, 0.999), reconstruction.clamp(0.001, 0.999)
    pixels = F.binary_cross_entropy(mean, near, reduction="none") - F.binary_cross_entropy(near, near, reduction="none")
    return pixels.sum((1, 2, 3))


def statistics(vae: VAE, x: Tensor) -> Tensor:
    """Eight statistics of encoder and decoder `(N, 8)`, as in Morningstar et al. 2021.

    Neg. ELBO, distortion, KL, |mean|^2, the sums of the posterior's variances and of its log-variances, and squared
    error and `excess` of the reconstruction.
    """
    mean, logvar = vae.encode(x)
    reconstruction = vae.decode(mean)
    kl = gaussian_kl(Posterior(mean, logvar)).sum(1)
    bound = neg_elbo(vae, x)
    squares = (x - reconstruction).square().sum((1, 2, 3))
    rows = (bound, bound - kl, kl, mean.square().sum(1), logvar.exp().sum(1), logvar.sum(1), squares)
    return torch.stack((*rows, unexplained_nats(x, reconstruction)), 1).double()


def kernel_density(values: Tensor, at: Tensor) -> Tensor:
    """Log-densities `(N, S)` of `at` `(N, S)` under a normal kernel density of each column of `values` `(M, S)`, with
    Scott's bandwidth."""
    width = (values.std(0) * len(values) ** -0.2).clamp(min=1e-9)
    scaled, centres = at / width, values / width
    logs = [(-0.5 * (a[:, None] - c).square()).logsumexp(1) for a, c in zip(scaled.T, centres.T, strict=True)]
    return torch.stack(logs, 1) - torch.log(len(values) * math.sqrt(2 * math.pi) * width)


def svm_decision(svm: dict[str, Any], at: Tensor) -> Tensor:
    """Scikit-learn's `OneClassSVM.decision_function` of rows `at`, `(N,)`: positive inside."""
    distances = torch.cdist(at, svm["vectors"], compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.exp(-svm["gamma"] * distances) @ svm["weights"] + svm["offset"]


def mixture_log_density(mixture: dict[str, Tensor], at: Tensor) -> Tensor:
    """Log-density `(N,)` of rows `at` under a mixture of normal distributions with full covariances."""
    roots = mixture["roots"]  # (K, D, D), each times its transpose the precision
    distances = (at @ roots - (mixture["means"][:, None] @ roots)).square().sum(2)  # (K, N)
    logs = mixture["weights"].log() + roots.diagonal(dim1=1, dim2=2).log().sum(1)
    return (logs[:, None] - 0.5 * distances).logsumexp(0) - 0.5 * at.shape[1] * math.log(2 * math.pi)


def latent_and_unexplained(vae: VAE, x: Tensor, background: float) -> tuple[Tensor, Tensor]:
    """The posterior means `(N, latent_dim)`, and `excess` per unit of ink `(N,)`: ink is what differs
    from `background`, the most frequent grey level of training images."""
    mean = vae.encode(x).mean
    ink = (x - background).abs().sum((1, 2, 3)).clamp(min=1)
    return mean.double(), (unexplained_nats(x, vae.decode(mean)) / ink).double()


def pixel_surprise(vae: VAE, x: Tensor) -> Tensor:
    """-log p(x|z) at the posterior mean for each pixel, `(N, H, W)` in nats, channels summed.

    The likelihood takes each pixel for an image of its own, as it may: given z, pixels are independent.
    """

    def alone(images: Tensor) -> Tensor:
        return images.movedim(1, 3).flatten(0, 2)[..., None, None]

    params = vae.decode_params(vae.encode(x).mean)
    return -vae.likelihood.log_prob(alone(x), alone(params)).view(len(x), *x.shape[2:])
