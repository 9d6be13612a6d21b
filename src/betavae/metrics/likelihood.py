"""How likely a trained VAE finds images: bounds on log p(x) by importance sampling, in nats per image.

Everything is a pure function of tensors, and the same for any chunk size but for rounding.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from betavae.metrics.aggregate_posterior import aggregate_posterior
from betavae.models.precision import to_float64
from betavae.models.vae import VAE, Posterior
from betavae.objectives.elbo import ACTIVE_UNIT_THRESHOLD, gaussian_kl
from betavae.objectives.importance_weighted import log_prior_over_posterior

# Images that share a stream of random numbers. Each sample of a group takes a multiple of 16 of them, which is how many
# torch draws at a time; so the stream is the same however many samples are drawn at once.
RNG_GROUP = 32


class PerImageBounds(NamedTuple):
    """One row per image, in double precision on the CPU."""

    distortion: Tensor  # (N,)
    kl: Tensor  # (N, latent_dim)
    nll: Tensor  # (N, number of bounds)
    mean: Tensor  # (N, latent_dim), of the posterior
    logvar: Tensor  # (N, latent_dim)

    @classmethod
    def concat(cls, parts: list["PerImageBounds"]) -> "PerImageBounds":
        return cls(*(torch.cat(rows) for rows in zip(*parts, strict=True)))


@torch.no_grad()
def importance_bounds(
    vae: VAE, x: Tensor, ks: list[int], seed: int = 0, memory_mb: int = 16, start: int = 0
) -> Iterator[PerImageBounds]:
    """-E log p(x|z), the KL, and the importance-weighted bounds on -log p(x) (Burda et al. 2016) for each of `ks`, of
    one `GROUP` of images after the other from number `start` (a multiple of GROUP) on; `PerImage.together` joins them.

    With S = max(ks) samples of each image's posterior, the bound for K is the mean over S // K disjoint groups of K of
    them, not over one group. The expectation is the same, a small K has no more noise than a large one, and where each
    K divides the next, the bounds tighten for every image, not just on average. Decoding takes about `memory_mb`.
    """
    device, samples = next(vae.parameters()).device, max(ks)
    at_once = max(1, memory_mb * 2**20 // (4 * RNG_GROUP * decode_floats_per_image(vae)))
    # glibc hands large blocks back to the system and fetches them anew, at half the time of a chunk here, until it has
    # seen one of this size freed. It is never written to, so it takes no memory.
    torch.empty(31 * 2**18)
    for first in range(start, len(x), RNG_GROUP):
        images = x[first : first + RNG_GROUP].to(device)
        posterior = vae.encode(images)
        generator = torch.Generator().manual_seed(seed + 1_000_003 * (first // RNG_GROUP))
        log_px_sum = to_float64(torch.zeros(len(images), device=device))
        log_weights = log_px_sum.new_empty(samples, len(images))
        for chunk in log_weights.split(at_once):
            # Drawn for a whole group, on the CPU: the same on every device and for any number of images.
            noise = torch.randn(len(chunk), RNG_GROUP, vae.latent_dim, generator=generator)[:, : len(images)]
            z = posterior.rsample(noise.to(images))
            log_px = vae.likelihood.log_prob(images, vae.decode_params(z))
            chunk.copy_(log_px + log_prior_over_posterior(z, posterior))
            log_px_sum += to_float64(log_px).sum(0)
        nll = [math.log(k) - log_weights[: samples // k * k].unflatten(0, (-1, k)).logsumexp(1).mean(0) for k in ks]
        rows = (-log_px_sum / samples, gaussian_kl(posterior), torch.stack(nll, 1), *posterior)
        yield PerImageBounds(*(row.cpu().double() for row in rows))


def decode_floats_per_image(vae: VAE) -> int:
    """How many numbers there are, at most, while one z is decoded and its log-probability taken."""
    sizes = [4 * vae.likelihood.params_per_channel * math.prod(vae.image_shape)]
    layers = [layer for layer in vae.decoder.modules() if not any(layer.children())]
    hooks = [layer.register_forward_hook(lambda _, __, output: sizes.append(output.numel())) for layer in layers]
    vae.decode_params(torch.zeros(1, vae.latent_dim).to(next(vae.parameters())))
    for hook in hooks:
        hook.remove()
    return sum(sizes)


def standard_error(values: Tensor) -> float:
    """Of the mean over images."""
    return values.std().item() / math.sqrt(len(values))


def summary(per_image: PerImageBounds, ks: list[int]) -> dict[str, Any]:
    """The means over images, each with its standard error, as evaluation.json has them."""
    rate = per_image.kl.sum(1)
    terms = {"neg_elbo": per_image.distortion + rate, "distortion": per_image.distortion, "rate": rate}
    terms |= {f"nll_{k}": per_image.nll[:, number] for number, k in enumerate(ks)}
    active = per_image.mean.var(0, correction=0) > ACTIVE_UNIT_THRESHOLD
    return {name: {"mean": values.mean().item(), "se": standard_error(values)} for name, values in terms.items()} | {
        "active_units": int(active.sum()),
        "kl_per_dimension": per_image.kl.mean(0).tolist(),
        "aggregate": aggregate_posterior(Posterior(per_image.mean, per_image.logvar)),
    }
