"""Samplers of latents from the prior or from a density fitted to posterior samples.

A decoder is trained at z of the aggregate posterior q(z) = 1/N sum_n q(z|x_n). Samples of the prior decode poorly where
q(z) differs from it, as with many latent dimensions or a small beta. Dai & Wipf (2019) learn q(z) with a second VAE;
Ghosh et al. (2020) find that a Gaussian mixture fitted afterwards works as well. The samplers here are fitted to one
sample of q(z|x) for each training image:

- gaussian: a normal distribution with full covariance.
- mixture: a mixture of up to `MAX_COMPONENTS` such distributions, by expectation maximization from k-means.
- knn: z_i + u (z_j - z_i), with j among the `NUM_NEIGHBORS` nearest neighbors of i and u uniform in [0, 1] (SMOTE,
  Chawla et al. 2002). It assumes no density and does not leave these lines; u = 0 reconstructs a training image.

To add a sampler, write a function from z `(N, latent_dim)` to a `FittedSampler` and register it in `SAMPLERS`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from betavae.applications.trained_run import TrainedRun
from betavae.data.fingerprint import hash_labels
from betavae.data.image_set import ImageSet
from betavae.data.labels import describe_classes, find_class
from betavae.errors import UserError
from betavae.metrics.fidelity import find_nearest
from betavae.models.priors import Prior
from betavae.models.vae import VAE
from betavae.storage.cache import load_or_compute
from betavae.storage.files import hash_file

MAX_COMPONENTS = 20
NUM_NEIGHBORS = 5
MAX_NEIGHBOR_POINTS = 10_000
MAX_FIT_IMAGES = 60_000
ENCODE_BATCH = 1000


class Mixture(NamedTuple):
    """Gaussian mixture of K components in D dimensions.

    Its density is sum_k weights[k] N(means[k], factors[k] factors[k]^T).
    """

    weights: Tensor  # (K,), sums to 1
    means: Tensor  # (K, D)
    factors: Tensor  # (K, D, D)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `(n, D)`."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator)
        return self.means[component] + (self.factors[component] @ noise.unsqueeze(2)).squeeze(2)


class NeighborLines(NamedTuple):
    """Uniform distribution on the lines from N points to their nearest neighbors."""

    points: Tensor  # (N, D)
    neighbors: Tensor  # (N, NUM_NEIGHBORS) int64, indices into `points`

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `(n, D)`."""
        first = torch.randint(len(self.points), (n,), generator=generator)
        choice = torch.randint(self.neighbors.shape[1], (n,), generator=generator)
        start, end = self.points[first], self.points[self.neighbors[first, choice]]
        return torch.lerp(start, end, torch.rand(n, 1, generator=generator))


class PriorSampler(NamedTuple):
    """The prior of a model, N(0, I) or a learned one."""

    prior: Prior

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `(n, D)` on the CPU."""
        # As in a mixture, so that one seed gives N(0, I) and `fit_gaussian` the same noise.
        torch.multinomial(torch.ones(1), n, replacement=True, generator=generator)
        return self.prior.sample(n, generator=generator).cpu()


FittedSampler = Mixture | NeighborLines


class ClassSamplers(NamedTuple):
    """A sampler for each class of a conditional model."""

    labels: Tensor  # (N,) of the N samples to draw, or (1,) for all
    samplers: dict[int, FittedSampler]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `(n, D)` on the CPU, for `n` labels."""
        labels, z = self.labels.expand(n), {}
        for label, sampler in self.samplers.items():
            z[label] = iter(sampler.sample(int((labels == label).sum()), generator))
        return torch.stack([next(z[label]) for label in labels.tolist()])


def fit_gaussian(z: Tensor) -> Mixture:
    """Fit one normal distribution with full covariance."""
    covariance = torch.cov(z.double().T).view(1, z.shape[1], -1)
    return Mixture(torch.ones(1), z.mean(0, keepdim=True), torch.linalg.cholesky(covariance).float())


def fit_mixture(z: Tensor) -> Mixture:
    """Fit a Gaussian mixture with full covariances."""
    try:
        from sklearn.mixture import GaussianMixture  # Imported here because it takes a second.
    except ImportError:
        raise UserError('sampler=mixture needs scikit-learn: pip install -e ".[evaluation]"') from None
    components = min(MAX_COMPONENTS, 1 + len(z) // (5 * z.shape[1]))
    fitted = GaussianMixture(components, random_state=0, reg_covar=1e-4).fit(z.double().numpy())
    factors = torch.linalg.cholesky(torch.from_numpy(fitted.covariances_))
    return Mixture(*(torch.as_tensor(part).float() for part in (fitted.weights_, fitted.means_, factors)))


def fit_knn(z: Tensor) -> NeighborLines:
    """Find the nearest neighbors of up to `MAX_NEIGHBOR_POINTS` of the points."""
    points = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[:MAX_NEIGHBOR_POINTS]]
    # The nearest point is the point itself.
    return NeighborLines(points, find_nearest(points, points, NUM_NEIGHBORS + 1)[1][:, 1:])


SAMPLERS: dict[str, Callable[[Tensor], FittedSampler] | None] = {
    "prior": None,  # not fitted: the model has it
    "gaussian": fit_gaussian,
    "mixture": fit_mixture,
    "knn": fit_knn,
}


@torch.no_grad()
def sample_posterior(vae: VAE, x: Tensor, seed: int = 0, labels: Tensor | None = None) -> Tensor:
    """Draw one z of q(z|x) for each image, `(N, latent_dim)` on the CPU.

    A conditional model needs `labels` `(N,)`.
    """
    device, generator = next(vae.parameters()).device, torch.Generator().manual_seed(seed)
    samples = []
    for index in torch.arange(len(x)).split(ENCODE_BATCH):
        noise = torch.randn(len(index), vae.latent_dim, generator=generator)
        view = vae.given(None if labels is None else labels[index])
        samples.append(view.encode(x[index].to(device)).rsample(noise.to(device)).cpu())
    return torch.cat(samples)


def load_or_fit_sampler(
    name: str,
    run: TrainedRun,
    data_root: str | None = None,
    label: object = None,
    labels: Tensor | None = None,
) -> FittedSampler | PriorSampler | ClassSamplers:
    """Fit a sampler to the training images of a run, or load it from the run folder.

    The cached file has the hash of the checkpoint in its name, which determines the training images. With `label`, the
    sampler of an unconditional model is also fitted again when the labels have changed.

    Args:
        name: A key of `SAMPLERS`.
        run: The run whose VAE encodes the images.
        data_root: The folder of the training data; None for the folder used in training.
        label: Fit to the images with this label only.
        labels: Class numbers of the samples to draw, which a conditional model needs: `(N,)`, or `(1,)` for all.

    Raises:
        UserError: If there are too few such images, or the data have no such label.
    """
    fit_density = SAMPLERS[name]
    if fit_density is None:
        if label is not None and not run.vae.classes:
            expected = "expected null with sampler=prior, since the model is not conditional"
            raise UserError(
                f"label={label} is invalid: {expected} (pass sampler=mixture, or train with model.conditional=true)"
            )
        return PriorSampler(run.vae.given(labels).prior)
    fit = partial(load_or_fit, name, fit_density, run)
    if label is None and not run.vae.classes:
        return fit(None, "", lambda: run.images("train", data_root, MAX_FIT_IMAGES))
    train = run.subset("train", data_root, MAX_FIT_IMAGES)
    digest = hash_labels(train)

    def fit_class(number: int) -> FittedSampler:
        def read() -> tuple[Tensor, Tensor]:
            chosen = train.labels == number
            return run.scaling.apply(train.pixels[chosen]), train.labels[chosen]

        return fit(number, digest, read)

    if label is not None:
        number = find_class(label, run.vae.classes) if run.vae.classes else train.find_label(label)
        check_label(train, number, label)
        return fit_class(number)
    if labels is None:
        raise ValueError("a conditional VAE needs the labels of the samples")
    return ClassSamplers(labels, {number: fit_class(number) for number in labels.unique().tolist()})


def load_or_fit(
    name: str,
    fit_density: Callable[[Tensor], FittedSampler],
    run: TrainedRun,
    label: int | None,
    digest: str,
    read: Callable[[], tuple[Tensor, Tensor]],
) -> FittedSampler:
    """Load a sampler from the run folder, or fit it to the images and labels that `read` returns.

    Args:
        name: The name of the sampler, for its file.
        fit_density: The fit, a value of `SAMPLERS`.
        run: The run.
        label: The number of the images' class; None for all images.
        digest: The hash of the labels of the training images, on which the choice of the images depends.
        read: The training images as the model sees them, and their labels.
    """
    checkpoint = hash_file(run.path)
    key = {"sampler": name, "label": label, "labels": digest, "checkpoint": checkpoint, "version": 3}

    def fit() -> dict[str, list[Tensor]]:
        x, labels = read()
        min_images = max(2 * run.vae.latent_dim, NUM_NEIGHBORS + 2)
        if len(x) < min_images:
            of = "" if label is None else f" of class {run.vae.classes[label] if run.vae.classes else label}"
            raise UserError(
                f"sampler={name} needs at least {min_images} training images{of} for {run.vae.latent_dim} latent "
                f"dimensions, and there are {len(x)} (sampler=prior needs none)"
            )
        return {"parts": list(fit_density(sample_posterior(run.vae, x, labels=labels)))}

    suffix = "" if label is None else f"_{label}"
    parts = load_or_compute(run.folder / f"sampler_{name}{suffix}_{checkpoint}.pt", key, fit)["parts"]
    return NeighborLines(*parts) if name == "knn" else Mixture(*parts)


def check_label(train: ImageSet, number: int, label: object) -> None:
    """Raise UserError if the training images do not have single labels, or none has this number."""
    if train.labels.ndim != 1:
        raise UserError(f"label={label} is invalid: expected null (these data have several factors, not one label)")
    if number not in train.labels:
        found = [train.classes[i] if train.classes else str(i) for i in train.labels.unique().tolist()]
        raise UserError(f"label={label} is invalid: expected {describe_classes(found)}, as the training images have")
