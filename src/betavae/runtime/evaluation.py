"""Load what the evaluation of a trained run needs, and measure its disentanglement."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from betavae.data.image_set import ImageSet
from betavae.errors import UserError
from betavae.metrics.aggregate_posterior import NEIGHBORS
from betavae.metrics.disentanglement import compute_scores_with_errors
from betavae.models.vae import Posterior
from betavae.runtime.checkpoint import TrainedRun
from betavae.runtime.cli import adapt_commands
from betavae.storage.files import STAMP, atomic_path, hash_file

MIN_SCORED_IMAGES = 500  # the standard errors are over fifths of them
DISENTANGLEMENT_FILE = "disentanglement.json"  # in a run's folder


def load_probe_images(run: TrainedRun, labels: Tensor, data_root: str | None) -> ImageSet | None:
    """Load the training images for the label probes, or say why there are no probes."""
    if find_spec("sklearn") is None:
        reason = 'scikit-learn is not installed; run `pip install -e ".[evaluation]"`'
    elif labels.ndim > 1:
        reason = "these data have several factors in place of one label"
    elif len(labels.unique()) < 2:
        reason = "all test images have one label"
    else:
        train = run.subset("train", data_root)
        if len(train) >= NEIGHBORS and len(train.labels.unique()) > 1:
            return train
        reason = f"they need at least {NEIGHBORS} training images of two classes"
    print(adapt_commands(f"label probes skipped: {reason}"))
    return None


@torch.no_grad()
def measure_disentanglement(
    run: TrainedRun,
    out: Path,
    max_images: int = 10_000,
    latents: str = "mean",
    seed: int = 0,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Compute every disentanglement score on test images and save them as JSON.

    Args:
        run: The trained run.
        out: The JSON file.
        max_images: Test images at most.
        latents: "mean" or "sample" of each posterior.
        seed: Seed of the samples and of the scores.
        data_root: The data folder, if it is not the one of the training.

    Returns:
        The content of the file.

    Raises:
        UserError: For data without two factors that vary, or for too few images.
    """
    if find_spec("sklearn") is None:
        raise UserError('disentanglement scores need scikit-learn: pip install -e ".[evaluation]"')
    x, factors = run.images("test", data_root, max_images)
    if factors.ndim == 1:
        name = run.data["name"]
        raise UserError(f"data.name={name} has no factors of variation; train on data=sprites or data=dsprites")
    if len(x) < MIN_SCORED_IMAGES:
        raise UserError(
            f"max_images={max_images} is invalid for {len(x):,} test images: disentanglement scores need at least "
            f"{MIN_SCORED_IMAGES}"
        )
    posteriors = [run.vae.encode(batch) for batch in x.split(1000)]
    posterior = Posterior(*(torch.cat(parts).float() for parts in zip(*posteriors, strict=True)))
    z = posterior.mean
    if latents == "sample":
        z = posterior.rsample(torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of rare classes and of unfinished optimization
        scores = compute_scores_with_errors(z, factors, seed)
    result: dict[str, Any] = {
        "made_by": STAMP,
        "checkpoint": str(run.path.relative_to(run.folder)),
        "sha256": hash_file(run.path),
        **{"data": run.data["name"], "images": len(x), "latents": latents, "seed": seed},
        **scores,
    }
    with atomic_path(out) as path:
        path.write_text(json.dumps(result, indent=2) + "\n")
    return result
