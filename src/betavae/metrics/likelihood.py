"""Bounds on the log-likelihood log p(x) of images by importance sampling, in nats per image.

Results do not depend on the chunk size, except for rounding.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from betavae.metrics.aggregate_posterior import decompose_kl, decompose_kl_by_class
from betavae.metrics.collapse import count_active_units
from betavae.models.precision import to_float64
from betavae.models.vae import VAE, Posterior
from betavae.storage.cache import to_bytes
from betavae.storage.files import atomic_write_bytes, require_own_file
from betavae.storage.torch_file import load_torch_file

# Images that share a stream of random numbers. Each sample of a group takes a multiple of 16 of them, which is how many
# torch draws at a time, so the stream does not depend on the number of samples drawn at once.
RNG_GROUP = 32
SAVE_EVERY_SECONDS = 5


class PerImageBounds(NamedTuple):
    """One row per image, in double precision on the CPU."""

    recon: Tensor  # (N,)
    kl: Tensor  # (N, latent_dim), or (N, 1) for a prior without a closed form
    nll: Tensor  # (N, number of bounds)
    mean: Tensor  # (N, latent_dim), of the posterior
    logvar: Tensor  # (N, latent_dim)

    @classmethod
    def concat(cls, parts: list["PerImageBounds"]) -> "PerImageBounds":
        """Join the rows of consecutive images."""
        return cls(*(torch.cat(rows) for rows in zip(*parts, strict=True)))


@torch.no_grad()
def importance_bounds(
    vae: VAE,
    x: Tensor,
    ks: list[int],
    seed: int = 0,
    memory_mb: int = 16,
    start: int = 0,
    labels: Tensor | None = None,
) -> Iterator[PerImageBounds]:
    """Compute importance-weighted bounds on -log p(x) (Burda et al. 2016), one group of images at a time.

    With S = max(ks) posterior samples per image, the bound for K is the mean over all S // K disjoint groups of K
    samples. Its expectation is that of one group. A small K has no more noise than a large one, and where each K
    divides the next, the bounds tighten for every image, not only on average.

    Args:
        vae: A model in evaluation mode; its device is used.
        x: Images `(N, C, H, W)`.
        ks: Samples K of each bound.
        seed: Seed of the posterior samples.
        memory_mb: Approximate memory for decoding.
        start: The first image, a multiple of `RNG_GROUP`.
        labels: The labels (N,) that a conditional model needs.

    Yields:
        The bounds of each group of `RNG_GROUP` images; `PerImageBounds.concat` joins them.
    """
    device, samples = next(vae.parameters()).device, max(ks)
    floats = count_decode_floats(vae.given(None if labels is None else labels[:1]))
    chunk_size = max(1, memory_mb * 2**20 // (4 * RNG_GROUP * floats))
    # glibc returns large blocks to the system and fetches them again, which takes half the time of a chunk, until it
    # has seen one of this size freed. The block is never written to, so it takes no memory.
    torch.empty(31 * 2**18)
    for first in range(start, len(x), RNG_GROUP):
        images = x[first : first + RNG_GROUP].to(device)
        view = vae.given(labels if labels is None else labels[first : first + RNG_GROUP])
        posterior = view.encode(images)
        generator = torch.Generator().manual_seed(seed + 1_000_003 * (first // RNG_GROUP))
        log_px_sum = to_float64(torch.zeros(len(images), device=device))
        log_pz_sum = torch.zeros_like(log_px_sum)
        log_weights = log_px_sum.new_empty(samples, len(images))
        for chunk in log_weights.split(chunk_size):
            # Drawn for a whole group on the CPU: the same on every device and for any number of images.
            noise = torch.randn(len(chunk), RNG_GROUP, vae.latent_dim, generator=generator)[:, : len(images)]
            z = posterior.rsample(noise.to(images))
            log_px = vae.likelihood.log_prob(images, view.decode_params(z))
            log_pz = view.prior.log_prob(z)
            chunk.copy_(log_px + log_pz - posterior.log_prob(z))
            log_px_sum += to_float64(log_px).sum(0)
            log_pz_sum += to_float64(log_pz).sum(0)
        nll = [math.log(k) - log_weights[: samples // k * k].unflatten(0, (-1, k)).logsumexp(1).mean(0) for k in ks]
        kl = vae.prior.closed_form_kl(*posterior)
        if kl is None:
            kl = (-to_float64(posterior.entropy()) - log_pz_sum / samples).unsqueeze(1)
        rows = (-log_px_sum / samples, kl, torch.stack(nll, 1), *posterior)
        yield PerImageBounds(*(row.cpu().double() for row in rows))


def count_decode_floats(vae: VAE) -> int:
    """Count the numbers that exist at most while one z is decoded and its log-probabilities computed."""
    sizes = [vae.prior.count_floats(), 4 * vae.likelihood.params_per_channel * math.prod(vae.image_shape)]
    layers = [layer for layer in vae.decoder.modules() if not any(layer.children())]
    hooks = [layer.register_forward_hook(lambda _, __, output: sizes.append(output.numel())) for layer in layers]
    vae.decode_params(torch.zeros(1, vae.latent_dim).to(next(vae.parameters())))
    for hook in hooks:
        hook.remove()
    return sum(sizes)


def evaluate_resumable(
    vae: VAE,
    x: Tensor,
    ks: list[int],
    seed: int,
    memory_mb: int,
    partial: Path,
    key: dict[str, Any],
    labels: Tensor | None = None,
) -> PerImageBounds:
    """Compute the `importance_bounds` of all images with a progress bar, resuming from a partial file.

    The file `partial` holds the finished groups, and `key` all that they depend on. It is saved every few seconds. The
    caller deletes it.

    Raises:
        UserError: If `partial` exists and was not made by this project.
    """
    require_own_file(partial, "out")
    parts = load_partial(partial, key)
    if parts:
        print(f"resuming after the {len(parts) * RNG_GROUP:,} images in {partial}")
    groups = importance_bounds(vae, x, ks, seed, memory_mb, len(parts) * RNG_GROUP, labels)
    saved = time.monotonic() - SAVE_EVERY_SECONDS
    for part in tqdm(groups, f"images / {RNG_GROUP}", -(-len(x) // RNG_GROUP), initial=len(parts), disable=None):
        parts.append(part)
        if time.monotonic() >= saved + SAVE_EVERY_SECONDS:
            atomic_write_bytes(partial, to_bytes({"key": key, "parts": [tuple(part) for part in parts]}))
            saved = time.monotonic()
    return PerImageBounds.concat(parts)


def load_partial(partial: Path, key: dict[str, Any]) -> list[PerImageBounds]:
    """Load the groups that an interrupted evaluation with the same key has finished."""
    try:
        content = load_torch_file(partial)
        return [PerImageBounds(*part) for part in content["parts"]] if content["key"] == key else []
    except Exception:  # the file is missing or damaged
        return []


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean over images."""
    return values.std().item() / math.sqrt(len(values))


def summarize(vae: VAE, per_image: PerImageBounds, ks: list[int], labels: Tensor | None = None) -> dict[str, Any]:
    """Return the means over images with their standard errors, as in evaluation.json.

    A conditional model needs the labels `(N,)`.
    """
    posterior = Posterior(per_image.mean, per_image.logvar)
    device, dtype = next(vae.parameters()).device, next(vae.parameters()).dtype
    per_dimension = vae.given(labels).kl_per_dimension(Posterior(*(part.to(device, dtype) for part in posterior)))
    aggregate = decompose_kl_by_class(posterior, vae, labels) if vae.classes else decompose_kl(posterior, vae.prior)
    kl = per_image.kl.sum(1)
    terms = {"neg_elbo": per_image.recon + kl, "recon": per_image.recon, "kl": kl}
    terms |= {f"nll_{k}": per_image.nll[:, number] for number, k in enumerate(ks)}
    return {name: {"mean": values.mean().item(), "se": standard_error(values)} for name, values in terms.items()} | {
        "active_units": count_active_units(per_image.mean),
        "kl_per_dimension": per_dimension.double().mean(0).tolist(),
        "aggregate": aggregate,
    }


def format_summary(result: dict[str, Any]) -> str:
    """Format the content of evaluation.json for a terminal: each mean ± its standard error over images."""

    def value(name: str) -> str:
        return f"{result[name]['mean']:8.3f} ± {result[name]['se']:.3f}"

    aggregate = result["aggregate"]
    by_class = aggregate.get("by_class", False)
    lines = [
        f"neg. ELBO       {value('neg_elbo')}   ({result['k'][-1]:,} posterior samples)",
        f"  recon         {value('recon')}",
        f"  KL            {value('kl')}",
        *(f"{'NLL' if not i else '   '} K={k:<9}{value(f'nll_{k}')}" for i, k in enumerate(result["k"])),
        f"active units    {result['active_units']} of {len(result['kl_per_dimension'])}",
        f"KL {aggregate['mutual_information'] + aggregate['marginal_kl']:.2f} = mutual information "
        f"{aggregate['mutual_information']:.2f} (at most log {'N' if by_class else result['images']} = "
        f"{aggregate['mutual_information_limit']:.2f})",
        f"  + KL(aggregate posterior || prior) {aggregate['marginal_kl']:.2f}",
    ]
    if "moments_kl" in aggregate:
        lines[-1] += f", at least {aggregate['moments_kl']:.2f} by its mean and covariance"
    if by_class:
        lines[-1] += " (means over the classes; N: images of a class)"
    if "knn_accuracy" in result:
        lines.append(
            f"labels from posterior means: 5 nearest neighbors {result['knn_accuracy']:.2%}, linear "
            f"{result['linear_accuracy']:.2%}" + (" (the encoder sees the label)" if by_class else "")
        )
    return "\n".join([*lines, f"note  {result['note']}"])
