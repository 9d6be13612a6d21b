"""What the page asks of trained models, as plain functions.

Latent vectors have the model's own order of dimensions; `state` says which dimension has the largest KL.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from betavae.data.file_listing import as_text
from betavae.data.image_set import ImageSet
from betavae.errors import UserError
from betavae.metrics.likelihood import importance_bounds
from betavae.models.vae import VAE, Posterior
from betavae.objectives.elbo import gaussian_kl

MAX_MAP_IMAGES = 10_000  # test images on the map; of a larger test set the first
REFERENCE_IMAGES = 500  # test images that an image's neg. ELBO is compared with
ELBO_SAMPLES = 32  # of an image's posterior, for its neg. ELBO
SEED = 0
MOST_RUNS = 8  # side by side
CHUNK = 1000  # images that are encoded at once
# Settings of the data that do not change the test images.
IRRELEVANT = ("root", "cache", "batch_size", "eval_batch_size", "seed", "validation_size")


PValue = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LoadedModel:
    """A run, and what is known beforehand of the test images under it."""

    name: str
    run: Any  # as `betavae.load` gives it
    means: Tensor  # (N, latent_dim), of the posteriors
    kl: Tensor  # (latent_dim,) in nats, the mean over the images
    reference: Tensor  # (R,) in nats: neg. ELBO of some of the images, ascending
    p_value: PValue | None  # of images (N, C, H, W) being of the training kind, (N,)

    @property
    def vae(self) -> VAE:
        return self.run.vae


@dataclass(frozen=True)
class Explorer:
    """Runs side by side and the test images, bytes as the models see them, which they share."""

    runs: list[LoadedModel]
    images: ImageSet

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return tuple(self.images.pixels.shape[1:])


class Map(NamedTuple):
    """The plane of a 2-D map: a latent z lies at (z - centre) @ axes."""

    points: Tensor  # (N, 2), of the test images
    centre: Tensor  # (latent_dim,)
    axes: Tensor  # (latent_dim, 2)
    share: list[float]  # of the variance of all posterior means that each axis has


class Score(NamedTuple):
    """What the page says of an image under a model."""

    name: str
    value: float
    unit: str
    meaning: str


def load_models(
    runs: Sequence[Any], root: str | None = None, p_values: Sequence[PValue | None] | None = None
) -> Explorer:
    """Runs, as `betavae.load` gives them, and the first test images of their data, in `root` (None: where they were
    in training); `p_values`, where a run has one, tell how ordinary an image is.

    Raises UserError for too many runs, for runs of different data, and for a model whose numbers are not finite.
    """
    if len(runs) > MOST_RUNS:
        raise UserError(f"ckpt: {len(runs)} runs are too many to show side by side; name {MOST_RUNS} of them at most")
    images = runs[0].split("test", root)
    images = images.select(torch.arange(min(MAX_MAP_IMAGES, len(images))))
    for run in runs[1:]:
        if test_images(run) != test_images(runs[0]):
            raise UserError(
                f"ckpt: {runs[0].path} and {run.path} were trained on different data ({test_images(runs[0])}, "
                f"{test_images(run)}); side by side, runs must be of the same"
            )
    each = zip(run_labels(runs), runs, p_values or [None] * len(runs), strict=True)
    return Explorer([load_model(name, run, images, p_value) for name, run, p_value in each], images)


def test_images(run: Any) -> dict[str, Any]:
    """Identify the test images of a run, as its model sees them."""
    settings = {key: value for key, value in run.data.items() if key not in IRRELEVANT}
    return settings | {"fingerprint": run.fingerprints.get("test")}


@torch.no_grad()
def load_model(name: str, run: Any, images: ImageSet, p_value: PValue | None = None) -> LoadedModel:
    chunks = [run.vae.encode(pixels_at(images, part)) for part in torch.arange(len(images)).split(CHUNK)]
    posterior = Posterior(*(torch.cat(rows) for rows in zip(*chunks, strict=True)))
    if not all(part.isfinite().all() for part in posterior):
        raise UserError(f"ckpt: {run.path} gives numbers that are not finite, so there is nothing to explore")
    # From all over: a test set may be sorted.
    some = pixels_at(images, torch.linspace(0, len(images) - 1, min(REFERENCE_IMAGES, len(images))).round().long())
    reference = torch.cat(
        [part.distortion + part.kl.sum(1) for part in importance_bounds(run.vae, some, [ELBO_SAMPLES])]
    )
    return LoadedModel(name, run, posterior.mean, gaussian_kl(posterior).mean(0), reference.sort().values, p_value)


def pixels_at(images: ImageSet, index: Tensor) -> Tensor:
    """`(B, C, H, W)` in [0, 1]"""
    return images.pixels.index_select(0, index).float() / 255


def run_labels(runs: Sequence[Any]) -> list[str]:
    """What to call each run: the settings in which they differ; where these do not tell, its folder."""
    flat = [dict(flattened(run.settings)) for run in runs]
    differ = [
        key for key in dict.fromkeys(key for one in flat for key in one) if len({str(f.get(key)) for f in flat}) > 1
    ]
    labels = [", ".join(f"{key.rpartition('.')[2]}={one[key]}" for key in differ if key in one) for one in flat]
    return [
        label if label and labels.count(label) == 1 else as_text(f"{label} {run.folder.resolve().name}".strip())
        for label, run in zip(labels, runs, strict=True)
    ]


def flattened(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in settings.items():
        pairs += flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def page_state(explorer: Explorer) -> dict[str, Any]:
    """What the page must know to be drawn; plain values. `reach` is how far from 0 the posterior means of the test
    images get in each dimension."""
    labels, run = explorer.images.labels, explorer.runs[0].run
    return {
        "shape": list(explorer.shape),
        "data": run.data["name"],
        "images": len(explorer.images),
        "labels": (labels[:, None] if labels.ndim == 1 else labels).T.tolist(),
        "classes": explorer.images.classes,
        "note": run.vae.likelihood.describe(run.data["binarize"]),
        "runs": [
            {
                "name": each.name,
                "path": as_text(str(each.run.path)),
                "beta": each.run.settings["beta"],
                "kl": each.kl.tolist(),
                "order": each.kl.argsort(descending=True, stable=True).tolist(),
                "reach": each.means.abs().amax(0).tolist(),
            }
            for each in explorer.runs
        ],
    }


@torch.no_grad()
def decode(explored: LoadedModel, z: Tensor) -> Tensor:
    """`(B, latent_dim)` -> means of p(x|z), `(B, C, H, W)` in [0, 1]."""
    return explored.vae.decode(z).clamp(0, 1)


@torch.no_grad()
def encode(explored: LoadedModel, x: Tensor) -> tuple[Tensor, list[Score]]:
    """The posterior mean `(latent_dim,)` of an image `(C, H, W)` in [0, 1], and its scores."""
    (per_image,) = importance_bounds(explored.vae, x[None], [ELBO_SAMPLES], SEED)
    distortion, rate = per_image.distortion.item(), per_image.kl.sum().item()
    scores = [
        Score("neg. ELBO", distortion + rate, "nats", f"distortion + rate, by {ELBO_SAMPLES} posterior samples"),
        Score("distortion", distortion, "nats", "-E log p(x|z)"),
        Score("rate", rate, "nats", "KL(q(z|x) || N(0, I))"),
        Score(
            "anomaly",
            percentile(explored, distortion + rate),
            "%",
            f"so many of {len(explored.reference):,} test images have a lower neg. ELBO",
        ),
    ]
    if explored.p_value:
        meaning = "the anomaly score's: so many ordinary images are at least as strange (docs/anomalies.md)"
        scores.append(Score("p-value", 100 * explored.p_value(x[None]).item(), "%", meaning))
    return explored.vae.encode(x[None]).mean[0], scores


def percentile(explored: LoadedModel, neg_elbo: float) -> float:
    """How many of the reference images, in per cent, have a lower neg. ELBO; those of the same value count half."""
    reference = explored.reference
    below, upto = ((reference < neg_elbo).sum() + (reference <= neg_elbo).sum()).item() / 2, len(reference)
    return math.nan if math.isnan(neg_elbo) else 100 * below / upto


def latent_map(explored: LoadedModel, axes: Literal["pca", "largest"]) -> Map:
    """Where the test images' posterior means lie: along their first two principal components, or by the two dimensions
    with the largest KL."""
    means = explored.means
    dimensions = means.shape[1]
    covariance = means.double().T.cov().view(dimensions, dimensions)
    total, centre = covariance.trace(), means.mean(0)
    if axes == "pca":
        chosen = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :2]
        # An eigenvector's sign is arbitrary: its largest entry shall be positive.
        chosen = chosen * chosen.gather(0, chosen.abs().argmax(0, keepdim=True)).sign()
    else:
        chosen = torch.eye(dimensions).double()[:, explored.kl.argsort(descending=True, stable=True)[:2]]
        centre = torch.zeros(dimensions)
    chosen = torch.nn.functional.pad(chosen, (0, 2 - chosen.shape[1])).float()  # one dimension has no second axis
    points = (means - centre) @ chosen
    return Map(points, centre, chosen, (points.double().var(0) / total).tolist())


def latent_path(explored: LoadedModel, start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Decoded means on the line from one latent `(latent_dim,)` to another: `(steps, C, H, W)`."""
    weight = torch.linspace(0, 1, steps)[:, None]
    return decode(explored, (1 - weight) * start + weight * end)
