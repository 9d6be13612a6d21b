"""InfoVAE (Zhao et al. 2017) and WAE (Tolstikhin et al. 2018).

An MMD moves the aggregate posterior to the prior.
"""

import torch
from torch import Tensor

from betavae.models.vae import VAE
from betavae.objectives.elbo import LossTerms


def mmd_to_normal(z: Tensor) -> Tensor:
    """Estimate the squared maximum mean discrepancy between z `(B, D)` and N(0, I), `()`.

    The kernel is exp(-|a - b|^2 / D); the code of Zhao et al. 2017 has D^2 in place of D, which needs another weight.
    Its means over N(0, I) are exact, so that the only samples are z. The estimate has no bias and may be below 0
    (Gretton et al. 2012, lemma 6).
    """
    n, dimensions = z.shape
    variance = dimensions / 2  # of the kernel: exp(-|a - b|^2 / (2 variance))
    kernel = torch.exp(-(z.unsqueeze(1) - z).square().sum(-1) / dimensions)
    within = (kernel.sum() - n) / (n * (n - 1))  # without the pairs of a z and itself, whose kernel is 1
    between = (variance / (variance + 1)) ** variance * torch.exp(-0.5 * z.square().sum(-1) / (variance + 1))
    return within - 2 * between.mean() + (variance / (variance + 2)) ** variance


def mmd_vae(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, mmd_weight: float) -> LossTerms:
    """Compute recon + beta * KL + mmd_weight * MMD(q(z), N(0, I)).

    The MMD takes one z per image of the batch. In the notation of InfoVAE, beta = 1 - alpha and
    mmd_weight = alpha + lambda - 1. With beta = 0 it is WAE-MMD.
    """
    posterior, z, params = vae(x, noise)
    recon, kl = -vae.likelihood.log_prob(x, params).mean(0), vae.kl(posterior, z)
    mmd = mmd_to_normal(z[0]) if len(x) > 1 else z.new_zeros(())
    loss = (recon + beta * kl.sum(1)).mean() + mmd_weight * mmd
    return LossTerms(loss, recon.detach(), kl.detach(), posterior.detach(), {"mmd": mmd.detach()})
