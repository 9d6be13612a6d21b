"""The importance-weighted bounds (Burda et al. 2016), tighter than the ELBO: with k samples z_i of q(z|x)

    loss = -log 1/k sum_i w_i,    w_i = p(x|z_i) (p(z_i) / q(z_i|x))^beta

and the same `recon`, `kl` and `neg_elbo` as the ELBO's: for a model trained by them, look at `loss`.
"""

import math

import torch
from torch import Tensor

from betavae.models.vae import VAE, Posterior
from betavae.objectives.elbo import LossTerms, gaussian_kl


def log_prior_over_posterior(z: Tensor, posterior: Posterior) -> Tensor:
    """log p(z) - log q(z|x), `(..., B)`, for z `(..., B, latent_dim)`."""
    mean, logvar = posterior
    return 0.5 * ((z - mean) ** 2 * torch.exp(-logvar) + logvar - z**2).sum(-1)


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """The log of the mean weight over the leading dimension."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def iwae(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float) -> LossTerms:
    """The importance-weighted bound of k samples; with k = 1 the ELBO, its KL not in closed form but from that sample.

    `x` `(B, C, H, W)`, `noise` `(k, B, latent_dim)` from N(0, I).
    """
    posterior, z, params = vae(x, noise)
    log_px = vae.likelihood.log_prob(x, params)
    log_weights = log_px + beta * log_prior_over_posterior(z, posterior)
    return _iw_terms(posterior, log_px, log_weights)


def dreg(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, resample: int | None = None) -> LossTerms:
    """`iwae` with the doubly reparameterised gradient of the encoder (Tucker et al. 2019).

    The same value and the same expected gradient. The noisy score of q is left out, which in expectation multiplies the
    gradient through z_i by 1 - beta + beta w_i / sum_j w_j: by that normalised weight where beta is 1.

    With `resample`, so many of the k samples go backward, drawn by their weights (Burda et al. 2016, section 3): the
    same expected gradient with a little more noise, at large k for half of the time.
    """
    posterior = vae.encode(x)
    detached_posterior = posterior.detach()

    def log_weights_at(noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = posterior.rsample(noise)
        log_px = vae.likelihood.log_prob(x, vae.decode_params(z))
        return z, log_px, log_px + beta * log_prior_over_posterior(z, detached_posterior)

    training = torch.is_grad_enabled()
    with torch.set_grad_enabled(training and resample is None):
        z, log_px, log_weights = log_weights_at(noise)
    terms = _iw_terms(posterior, log_px, log_weights)
    weights = log_weights.detach().softmax(0)
    if training and resample is not None:
        # Systematic resampling: of the weights laid end to end, those that a comb of one random offset hits.
        comb = (torch.arange(resample, device=x.device)[:, None] + torch.rand(len(x), device=x.device)) / resample
        drawn = torch.searchsorted(weights.cumsum(0).T.contiguous(), comb.T.contiguous()).clamp_(max=len(weights) - 1).T
        weights = weights.gather(0, drawn)
        z, _, log_weights = log_weights_at(noise.take_along_dim(drawn.unsqueeze(-1), 0))
        drawn_loss = -log_weights.mean()
        terms = terms._replace(loss=terms.loss + drawn_loss - drawn_loss.detach())
    if z.requires_grad:
        factor = (1 - beta + beta * weights).unsqueeze(-1)
        z.register_hook(lambda grad: grad * factor)
    return terms


def _iw_terms(posterior: Posterior, log_px: Tensor, log_weights: Tensor) -> LossTerms:
    loss = -log_mean_exp(log_weights).mean()
    return LossTerms(loss, -log_px.mean(0).detach(), gaussian_kl(posterior).detach(), posterior.detach())
