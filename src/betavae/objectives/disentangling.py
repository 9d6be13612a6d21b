"""Objectives that are made to disentangle, and the three parts of the KL. All of it in nats per image.

With the aggregate posterior q(z) = 1/N sum_n q(z|x_n) over the N training images (Chen et al. 2018, Hoffman & Johnson
2016),

    E_x KL(q(z|x) || p(z)) = I(x; z) + KL(q(z) || prod_d q(z_d)) + sum_d KL(q(z_d) || p(z_d))
                             mutual_information  total_correlation   dimension_wise_kl
"""

import math

import torch
from torch import Tensor

from betavae.models.vae import VAE, Posterior
from betavae.objectives.elbo import LossTerms, gaussian_kl


def kl_decomposition(
    posterior: Posterior, noise: Tensor, num_train_images: int, sampling: str = "stratified"
) -> dict[str, Tensor]:
    """The three parts, `(B,)` each, at the samples of `noise` `(k, B, latent_dim)`; they add up to the KL in mean.

    q(z) is estimated from the batch by stratified sampling (Chen et al. 2018, appendix C.2): the image that z came from
    counts 1 / N, for N = `num_train_images`, and the B - 1 others, of the N - 1 others, share the rest evenly. That is unbiased
    for q(z), and exact where the batch is all N. (The paper gives one of the others a weight of its own, drawn at
    random; this is the mean over that draw.) Its logarithm is too small in mean, and more so in more dimensions: with B
    far below N the mutual information comes out too large and the total correlation too small.

    With `sampling` "weighted" all B count 1 / B. That too is exact for a batch of all N; for fewer, the image that z
    came from counts too much, the mutual information is at most log B, and the total correlation comes out too large.
    Compare them at one batch size.
    """
    mean, logvar = posterior
    batch = len(mean)
    z = posterior.rsample(noise)
    # (k, B, 1, D) less (B, D): log q(z_d | x_j) of each z at each x_j, (k, B, B, D).
    own = noise**2 + logvar + math.log(2 * math.pi)
    others = (z.unsqueeze(-2) - mean) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi)
    log_qz_given_x, log_pz = -0.5 * own.sum(-1), -0.5 * (z**2 + math.log(2 * math.pi))
    n = num_train_images if sampling == "stratified" else batch
    weights = mean.new_full((batch, batch), (n - 1) / n / max(batch - 1, 1)).fill_diagonal_(1 / n)
    weights = weights / weights.sum(1)  # of a batch of one image
    log_weights = weights.log()
    log_qz = (log_weights - 0.5 * others.sum(-1)).logsumexp(-1)
    log_qz_d = (log_weights.unsqueeze(-1) - 0.5 * others).logsumexp(-2)
    return {
        "mutual_information": (log_qz_given_x - log_qz).mean(0),
        "total_correlation": (log_qz - log_qz_d.sum(-1)).mean(0),
        "dimension_wise_kl": (log_qz_d - log_pz).sum(-1).mean(0),
    }


def beta_tcvae(
    vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, num_train_images: int, sampling: str = "stratified"
) -> LossTerms:
    """beta-TCVAE (Chen et al. 2018): recon + I(x; z) + beta * total correlation + dimension-wise KL.

    The three are `kl_decomposition`; their sum at weight 1 is the KL, taken in closed form, so that at beta = 1 this is `elbo`.
    `num_train_images` is the number of training images. With `sampling` "weighted", the total correlation has the gradient of the
    paper's minibatch-weighted sampling (there, constants make it larger by (D - 1) log N); with "stratified" and B far
    below N its estimate may fall below 0, where it is lowered by spreading images out and not by factorising. That is
    the default here, and not in configs/objective/tc.yaml, for runs that were begun when there was no choice.
    """
    posterior, _, params = vae(x, noise)
    recon, kl = -vae.likelihood.log_prob(x, params).mean(0), gaussian_kl(posterior)
    parts = kl_decomposition(posterior, noise, num_train_images, sampling)
    loss = (recon + kl.sum(1) + (beta - 1) * parts["total_correlation"]).mean()
    return LossTerms(loss, recon.detach(), kl.detach(), posterior.detach(), parts)


def dip_vae(
    vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, variant: str, off_diagonal: float, diagonal: float
) -> LossTerms:
    """DIP-VAE (Kumar et al. 2018): the beta-VAE with a price on a covariance C that is not the identity.

    loss = recon + beta * KL + off_diagonal * sum_ij C_ij^2 (i != j) + diagonal * sum_i (C_ii - 1)^2, where C is that of
    the posterior means in the batch (`variant` "i"), or of z: with the mean of the posterior variances added ("ii").
    """
    posterior, _, params = vae(x, noise)
    recon, kl = -vae.likelihood.log_prob(x, params).mean(0), gaussian_kl(posterior)
    # Not `Tensor.cov`, which asks the GPU whether there are enough images, and waits for the answer (torch 2.14).
    centered = posterior.mean - posterior.mean.mean(0)
    covariance = centered.T @ centered / len(x)
    if variant == "ii":
        covariance = covariance + posterior.logvar.exp().mean(0).diag()
    variances = covariance.diag()
    penalty = off_diagonal * ((covariance - variances.diag()) ** 2).sum() + diagonal * ((variances - 1) ** 2).sum()
    loss = (recon + beta * kl.sum(1)).mean() + penalty
    extra = {"covariance_price": penalty.expand(len(x))}
    return LossTerms(loss, recon.detach(), kl.detach(), posterior.detach(), extra)


def capacity_vae(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, gamma: float) -> LossTerms:
    """recon + gamma * |KL - C|, KL the mean over the batch and C nats the capacity (Burgess et al. 2018).

    C is what `beta` is elsewhere, so that `beta=25` with `beta_schedule=linear` raises it from 0 to 25 as in the paper.
    """
    posterior, _, params = vae(x, noise)
    recon, kl = -vae.likelihood.log_prob(x, params).mean(0), gaussian_kl(posterior)
    loss = recon.mean() + gamma * (kl.sum(1).mean() - beta).abs()
    return LossTerms(loss, recon.detach(), kl.detach(), posterior.detach())
