"""Objectives made to disentangle, and the decomposition of the KL into three parts.

With the aggregate posterior q(z) = 1/N sum_n q(z|x_n) over the N training images (Hoffman & Johnson 2016, Chen et al.
2018),

    E_x KL(q(z|x) || p(z)) = I(x; z) + KL(q(z) || prod_d q(z_d)) + sum_d KL(q(z_d) || p(z_d))
                             mutual_information  total_correlation   dimension_wise_kl
"""

import math

import torch
from torch import Tensor

from betavae.models.vae import VAE, Posterior
from betavae.objectives.elbo import LossTerms


def kl_decomposition(
    posterior: Posterior, noise: Tensor, num_train_images: int, sampling: str = "stratified"
) -> dict[str, Tensor]:
    """Estimate the three parts of the KL from a batch; their sum equals the KL in expectation.

    "stratified" (Chen et al. 2018, appendix C.2) gives the image that z came from the weight 1 / N, and the B - 1
    others the rest in equal parts. (The paper draws one of the others at random for a weight of its own; this is the
    mean over that draw.) The estimate of q(z) is unbiased, and exact if the batch is the whole data set. Its logarithm
    is too small in expectation, more so in more dimensions: for B far below N the mutual information is overestimated
    and the total correlation underestimated.

    "weighted" gives all B images the weight 1 / B. It too is exact if the batch is the whole data set. For smaller
    batches the image that z came from has too much weight: the mutual information is at most log B, and the total
    correlation is overestimated. Compare values at one batch size only.

    Args:
        posterior: The posteriors of the batch, `(B, latent_dim)` each.
        noise: `(k, B, latent_dim)` from N(0, I).
        num_train_images: N.
        sampling: "stratified" or "weighted".

    Returns:
        `mutual_information`, `total_correlation` and `dimension_wise_kl`, `(B,)` each, in nats.
    """
    mean, logvar = posterior
    batch = len(mean)
    z = posterior.rsample(noise)
    # -2 log q(z_d | x_j) for each z and each x_j, (k, B, B, D); `own` is its diagonal, (k, B, D).
    own = noise**2 + logvar + math.log(2 * math.pi)
    others = (z.unsqueeze(-2) - mean) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi)
    log_qz_given_x, log_pz = -0.5 * own.sum(-1), -0.5 * (z**2 + math.log(2 * math.pi))
    n = num_train_images if sampling == "stratified" else batch
    weights = mean.new_full((batch, batch), (n - 1) / n / max(batch - 1, 1)).fill_diagonal_(1 / n)
    weights = weights / weights.sum(1)  # a batch of one image has only the weight 1 / n
    log_weights = weights.log()
    log_qz = (log_weights - 0.5 * others.sum(-1)).logsumexp(-1)
    log_qz_d = (log_weights.unsqueeze(-1) - 0.5 * others).logsumexp(-2)
    return {
        "mutual_information": (log_qz_given_x - log_qz).mean(0),
        "total_correlation": (log_qz - log_qz_d.sum(-1)).mean(0),
        "dimension_wise_kl": (log_qz_d - log_pz).sum(-1).mean(0),
    }


def beta_tcvae(
    vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, num_train_images: int, sampling: str
) -> LossTerms:
    """Compute beta-TCVAE (Chen et al. 2018).

    The loss is recon + I(x; z) + beta * total correlation + dimension-wise KL. The parts are those of
    `kl_decomposition`. Their sum at weight 1 is the KL in closed form, so that this is `elbo` at beta = 1. With
    "weighted" sampling the total correlation has the gradient of the paper's minibatch-weighted sampling (whose value
    is larger by the constant (D - 1) log N). With "stratified" sampling and B far below N the estimate can fall below
    0, where it is lowered by spreading images out instead of factorizing.
    """
    posterior, z, params = vae(x, noise)
    recon, kl = -vae.likelihood.log_prob(x, params).mean(0), vae.kl(posterior, z)
    parts = kl_decomposition(posterior, noise, num_train_images, sampling)
    loss = (recon + kl.sum(1) + (beta - 1) * parts["total_correlation"]).mean()
    return LossTerms(loss, recon.detach(), kl.detach(), posterior.detach(), parts)


def dip_vae(
    vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, variant: str, off_diagonal: float, diagonal: float
) -> LossTerms:
    """Compute DIP-VAE (Kumar et al. 2018): the beta-VAE with a penalty on the covariance C of the latents.

    loss = recon + beta * KL + off_diagonal * sum_ij C_ij^2 (i != j) + diagonal * sum_i (C_ii - 1)^2

    `variant` "i" uses the covariance of the posterior means in the batch; "ii" that of z, which adds the mean of the
    posterior variances to the diagonal.
    """
    posterior, z, params = vae(x, noise)
    recon, kl = -vae.likelihood.log_prob(x, params).mean(0), vae.kl(posterior, z)
    # `Tensor.cov` would synchronize with the GPU at every step (torch 2.14).
    centered = posterior.mean - posterior.mean.mean(0)
    covariance = centered.T @ centered / len(x)
    if variant == "ii":
        covariance = covariance + posterior.logvar.exp().mean(0).diag()
    variances = covariance.diag()
    penalty = off_diagonal * ((covariance - variances.diag()) ** 2).sum() + diagonal * ((variances - 1) ** 2).sum()
    loss = (recon + beta * kl.sum(1)).mean() + penalty
    extra = {"covariance_penalty": penalty.expand(len(x))}
    return LossTerms(loss, recon.detach(), kl.detach(), posterior.detach(), extra)


def capacity_vae(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, gamma: float) -> LossTerms:
    """Compute recon + gamma * |KL - C| for a capacity of C nats (Burgess et al. 2018).

    C is passed as `beta`, so that `beta=25 beta_schedule=linear` raises it from 0 to 25 as in the paper.
    """
    posterior, z, params = vae(x, noise)
    recon, kl = -vae.likelihood.log_prob(x, params).mean(0), vae.kl(posterior, z)
    loss = recon.mean() + gamma * (kl.sum(1).mean() - beta).abs()
    return LossTerms(loss, recon.detach(), kl.detach(), posterior.detach())
