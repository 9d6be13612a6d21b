"""Importance-weighted bounds (Burda et al. 2016) with k samples z_i from q(z|x).

They are tighter than the ELBO.

    loss = -log 1/k sum_i w_i,    w_i = p(x|z_i) (p(z_i) / q(z_i|x))^beta

`recon`, `kl` and `neg_elbo` are those of the ELBO. Compare models trained with these bounds by `loss`.
"""

import math

import torch
from torch import Tensor

from betavae.models.vae import VAE, Posterior
from betavae.objectives.elbo import LossTerms


def log_prior_over_posterior(vae: VAE, z: Tensor, posterior: Posterior) -> Tensor:
    """Return log p(z) - log q(z|x), `(..., B)` in nats, for z `(..., B, latent_dim)`."""
    return vae.prior.log_prob(z) - posterior.log_prob(z)


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Return the log of the mean weight over the leading dimension."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def iwae(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float) -> LossTerms:
    """Compute the importance-weighted bound.

    With k = 1 it is the ELBO with its KL estimated from that sample.

    Args:
        vae: The model.
        x: Images `(B, C, H, W)` in [0, 1].
        noise: `(k, B, latent_dim)` from N(0, I).
        beta: Exponent of the ratio of prior to posterior.
    """
    posterior, z, params = vae(x, noise)
    log_px = vae.likelihood.log_prob(x, params)
    log_weights = log_px + beta * log_prior_over_posterior(vae, z, posterior)
    return _iw_terms(vae, posterior, z, log_px, log_weights)


def ciwae(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, elbo_weight: float) -> LossTerms:
    """Compute CIWAE (Rainforth et al. 2018): `elbo_weight` of the ELBO and 1 - `elbo_weight` of `iwae`.

    The ELBO is that of the same k samples, with its KL estimated from them.
    """
    posterior, z, params = vae(x, noise)
    log_px = vae.likelihood.log_prob(x, params)
    log_weights = log_px + beta * log_prior_over_posterior(vae, z, posterior)
    terms = _iw_terms(vae, posterior, z, log_px, log_weights)
    return terms._replace(loss=(1 - elbo_weight) * terms.loss - elbo_weight * log_weights.mean())


def miwae(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, groups: int) -> LossTerms:
    """Compute MIWAE (Rainforth et al. 2018): the mean of `iwae` over equal groups of the k samples."""
    posterior, z, params = vae(x, noise)
    log_px = vae.likelihood.log_prob(x, params)
    log_weights = log_px + beta * log_prior_over_posterior(vae, z, posterior)
    terms = _iw_terms(vae, posterior, z, log_px, log_weights)
    return terms._replace(loss=-log_mean_exp(log_weights.unflatten(0, (groups, -1)).transpose(0, 1)).mean())


def piwae(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, groups: int) -> LossTerms:
    """Compute PIWAE (Rainforth et al. 2018).

    It is `iwae` of all k samples for the decoder and `miwae` for the encoder. The value is that of `iwae`. The gradient
    of a bound is that of sum_i v_i log w_i, with v_i the normalized weights; here they are those of `iwae`, and what
    reaches the encoder is multiplied by the quotient of both.
    """
    posterior = vae.encode(x)
    samples = Posterior(*(part.expand_as(noise) for part in posterior))  # one posterior per sample, to tell them apart
    z = samples.rsample(noise)
    log_px = vae.likelihood.log_prob(x, vae.decode_params(z))
    log_weights = log_px + beta * log_prior_over_posterior(vae, z, samples)
    terms = _iw_terms(vae, posterior, z, log_px, log_weights)
    with torch.no_grad():
        decoder_weights = log_weights.softmax(0).clamp(min=1e-30)  # a divisor
        encoder_weights = log_weights.unflatten(0, (groups, -1)).softmax(1).flatten(0, 1) / groups
        factor = (encoder_weights / decoder_weights).unsqueeze(-1)
    for part in samples if z.requires_grad else ():
        part.register_hook(lambda grad: grad * factor)
    surrogate = -(decoder_weights * log_weights).sum(0).mean()
    return terms._replace(loss=terms.loss.detach() + surrogate - surrogate.detach())


def dreg(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, resample: int | None = None) -> LossTerms:
    """Compute `iwae` with the doubly reparameterized gradient of the encoder (Tucker et al. 2019).

    Value and expected gradient are those of `iwae`. The noisy score of q is left out; in expectation this multiplies
    the gradient through z_i by 1 - beta + beta w_i / sum_j w_j, which is the normalized weight at beta = 1.

    With `resample`, only that many of the k samples, drawn by their weights, go through the backward pass (Burda et al.
    2016, section 3). The expected gradient is the same, slightly noisier; at large k it takes half the time.
    """
    posterior = vae.encode(x)
    detached_posterior = posterior.detach()

    def log_weights_at(noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = posterior.rsample(noise)
        log_px = vae.likelihood.log_prob(x, vae.decode_params(z))
        return z, log_px, log_px + beta * log_prior_over_posterior(vae, z, detached_posterior)

    training = torch.is_grad_enabled()
    with torch.set_grad_enabled(training and resample is None):
        z, log_px, log_weights = log_weights_at(noise)
    terms = _iw_terms(vae, posterior, z, log_px, log_weights)
    weights = log_weights.detach().softmax(0)
    if training and resample is not None:
        # Systematic resampling: equally spaced points with one random offset, looked up in the cumulative weights.
        points = (torch.arange(resample, device=x.device)[:, None] + torch.rand(len(x), device=x.device)) / resample
        drawn = (weights.cumsum(0)[:, None] < points).sum(0).clamp(max=len(weights) - 1)
        weights = weights.gather(0, drawn)
        z, _, log_weights = log_weights_at(noise.take_along_dim(drawn.unsqueeze(-1), 0))
        drawn_loss = -log_weights.mean()
        terms = terms._replace(loss=terms.loss + drawn_loss - drawn_loss.detach())
    if z.requires_grad:
        factor = (1 - beta + beta * weights).unsqueeze(-1)
        z.register_hook(lambda grad: grad * factor)
    return terms


def _iw_terms(vae: VAE, posterior: Posterior, z: Tensor, log_px: Tensor, log_weights: Tensor) -> LossTerms:
    with torch.no_grad():
        kl = vae.kl(posterior, z)
    loss = -log_mean_exp(log_weights).mean()
    return LossTerms(loss, -log_px.mean(0).detach(), kl, posterior.detach())
