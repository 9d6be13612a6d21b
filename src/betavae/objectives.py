"""What is minimised, as the equations are written: pure functions of tensors, everything in nats per image.

    recon    = -E_q log p(x|z)        (the distortion)
    kl       = KL(q(z|x) || N(0, I))  (the rate)
    loss     = recon + beta * kl      (what is optimised; Higgins et al. 2017)
    neg_elbo = recon + kl             (beta = 1: what is compared across a beta sweep)

The importance-weighted objectives (Burda et al. 2016) have a tighter `loss`, with k samples z_i of q(z|x)

    loss     = -log 1/k sum_i w_i,    w_i = p(x|z_i) (p(z_i) / q(z_i|x))^beta

and the same `recon`, `kl` and `neg_elbo`: for a model trained by them, look at `loss`.

To add an objective, write a function with `elbo`'s first four arguments and name it in `OBJECTIVES`; what follows them
are its settings, from `configs/objective/`. Terms of its own go into `Terms.extra`, and from there by their names into
every average, curve and table.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from betavae.vae import VAE, Posterior

ACTIVE_UNIT_VARIANCE = 0.01  # of the posterior mean over the data; a unit that varies less is not in use (Burda et al.)


class Terms(NamedTuple):
    """The terms of one batch. `loss` is a scalar; the others hold one value per image and carry no gradient."""

    loss: Tensor  # ()
    recon: Tensor  # (B,)
    kl: Tensor  # (B, latent_dim)
    posterior_mean: Tensor  # (B, latent_dim)
    extra: dict[str, Tensor] = {}  # noqa: RUF012 - any further terms, (B,) each

    def sums(self) -> dict[str, Tensor]:
        """Each term by its name, summed over the images of the batch."""
        recon, kl = self.recon.sum(), self.kl.sum()
        sums = {"loss": self.loss.detach() * len(self.recon), "recon": recon, "kl": kl, "neg_elbo": recon + kl}
        return sums | {name: term.detach().sum() for name, term in self.extra.items()}


def gaussian_kl(posterior: Posterior) -> Tensor:
    """KL(N(mean, var) || N(0, 1)) per latent dimension, `(B, latent_dim)`."""
    mean, logvar = posterior
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)


def elbo(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, free_bits: float = 0.0) -> Terms:
    """The negative evidence lower bound with the KL in closed form, averaged over the leading dimension of `noise`.

    `x` `(B, C, H, W)`, `noise` `(k, B, latent_dim)` from N(0, I). With `free_bits` (nats per latent dimension) no
    dimension's mean KL over the batch is pushed below that floor (Kingma et al. 2016).
    """
    posterior, _, params = vae(x, noise)
    recon = -vae.likelihood.log_prob(x, params).mean(0)
    kl = gaussian_kl(posterior)
    rate = kl.mean(0).clamp(min=free_bits).sum() if free_bits else kl.sum(1).mean()
    return Terms(recon.mean() + beta * rate, recon.detach(), kl.detach(), posterior.mean.detach())


def log_ratio(z: Tensor, posterior: Posterior) -> Tensor:
    """log p(z) - log q(z|x), `(..., B)`, for z `(..., B, latent_dim)`."""
    mean, logvar = posterior
    return 0.5 * ((z - mean) ** 2 * torch.exp(-logvar) + logvar - z**2).sum(-1)


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """The log of the mean weight over the leading dimension."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def iwae(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float) -> Terms:
    """The importance-weighted bound of k samples; with k = 1 the ELBO, its KL not in closed form but from that sample.

    `x` `(B, C, H, W)`, `noise` `(k, B, latent_dim)` from N(0, I).
    """
    posterior, z, params = vae(x, noise)
    log_px = vae.likelihood.log_prob(x, params)
    log_weights = log_px + beta * log_ratio(z, posterior)
    return _weighted(posterior, log_px, log_weights)


def dreg(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, resample: int | None = None) -> Terms:
    """`iwae` with the doubly reparameterised gradient of the encoder (Tucker et al. 2019).

    The same value and the same expected gradient. The noisy score of q is left out, which in expectation multiplies the
    gradient through z_i by 1 - beta + beta w_i / sum_j w_j: by that normalised weight where beta is 1.

    With `resample`, so many of the k samples go backward, drawn by their weights (Burda et al. 2016, section 3): the
    same expected gradient with a little more noise, at large k for half of the time.
    """
    posterior = vae.encode(x)
    scoreless = Posterior(posterior.mean.detach(), posterior.logvar.detach())

    def weigh(noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = posterior.rsample(noise)
        log_px = vae.likelihood.log_prob(x, vae.decode_params(z))
        return z, log_px, log_px + beta * log_ratio(z, scoreless)

    training = torch.is_grad_enabled()
    with torch.set_grad_enabled(training and resample is None):
        z, log_px, log_weights = weigh(noise)
    terms = _weighted(posterior, log_px, log_weights)
    weights = log_weights.detach().softmax(0)
    if training and resample is not None:
        # Systematic resampling: of the weights laid end to end, those that a comb of one random offset hits.
        comb = (torch.arange(resample, device=x.device)[:, None] + torch.rand(len(x), device=x.device)) / resample
        drawn = torch.searchsorted(weights.cumsum(0).T.contiguous(), comb.T.contiguous()).clamp_(max=len(weights) - 1).T
        weights = weights.gather(0, drawn)
        z, _, log_weights = weigh(noise.take_along_dim(drawn.unsqueeze(-1), 0))
        drawn_loss = -log_weights.mean()
        terms = terms._replace(loss=terms.loss + drawn_loss - drawn_loss.detach())
    if z.requires_grad:
        factor = (1 - beta + beta * weights).unsqueeze(-1)
        z.register_hook(lambda grad: grad * factor)
    return terms


def _weighted(posterior: Posterior, log_px: Tensor, log_weights: Tensor) -> Terms:
    loss = -log_mean_exp(log_weights).mean()
    return Terms(loss, -log_px.mean(0).detach(), gaussian_kl(posterior).detach(), posterior.mean.detach())


OBJECTIVES: dict[str, Callable[..., Terms]] = {"elbo": elbo, "iwae": iwae, "dreg": dreg}
