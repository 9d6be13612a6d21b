"""Which latents to decode: the prior's, or of a density fitted to where the encoder puts the training images.

A decoder learns at z of the aggregate posterior q(z) = 1/N sum_n q(z|x_n), and samples of the prior are decoded where
it learnt little if q(z) is not the prior; the objective does not make it so where latents are many or beta is small.
Dai & Wipf (2019) learn q(z) by a second VAE, and Ghosh et al. (2020) find that a Gaussian mixture fitted afterwards
does as well, for any autoencoder. Fitted here to one z of q(z|x) for each training image:

- gaussian: a normal distribution of full covariance.
- mixture: a mixture of `COMPONENTS` such, by scikit-learn's expectation maximisation from k-means.
- knn: a point between two neighbours, z_i + u (z_j - z_i), with j one of the `NEIGHBOURS` nearest to i and u uniform in
  [0, 1] (SMOTE, Chawla et al. 2002). No density is assumed, but nothing new is found beyond such lines; u = 0 gives a
  reconstruction of a training image.

To add a sampler, write a function of z `(N, latent_dim)` that gives a `Latents` and name it in `SAMPLERS`.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from betavae.errors import UserError
from betavae.metrics.fidelity import find_nearest
from betavae.models.vae import VAE
from betavae.storage.cache import hash_file, load_or_compute

COMPONENTS = 20
NEIGHBOURS = 5
MOST_POINTS = 10_000  # that neighbours are looked for among
MOST_IMAGES = 60_000  # that are worth fitting to


class Mixture(NamedTuple):
    """sum_k weights[k] N(means[k], factors[k] factors[k]^T), K normal distributions in D dimensions."""

    weights: Tensor  # (K,), of sum 1
    means: Tensor  # (K, D)
    factors: Tensor  # (K, D, D)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`(n, D)`."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator)
        return self.means[component] + (self.factors[component] @ noise.unsqueeze(2)).squeeze(2)


class Neighbours(NamedTuple):
    """Points on the lines from each of N points to its nearest others."""

    points: Tensor  # (N, D)
    nearest: Tensor  # (N, NEIGHBOURS) int64, places in `points`

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`(n, D)`."""
        first = torch.randint(len(self.points), (n,), generator=generator)
        choice = torch.randint(self.nearest.shape[1], (n,), generator=generator)
        start, end = self.points[first], self.points[self.nearest[first, choice]]
        return torch.lerp(start, end, torch.rand(n, 1, generator=generator))


LatentSampler = Mixture | Neighbours


def prior(z: Tensor) -> Mixture:
    """N(0, I), whatever `z` are."""
    dimensions = z.shape[1]
    return Mixture(torch.ones(1), torch.zeros(1, dimensions), torch.eye(dimensions).unsqueeze(0))


def gaussian(z: Tensor) -> Mixture:
    covariance = torch.cov(z.double().T).view(1, z.shape[1], -1)
    return Mixture(torch.ones(1), z.mean(0, keepdim=True), torch.linalg.cholesky(covariance).float())


def mixture(z: Tensor) -> Mixture:
    try:
        from sklearn.mixture import GaussianMixture  # here, since it takes a second
    except ImportError:
        raise UserError('sampler=mixture needs scikit-learn: pip install -e ".[evaluation]"') from None
    components = min(COMPONENTS, 1 + len(z) // (5 * z.shape[1]))
    found = GaussianMixture(components, random_state=0, reg_covar=1e-4).fit(z.double().numpy())
    factors = torch.linalg.cholesky(torch.from_numpy(found.covariances_))
    return Mixture(*(torch.as_tensor(part).float() for part in (found.weights_, found.means_, factors)))


def knn(z: Tensor) -> Neighbours:
    points = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[:MOST_POINTS]]
    # The nearest is the point itself.
    return Neighbours(points, find_nearest(points, points, NEIGHBOURS + 1)[1][:, 1:])


SAMPLERS: dict[str, Callable[[Tensor], LatentSampler]] = {
    "prior": prior,
    "gaussian": gaussian,
    "mixture": mixture,
    "knn": knn,
}


@torch.no_grad()
def posterior_samples(vae: VAE, x: Tensor, seed: int = 0) -> Tensor:
    """One z of q(z|x) for each image: `(N, latent_dim)`, on the CPU."""
    device, generator = next(vae.parameters()).device, torch.Generator().manual_seed(seed)
    parts = []
    for images in x.split(1000):
        noise = torch.randn(len(images), vae.latent_dim, generator=generator)
        parts.append(vae.encode(images.to(device)).rsample(noise.to(device)).cpu())
    return torch.cat(parts)


def load_or_fit_sampler(
    sampler: str,
    vae: VAE,
    training: Callable[[], tuple[Tensor, Tensor]],
    checkpoint: Path,
    folder: Path,
    digit: int | None = None,
) -> LatentSampler:
    """A sampler of `SAMPLERS`, fitted to the images that `training()` gives, of all labels or of the one `digit`.

    It is kept in `folder` under a name with the hash of the file `checkpoint`, from which `vae` was loaded and which
    says what the training images are. With `digit` it is fitted anew if their labels have changed. Raises UserError if
    there are too few such images.
    """
    if sampler == "prior":
        if digit is not None:
            raise UserError(f"digit={digit} goes with sampler=gaussian, mixture or knn: the prior knows no labels")
        return prior(torch.empty(0, vae.latent_dim))

    def fit() -> dict[str, list[Tensor]]:
        x = images if images is not None else training()[0]
        if len(x) < max(2 * vae.latent_dim, NEIGHBOURS + 2):
            raise UserError(f"sampler={sampler} cannot be fitted to {len(x)} images in {vae.latent_dim} dimensions")
        return {"parts": list(SAMPLERS[sampler](posterior_samples(vae, x)))}

    hashed, images, label = hash_file(checkpoint), None, ""
    asked = {"sampler": sampler, "digit": digit, "checkpoint": hashed, "version": 2}
    if digit is not None:
        x, labels = training()
        if labels.ndim != 1:
            raise UserError(f"digit={digit} cannot be: these data have several factors in place of one label")
        images, label = x[labels == digit], f"_{digit}"
        if not len(images):
            raise UserError(f"digit={digit} cannot be: the labels are {int(labels.min())} to {int(labels.max())}")
        asked["labels"] = hashlib.sha256(labels.contiguous().numpy().data).hexdigest()[:16]
    parts = load_or_compute(folder / f"sampler_{sampler}{label}_{hashed}.pt", asked, fit)["parts"]
    return Neighbours(*parts) if sampler == "knn" else Mixture(*parts)
