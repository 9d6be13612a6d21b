"""Diagnosis of posterior collapse.

After a collapse the decoder ignores z, and the posterior of every image is the same.
"""

import math

import torch
from torch import Tensor

from betavae.models.vae import VAE, Posterior
from betavae.objectives.elbo import ACTIVE_UNIT_THRESHOLD

ONE_BIT = math.log(2)  # nats
MAX_IMAGES = 1000  # enough for a diagnosis
MIN_IMAGES = 100  # fewer images may be too similar to tell a unit that is inactive


def describe_collapse(active_units: float, latent_dim: int, kl: float) -> str | None:
    """Describe a posterior collapse and its remedies in one line, or return None for a model that uses z.

    The KL bounds the mutual information of an image and its z, for any prior. Below one bit, z cannot tell even two
    images apart. A model with few active units and a larger KL uses z.

    Args:
        active_units: The number of active units (Burda et al. 2016).
        latent_dim: The number of latent dimensions.
        kl: The mean KL per image, in nats, over all dimensions.
    """
    if active_units >= 1 and kl >= ONE_BIT:
        return None
    return (
        f"posterior collapse: the decoder ignores z ({active_units:.0f} of {latent_dim} units active, KL {kl:.2f} "
        "nats); try longer training, a smaller beta, beta_schedule=linear, objective.free_bits=0.1 (with "
        "objective=elbo and prior=standard) or a smaller decoder (docs/numbers.md)"
    )


def count_active_units(mean: Tensor) -> int:
    """Count the latent dimensions whose posterior mean `(N, latent_dim)` varies over the images."""
    return int((mean.var(0, correction=0) > ACTIVE_UNIT_THRESHOLD).sum())


@torch.no_grad()
def estimate_kl(vae: VAE, posterior: Posterior) -> float:
    """Estimate the mean KL per image in nats.

    Under a learned prior, the estimate takes one z per image with a fixed seed.
    """
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    return vae.kl(posterior, posterior.rsample(noise.to(posterior.mean))).sum(1).mean().item()


@torch.no_grad()
def diagnose_collapse(vae: VAE, x: Tensor) -> str | None:
    """Describe a posterior collapse on images `(N, C, H, W)`, or return None, also for few images."""
    if len(x) < MIN_IMAGES:
        return None
    posterior = vae.encode(x)
    return describe_collapse(count_active_units(posterior.mean), vae.latent_dim, estimate_kl(vae, posterior))
