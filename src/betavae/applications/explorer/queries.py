"""Computations behind the page, as plain functions.

Latent vectors are in the model's own order of dimensions; `build_page_state` has the order by KL.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from betavae.applications.trained_run import TrainedRun
from betavae.data.file_listing import as_text
from betavae.data.image_set import ImageSet
from betavae.errors import UserError
from betavae.metrics.embedding import compute_tsne
from betavae.metrics.likelihood import importance_bounds
from betavae.models.vae import VAE, Posterior

MAX_MODELS = 8
MAX_MAP_IMAGES = 10_000
MAX_TSNE_IMAGES = 2000  # a t-SNE of more takes too long to wait for
REFERENCE_IMAGES = 500  # test images with which the neg. ELBO of an image is compared
ELBO_SAMPLES = 32
SEED = 0
BATCH_SIZE = 1000
# Data settings that do not change the test images.
IRRELEVANT_SETTINGS = ("root", "cache", "batch_size", "eval_batch_size", "seed", "validation_size")

PValueFunction = Callable[..., Tensor]  # images (N, C, H, W), labels=(N,) or None -> p-values (N,)


@dataclass(frozen=True)
class LoadedModel:
    """A run, with its posteriors of the test images."""

    name: str
    run: TrainedRun
    means: Tensor  # (N, latent_dim), of the posteriors
    kl: Tensor  # (latent_dim,) nats, mean over the test images
    reference: Tensor  # (R,) nats, sorted neg. ELBO of some test images
    compute_p_values: PValueFunction | None

    @property
    def vae(self) -> VAE:
        return self.run.vae

    @cached_property
    def tsne(self) -> Tensor:
        """The t-SNE of the first posterior means, `(N, 2)`."""
        return compute_tsne(self.means[:MAX_TSNE_IMAGES], SEED)


@dataclass(frozen=True)
class Explorer:
    """Models side by side, and the test images they share."""

    models: list[LoadedModel]
    images: ImageSet

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W)."""
        return tuple(self.images.pixels.shape[1:])

    @property
    def conditions(self) -> tuple[str, ...]:
        """The classes of conditional models; none if no model is conditional."""
        return next((model.vae.classes for model in self.models if model.vae.classes), ())

    def check_label(self, label: int | None) -> Tensor | None:
        """Return a label as `(1,)`.

        Raises:
            UserError: If a model needs one and there is none, or it is not a class.
        """
        if not self.conditions:
            return None
        if label is None or label >= len(self.conditions):
            found = "null" if label is None else label
            raise UserError(f"label={found} is invalid: expected 0 to {len(self.conditions) - 1}, a class of the model")
        return torch.tensor([label])


class LatentMap(NamedTuple):
    """A plane through latent space, on which z is at (z - center) @ axes."""

    points: Tensor  # (N, 2), of the test images
    center: Tensor  # (latent_dim,)
    axes: Tensor  # (latent_dim, 2)
    share: list[float]  # of the variance of the posterior means, per axis


class Score(NamedTuple):
    """A number that the page shows for an image under a model."""

    name: str
    value: float
    unit: str
    meaning: str


def list_runs(name: str | None) -> list[str | None]:
    """List the run folders of a sweep folder, sorted by the numbers in their names.

    Any other name is returned alone.
    """
    folder = Path(name).expanduser() if name else None
    if folder is None or not folder.is_dir() or (folder / "checkpoints").is_dir():
        return [name]

    def sort_key(path: str) -> list[str | float]:
        parts = re.split(r"(\d+(?:\.\d+)?)", path)
        return [float(part) if i % 2 else part for i, part in enumerate(parts)]

    runs = {str(path.parents[1]) for path in folder.glob("*/checkpoints/*.ckpt")}
    return [*sorted(runs, key=sort_key)] or [name]


def load_models(
    runs: Sequence[TrainedRun], root: str | None = None, p_values: Sequence[PValueFunction | None] | None = None
) -> Explorer:
    """Encode the test images of runs with the same data.

    Args:
        runs: Runs as `betavae.load` returns them.
        root: The folder of the data; None for the folder used in training.
        p_values: For each run, the p-values of an anomaly detector if it has one.

    Raises:
        UserError: If there are too many runs, their data differ, or an output is not finite.
    """
    if len(runs) > MAX_MODELS:
        raise UserError(f"ckpt: {len(runs)} runs are too many to show side by side; name at most {MAX_MODELS}")
    # The data of a conditional run are checked for changed labels.
    images = next((run for run in runs if run.vae.classes), runs[0]).split("test", root)
    images = images.select(torch.arange(min(MAX_MAP_IMAGES, len(images))))
    first = identify_test_images(runs[0])
    for run in runs[1:]:
        if identify_test_images(run) != first:
            raise UserError(
                f"ckpt: {runs[0].path} and {run.path} were trained on different data ({first}, "
                f"{identify_test_images(run)}); name runs trained on the same data"
            )
    conditional = [run for run in runs if run.vae.classes]
    for run in conditional[1:]:
        if run.fingerprints.get("test labels") != conditional[0].fingerprints.get("test labels"):
            raise UserError(
                f"ckpt: {conditional[0].path} and {run.path} were trained on different labels; name runs trained on "
                "the same data"
            )
    columns = zip(label_runs(runs), runs, p_values or [None] * len(runs), strict=True)
    return Explorer([load_model(name, run, images, function) for name, run, function in columns], images)


def identify_test_images(run: TrainedRun) -> dict[str, Any]:
    """Collect what determines the test images of a run, as its model sees them."""
    settings = {key: value for key, value in run.data.items() if key not in IRRELEVANT_SETTINGS}
    return settings | {"fingerprint": run.fingerprints.get("test")}


@torch.no_grad()
def load_model(name: str, run: TrainedRun, images: ImageSet, p_values: PValueFunction | None = None) -> LoadedModel:
    """Encode the test images with the model of a run."""
    batches = [
        run.vae.given(images.labels[index]).encode(select_images(run, images, index))
        for index in torch.arange(len(images)).split(BATCH_SIZE)
    ]
    posterior = Posterior(*(torch.cat(rows) for rows in zip(*batches, strict=True)))
    if not all(part.isfinite().all() for part in posterior):
        raise UserError(f"ckpt: {run.path} has outputs that are not finite; name another checkpoint")
    # Evenly spaced, since a test set may be sorted.
    index = torch.linspace(0, len(images) - 1, min(REFERENCE_IMAGES, len(images))).round().long()
    x, labels = select_images(run, images, index), images.labels[index]
    groups = importance_bounds(run.vae, x, [ELBO_SAMPLES], SEED, labels=labels)
    reference = torch.cat([group.recon + group.kl.sum(1) for group in groups])
    kl = run.vae.given(images.labels).kl_per_dimension(posterior).mean(0)
    return LoadedModel(name, run, posterior.mean, kl, reference.sort().values, p_values)


def select_images(run: TrainedRun, images: ImageSet, index: Tensor) -> Tensor:
    """Select images as the model of a run sees them: `(B, C, H, W)`."""
    return run.scaling.apply(images.pixels.index_select(0, index))


def label_runs(runs: Sequence[TrainedRun]) -> list[str]:
    """Label each run by the settings in which runs differ, and by its folder where these are equal."""
    flat = [dict(flatten(run.settings)) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    differing = [key for key in keys if len({str(settings.get(key)) for settings in flat}) > 1]
    labels = [
        ", ".join(f"{key.rpartition('.')[2]}={settings[key]}" for key in differing if key in settings)
        for settings in flat
    ]
    return [
        label if label and labels.count(label) == 1 else as_text(f"{label} {run.folder.resolve().name}".strip())
        for label, run in zip(labels, runs, strict=True)
    ]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over nested settings with dotted keys."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def build_page_state(explorer: Explorer) -> dict[str, Any]:
    """Collect what the page needs to be drawn, as plain values.

    `centers` are the means of the prior, one for each class of conditional models. `reach` is the largest distance
    from 0, in each dimension, of the test images' posterior means and of three standard deviations of the prior around
    its means.
    """
    labels, run = explorer.images.labels, explorer.models[0].run
    conditions = torch.arange(len(explorer.conditions)).split(1) or (None,)
    moments = [[model.vae.given(label).prior.moments() for label in conditions] for model in explorer.models]
    reaches = [
        torch.stack([model.means.abs().amax(0), *(mean.abs() + 3 * std for mean, std in own)]).amax(0)
        for model, own in zip(explorer.models, moments, strict=True)
    ]
    return {
        "shape": list(explorer.image_shape),
        "data": run.data["name"],
        "images": len(explorer.images),
        "labels": (labels[:, None] if labels.ndim == 1 else labels).T.tolist(),
        "classes": explorer.images.classes,
        "conditions": list(explorer.conditions),
        "note": run.vae.describe_numbers(run.data["binarize"], run.scaling.describe(run.vae.image_shape)),
        "runs": [
            {
                "name": model.name,
                "path": as_text(str(model.run.path)),
                "beta": model.run.settings["beta"],
                "kl": model.kl.tolist(),
                "order": sort_by_kl(model).tolist(),
                "centers": [mean.tolist() for mean, _ in own],
                "reach": reach.tolist(),
            }
            for model, own, reach in zip(explorer.models, moments, reaches, strict=True)
        ],
    }


def sort_by_kl(model: LoadedModel) -> Tensor:
    """Sort the latent dimensions by descending KL."""
    return model.kl.argsort(descending=True, stable=True)


@torch.no_grad()
def sample_prior(explorer: Explorer, label: Tensor | None = None) -> list[Tensor]:
    """Draw a sample of each model's prior, `(latent_dim,)`.

    Dimensions of equal rank by KL get the same noise. `label` is (1,), for conditional models.
    """
    uniform, noise = torch.rand(1), torch.randn(max(model.vae.latent_dim for model in explorer.models))
    samples = []
    for model in explorer.models:
        own = torch.empty(1, model.vae.latent_dim)
        own[0, sort_by_kl(model)] = noise[: model.vae.latent_dim]
        samples.append(model.vae.given(label).prior.transform(own, uniform)[0])
    return samples


@torch.no_grad()
def decode_latents(model: LoadedModel, z: Tensor, label: Tensor | None = None) -> Tensor:
    """Decode `(B, latent_dim)` to pictures of the means of p(x|z), `(B, C, H, W)` in [0, 1].

    `label` is (1,), for a conditional model.
    """
    return model.run.scaling.to_picture(model.vae.given(label).decode(z)).clamp(0, 1)


@torch.no_grad()
def encode_image(model: LoadedModel, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, list[Score]]:
    """Compute the posterior mean `(latent_dim,)` and the scores of an image `(C, H, W)`.

    `x` is the image as the model sees it. `label` is (1,), for a conditional model.
    """
    (bounds,) = importance_bounds(model.vae, x[None], [ELBO_SAMPLES], SEED, labels=label)
    recon, kl = bounds.recon.item(), bounds.kl.sum().item()
    percentile = compute_percentile(model.reference, recon + kl)
    scores = [
        Score("neg. ELBO", recon + kl, "nats", f"recon + KL, from {ELBO_SAMPLES} posterior samples"),
        Score("recon", recon, "nats", "-E log p(x|z)"),
        Score("KL", kl, "nats", "KL(q(z|x) || p(z))"),
        Score("anomaly", percentile, "%", f"share of {len(model.reference):,} test images with a lower neg. ELBO"),
    ]
    if model.compute_p_values:
        meaning = "share of ordinary images at least as anomalous, by the anomaly detector (docs/anomalies.md)"
        scores.append(Score("p-value", 100 * model.compute_p_values(x[None], labels=label).item(), "%", meaning))
    return model.vae.given(label).encode(x[None]).mean[0], scores


def compute_percentile(reference: Tensor, value: float) -> float:
    """Compute the share of reference values below `value` in percent; equal ones count half."""
    if math.isnan(value):
        return math.nan
    below = ((reference < value).sum() + (reference <= value).sum()).item() / 2
    return 100 * below / len(reference)


def compute_map(model: LoadedModel, axes: Literal["pca", "largest"]) -> LatentMap:
    """Project the test images' posterior means onto a plane.

    Args:
        model: The model with its posterior means.
        axes: "pca" for the first two principal components, "largest" for the two dimensions with the largest KL.
    """
    means = model.means
    dimensions = means.shape[1]
    covariance = means.double().T.cov(correction=0).view(dimensions, dimensions)  # 0 for a single image
    if axes == "pca":
        center = means.mean(0)
        plane = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :2]
        # The sign of an eigenvector is arbitrary, so its largest entry is made positive.
        plane = plane * plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()
    else:
        center = model.vae.prior.moments()[0]
        plane = torch.eye(dimensions).double()[:, sort_by_kl(model)[:2]]
    plane = torch.nn.functional.pad(plane, (0, 2 - plane.shape[1])).float()  # A 1-D latent space has no second axis.
    points = (means - center) @ plane
    share = points.double().var(0, correction=0) / (covariance.trace().item() or 1)
    return LatentMap(points, center, plane, share.tolist())


def decode_path(model: LoadedModel, start: Tensor, end: Tensor, steps: int, label: Tensor | None = None) -> Tensor:
    """Decode the line between two latents `(latent_dim,)`: `(steps, C, H, W)`. `label` is (1,)."""
    weight = torch.linspace(0, 1, steps)[:, None]
    return decode_latents(model, (1 - weight) * start + weight * end, label)
