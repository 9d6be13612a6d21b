"""What a trained VAE is worth on the test images: `python scripts/evaluate.py [ckpt=PATH k=5000 memory_mb=16]`."""

# mypy: disable-error-code="valid-type"

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field

from betavae.runtime.cli import DataSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import OptionalIntAtLeast2, OptionalPathStr, PositiveInt, choice


class Settings(DataSettings, SeedSettings):
    k: PositiveInt = Field(5000, title="importance samples per image; bounds at 1, 10, 100, ... and at it")
    first: OptionalIntAtLeast2 = Field(None, title="only so many of the test images; null: all")
    memory_mb: PositiveInt = Field(16, title="about what decoding takes; on a GPU, a few thousand are faster")
    device: choice(lambda: ["auto", "cpu", "cuda", "mps"]) = Field("auto", title="auto, cpu, cuda, mps")
    matmul_precision: choice(lambda: ["highest", "high", "medium"]) = Field(
        "highest", title="highest, high, medium: lower may be faster, and rounds more"
    )
    probes: bool = Field(True, title="accuracy of 5 nearest neighbours and of a linear classifier on posterior means")
    folder: OptionalPathStr = Field(None, title="for evaluation.json and figures/evaluation.png; null: the run's")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch

        from betavae import plotting
        from betavae.errors import UserError
        from betavae.metrics.aggregate_posterior import NEIGHBORS, posterior_means, probe_accuracy
        from betavae.metrics.likelihood import summary
        from betavae.models.precision import set_float32_precision
        from betavae.runtime import checkpoint, evaluation
        from betavae.storage.files import STAMP, atomic_path

    set_float32_precision(settings.matmul_precision)
    run = checkpoint.load(settings.ckpt, settings.runs)
    x, labels = (part[: settings.first] for part in run.images("test", settings.data_root))
    if len(x) < 2:
        raise UserError(f"{run.path}: its data have {len(x)} test image; expected at least 2, for standard errors")
    train = None  # loaded before hours of sampling, since its images may have changed
    if settings.probes and find_spec("sklearn") is None:
        print('classification of the labels left out: it comes with `pip install -e ".[evaluation]"`')
    elif settings.probes and len(labels.unique()) < 2:
        print("classification of the labels left out: there is one class")
    elif settings.probes and labels.ndim > 1:
        print("classification of the labels left out: these data have several factors in place of one label")
    elif settings.probes:
        train = run.subset("train", settings.data_root)
        if len(train) < NEIGHBORS or len(train.labels.unique()) < 2:
            print(f"classification of the labels left out: it needs {NEIGHBORS} training images of two classes")
            train = None
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        vae = run.vae.to(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"device={device} cannot be: {checkpoint.first_line(error)}") from error

    folder = Path(settings.folder) if settings.folder else run.folder
    print(f"{run.path} on {len(x):,} test images, nats per image, ± standard error over images")
    ks = [10**power for power in range(20) if 10**power < settings.k] + [settings.k]
    asked = {"images": len(x), "k": ks, "seed": settings.seed, "matmul_precision": settings.matmul_precision}
    kept = folder / "evaluation.part"
    started = time.perf_counter()
    with atomic_path(folder / "evaluation.json", "folder") as path:
        per_image = evaluation.evaluate_resumable(
            vae, x, ks, settings.seed, settings.memory_mb, kept, evaluation.evaluation_key(run.path, **asked)
        )
        seconds = time.perf_counter() - started
        if not all(part.isfinite().all() for part in per_image):
            raise UserError(f"{run.path} gives numbers that are not finite, so there is nothing to evaluate")
        likelihood, binarize = run.vae.likelihood, run.data["binarize"]
        result: dict[str, Any] = {
            "made_by": STAMP,
            "checkpoint": str(run.path.relative_to(run.folder)),
            "data": f"{run.data['name']}, binarize={binarize}",
            "likelihood": run.settings["model"]["likelihood"],
            "note": likelihood.describe(binarize),
            **asked,
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "sampling_seconds": round(seconds, 1),
        }
        result |= summary(per_image, ks)
        if train is not None:
            means = posterior_means(vae, train.pixels.float() / 255)
            result |= probe_accuracy(means, train.labels, per_image.mean.float(), labels)
        path.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(evaluation.format_report(result)))
    kept.unlink(missing_ok=True)
    bounds = [result[f"nll_{k}"] for k in ks]
    figure = plotting.bounds_figure(ks, bounds, result["kl_per_dimension"], result["active_units"])
    plotting.save_figure(figure, folder / "figures" / "evaluation.png")
    print(f"in {folder / 'evaluation.json'} and {folder / 'figures' / 'evaluation.png'}")


if __name__ == "__main__":
    main()
