"""An evaluation that goes on where it was stopped, and what it says."""

import hashlib
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from betavae.errors import UserError
from betavae.metrics.disentanglement import scores_with_errors
from betavae.metrics.likelihood import RNG_GROUP, PerImageBounds, importance_bounds
from betavae.models.vae import VAE
from betavae.runtime.checkpoint import TrainedRun
from betavae.storage.cache import to_bytes
from betavae.storage.files import STAMP, atomic_path, atomic_write_bytes, has_stamp
from betavae.storage.torch_file import load_torch_file

SAVE_EVERY = 5  # seconds
DISENTANGLEMENT_FILE = "disentanglement.json"  # in a run's folder


def evaluation_key(path: Path, **asked: Any) -> dict[str, Any]:
    """What a kept part of an evaluation must have been asked to be of use for this one."""
    return asked | {"file": hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}


def evaluate_resumable(
    vae: VAE, x: Tensor, ks: list[int], seed: int, memory_mb: int, kept: Path, asked: dict[str, Any]
) -> PerImageBounds:
    """`importance_sample` of all of `x`, with a bar, and what is done kept in the file `kept` until it is deleted."""
    if kept.exists() and not has_stamp(kept):
        raise UserError(
            f"folder: {kept} is there already and was not made by betavae; delete it or name another folder"
        )
    parts = load_partial(kept, asked)
    if parts:
        print(f"going on after the {len(parts) * RNG_GROUP:,} images that are in {kept}")
    groups = importance_bounds(vae, x, ks, seed, memory_mb, start=len(parts) * RNG_GROUP)
    saved = time.monotonic() - SAVE_EVERY
    for part in tqdm(groups, "images / 32", -(-len(x) // RNG_GROUP), initial=len(parts), disable=None):
        parts.append(part)
        if time.monotonic() >= saved + SAVE_EVERY:
            atomic_write_bytes(kept, to_bytes({"asked": asked, "parts": [tuple(part) for part in parts]}))
            saved = time.monotonic()
    return PerImageBounds.concat(parts)


def load_partial(kept: Path, asked: dict[str, Any]) -> list[PerImageBounds]:
    """What an evaluation that was stopped has left, if it was asked the same."""
    try:
        content = load_torch_file(kept)
        return [PerImageBounds(*part) for part in content["parts"]] if content["asked"] == asked else []
    except Exception:  # there is none, or it is no such file
        return []


@torch.no_grad()
def disentanglement(
    run: TrainedRun, out: Path, images: int = 10_000, latents: str = "mean", seed: int = 0, data_root: str | None = None
) -> dict[str, Any]:
    """Every score of `measures.disentanglement` on so many of the test images; kept in the file `out`.

    Raises UserError for data without two factors that vary.
    """
    x, factors = run.images("test", data_root, images)
    if factors.ndim == 1:
        raise UserError(
            f"{run.data['name']} has no factors that its images were made from; train on data=sprites or data=dsprites"
        )
    posteriors = [run.vae.encode(part) for part in x.split(1000)]
    z = torch.cat([posterior.mean for posterior in posteriors]).float()
    if latents == "sample":
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
        z = z + noise * torch.cat([posterior.logvar for posterior in posteriors]).float().mul(0.5).exp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn, that classes have few rows or a classifier needs more steps
        found = scores_with_errors(z, factors, seed)
    result: dict[str, Any] = {
        "made_by": STAMP,
        "checkpoint": str(run.path.relative_to(run.folder)),
        **{"data": run.data["name"], "images": len(x), "latents": latents, "seed": seed},
        **found,
    }
    with atomic_path(out, "folder") as path:
        path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def format_report(result: dict[str, Any]) -> list[str]:
    """What is printed: each mean with its standard error over images."""

    def value(name: str) -> str:
        return f"{result[name]['mean']:8.3f} ± {result[name]['se']:.3f}"

    texts = [
        f"neg. ELBO       {value('neg_elbo')}   ({result['k'][-1]:,} posterior samples)",
        f"  distortion    {value('distortion')}",
        f"  rate          {value('rate')}",
        *(f"{'NLL' if not i else '   '} K={k:<9}{value(f'nll_{k}')}" for i, k in enumerate(result["k"])),
        f"active units    {result['active_units']} of {len(result['kl_per_dimension'])}",
    ]
    a = result["aggregate"]
    texts += [
        f"rate {a['mutual_information'] + a['marginal_kl']:.2f} = mutual information {a['mutual_information']:.2f} "
        f"(at most log {result['images']} = {a['mutual_information_limit']:.2f})",
        f"  + KL(aggregate posterior || prior) {a['marginal_kl']:.2f}, of which its mean and covariance make up "
        f"{a['moments_kl']:.2f}",
    ]
    if "knn_accuracy" in result:
        texts.append(
            f"labels from posterior means: 5 nearest neighbours {result['knn_accuracy']:.2%}, linear "
            f"{result['linear_accuracy']:.2%}"
        )
    return [*texts, f"note  {result['note']}"]
