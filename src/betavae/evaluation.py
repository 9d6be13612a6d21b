"""How good a trained VAE is: its likelihood by importance sampling, and what its latent space holds.

Everything is a pure function of tensors, in nats per image, and the same for any chunk size but for rounding.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from betavae.objectives import ACTIVE_UNIT_VARIANCE, gaussian_kl, log_ratio
from betavae.vae import VAE, Posterior

# Images that share a stream of random numbers. Each sample of a group takes a multiple of 16 of them, which is how many
# torch draws at a time; so the stream is the same however many samples are drawn at once.
GROUP = 32


class PerImage(NamedTuple):
    """One row per image, in double precision on the CPU."""

    distortion: Tensor  # (N,)
    kl: Tensor  # (N, latent_dim)
    nll: Tensor  # (N, number of bounds)
    mean: Tensor  # (N, latent_dim), of the posterior
    logvar: Tensor  # (N, latent_dim)


@torch.no_grad()
def importance_sample(
    vae: VAE,
    x: Tensor,
    ks: list[int],
    seed: int = 0,
    memory_mb: int = 16,
    progress: Callable[[range], Iterable[int]] = lambda groups: groups,
    parts: list[PerImage] | None = None,
) -> PerImage:
    """-E log p(x|z), the KL, and the importance-weighted bounds on -log p(x) (Burda et al. 2016) for each of `ks`.

    With S = max(ks) samples of each image's posterior, the bound for K is the mean over S // K disjoint groups of K of
    them, not over one group. The expectation is the same, a small K has no more noise than a large one, and where each
    K divides the next, the bounds tighten for every image, not just on average. Decoding takes about `memory_mb`. What
    `parts` holds is not done again; each group of images is added to it.
    """
    device, samples = next(vae.parameters()).device, max(ks)
    at_once = max(1, memory_mb * 2**20 // (4 * GROUP * floats_per_image(vae)))
    # glibc hands large blocks back to the system and fetches them anew, at half the time of a chunk here, until it has
    # seen one of this size freed. It is never written to, so it takes no memory.
    torch.empty(31 * 2**18)
    parts = [] if parts is None else parts
    for first in progress(range(len(parts) * GROUP, len(x), GROUP)):
        images = x[first : first + GROUP].to(device)
        posterior = vae.encode(images)
        generator = torch.Generator().manual_seed(seed + 1_000_003 * (first // GROUP))
        log_weights = torch.empty(samples, len(images), dtype=torch.float64, device=device)
        log_px_sum = torch.zeros(len(images), dtype=torch.float64, device=device)
        for chunk in log_weights.split(at_once):
            # Drawn for a whole group, on the CPU: the same on every device and for any number of images.
            noise = torch.randn(len(chunk), GROUP, vae.latent_dim, generator=generator)[:, : len(images)]
            z = posterior.rsample(noise.to(images))
            log_px = vae.likelihood.log_prob(images, vae.decode(z))
            chunk.copy_(log_px + log_ratio(z, posterior))
            log_px_sum += log_px.double().sum(0)
        nll = [math.log(k) - log_weights[: samples // k * k].unflatten(0, (-1, k)).logsumexp(1).mean(0) for k in ks]
        rows = (-log_px_sum / samples, gaussian_kl(posterior), torch.stack(nll, 1), *posterior)
        parts.append(PerImage(*(row.double().cpu() for row in rows)))
    return PerImage(*(torch.cat(rows) for rows in zip(*parts, strict=True)))


def floats_per_image(vae: VAE) -> int:
    """How many numbers there are, at most, while one z is decoded and its log-probability taken."""
    sizes = [4 * math.prod(vae.image_shape)]
    layers = [layer for layer in vae.decoder.modules() if not any(layer.children())]
    hooks = [layer.register_forward_hook(lambda _, __, output: sizes.append(output.numel())) for layer in layers]
    vae.decode(torch.zeros(1, vae.latent_dim).to(next(vae.parameters())))
    for hook in hooks:
        hook.remove()
    return sum(sizes)


def standard_error(values: Tensor) -> float:
    """Of the mean over images."""
    return values.std().item() / math.sqrt(len(values))


def summary(per_image: PerImage, ks: list[int]) -> dict[str, Any]:
    """The means over images, each with its standard error, as evaluation.json has them."""
    rate = per_image.kl.sum(1)
    terms = {"neg_elbo": per_image.distortion + rate, "distortion": per_image.distortion, "rate": rate}
    terms |= {f"nll_{k}": per_image.nll[:, number] for number, k in enumerate(ks)}
    active = per_image.mean.var(0, correction=0) > ACTIVE_UNIT_VARIANCE
    return {name: {"mean": values.mean().item(), "se": standard_error(values)} for name, values in terms.items()} | {
        "active_units": int(active.sum()),
        "kl_per_dimension": per_image.kl.mean(0).tolist(),
        "aggregate": aggregate(Posterior(per_image.mean, per_image.logvar)),
    }


def aggregate(posterior: Posterior, seed: int = 0, rows: int = 500) -> dict[str, float]:
    """How the aggregate posterior q(z) = 1/N sum_n q(z|x_n) of these N images differs from the prior.

    rate = mutual_information + marginal_kl (Hoffman & Johnson 2016, "ELBO surgery"): `mutual_information` is that of z
    and the number n of the image, `marginal_kl` is KL(q(z) || p(z)), both by one z of each q(z|x_n) and the whole sum
    over n. The mutual information cannot exceed log N: where it comes near, N images are too few to fill the latent
    space, and `marginal_kl` is rate - log N, far above that of unseen images. `moments_kl`, from a normal distribution
    with q(z)'s mean and covariance to the prior, is a lower bound of `marginal_kl`, and does not have that fault.
    """
    mean, logvar = posterior
    n, dimensions = mean.shape
    z = posterior.rsample(torch.randn(n, dimensions, generator=torch.Generator().manual_seed(seed)).double())
    precision = torch.exp(-logvar)
    # sum_d (z - mean)^2 / var as two matrix products, for all pairs of z and n.
    constant = (mean**2 * precision + logvar).sum(1)
    log_q = torch.cat(
        [
            (-0.5 * (part**2 @ precision.T + constant) + part @ (mean * precision).T).logsumexp(1) - math.log(n)
            for part in z.split(rows)
        ]
    )
    log_p = -0.5 * (z**2).sum(1)  # as in log_q, less the same constant
    own = -0.5 * ((z - mean) ** 2 * precision + logvar).sum(1)
    centred = mean - mean.mean(0)
    covariance = centred.T @ centred / n + torch.diag(logvar.exp().mean(0))
    moments = 0.5 * (covariance.trace() + (mean.mean(0) ** 2).sum() - dimensions - covariance.logdet())
    return {
        "mutual_information": (own - log_q).mean().item(),
        "mutual_information_limit": math.log(n),
        "marginal_kl": (log_q - log_p).mean().item(),
        "moments_kl": moments.item(),
    }


@torch.no_grad()
def posterior_means(vae: VAE, x: Tensor) -> Tensor:
    device = next(vae.parameters()).device
    return torch.cat([vae.encode(part.to(device)).mean.cpu() for part in x.split(1000)])


def probes(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """Test accuracy of 5 nearest neighbours, and of logistic regression, on posterior means."""
    from sklearn.linear_model import LogisticRegression  # here, since it takes a second
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifiers = {
        "knn_accuracy": KNeighborsClassifier(5, algorithm="brute"),
        "linear_accuracy": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    }
    pairs = [part.numpy() for part in (train, train_labels, test, test_labels)]
    return {name: float(c.fit(*pairs[:2]).score(*pairs[2:])) for name, c in classifiers.items()}
