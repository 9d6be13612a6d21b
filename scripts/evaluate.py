"""Evaluate a trained VAE on test images: `python scripts/evaluate.py [ckpt=PATH k=5000 memory_mb=16]`."""

import json
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from betavae.runtime.cli import DataSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import IntAtLeast2, PathStr, PositiveInt


class Settings(DataSettings, SeedSettings):
    k: PositiveInt = Field(5000, title="importance samples per image; bounds for 1, 10, 100, ... and k samples")
    max_images: IntAtLeast2 | None = Field(None, title="number of test images, from the first on; null: all")
    memory_mb: PositiveInt = Field(16, title="approximate memory for decoding; on a GPU, a few thousand are faster")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", title="auto, cpu, cuda, mps")
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest", title="highest, high, medium: lower may be faster and less exact"
    )
    probes: bool = Field(True, title="accuracy of 5 nearest neighbors and of a linear classifier on posterior means")
    out: PathStr | None = Field(None, title="folder of evaluation.json and figures/evaluation.png; null: the run's")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch

        from betavae import plotting
        from betavae.errors import UserError, first_line
        from betavae.metrics.aggregate_posterior import encode_means, probe_accuracy
        from betavae.metrics.collapse import describe_collapse
        from betavae.metrics.likelihood import evaluate_resumable, format_summary, summarize
        from betavae.models.precision import set_float32_precision
        from betavae.runtime import checkpoint
        from betavae.runtime.evaluation import load_probe_images
        from betavae.storage.files import STAMP, atomic_path, check_writable, hash_file

    set_float32_precision(settings.matmul_precision)
    run = checkpoint.load(settings.ckpt, settings.runs)
    x, labels = (values[: settings.max_images] for values in run.images("test", settings.data_root))
    if len(x) < 2:
        raise UserError(f"{run.path}: its data have {len(x)} test image; expected at least 2, for standard errors")
    # Loaded before hours of sampling, since the images may have changed.
    train = load_probe_images(run, labels, settings.data_root) if settings.probes else None
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        vae = run.vae.to(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"device={device} is not available: {first_line(error)}") from error

    folder = Path(settings.out) if settings.out else run.folder
    print(f"{run.path} on {len(x):,} test {run.item}s, nats per {run.item}, ± standard error over {run.item}s")
    ks = [10**power for power in range(20) if 10**power < settings.k] + [settings.k]
    request = {"images": len(x), "k": ks, "seed": settings.seed, "matmul_precision": settings.matmul_precision}
    partial, key = folder / "evaluation.part", request | {"checkpoint": hash_file(run.path)}
    check_writable(folder / "evaluation.json")
    started = time.perf_counter()
    per_image = evaluate_resumable(vae, x, ks, settings.seed, settings.memory_mb, partial, key, labels)
    seconds = time.perf_counter() - started
    if not all(values.isfinite().all() for values in per_image):
        raise UserError(f"{run.path}: its bounds are not finite; train the model again")
    binarize = run.data["binarize"]
    result: dict[str, Any] = {
        "made_by": STAMP,
        "checkpoint": str(run.path.relative_to(run.folder)),
        "sha256": key["checkpoint"],
        **({"test_fingerprint": run.fingerprints["test"]} if "test" in run.fingerprints else {}),
        "data": f"{run.data['name']}, binarize={binarize}",
        "likelihood": run.settings["model"]["likelihood"],
        "note": run.vae.describe_numbers(binarize, run.scaling.describe(run.vae.image_shape)),
        **request,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "sampling_seconds": round(seconds, 1),
    }
    result |= summarize(vae, per_image, ks, labels)
    if train is not None:
        means = encode_means(vae, run.scaling.apply(train.pixels), train.labels)
        result |= probe_accuracy(means, train.labels, per_image.mean.float(), labels)
    with atomic_path(folder / "evaluation.json") as path:
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(format_summary(result))
    if collapse := describe_collapse(result["active_units"], vae.latent_dim, result["kl"]["mean"]):
        print(f"note  {collapse}")
    partial.unlink(missing_ok=True)
    bounds = [result[f"nll_{k}"] for k in ks]
    figure = plotting.plot_bounds(ks, bounds, result["kl_per_dimension"], result["active_units"])
    plotting.save_figure(figure, folder / "figures" / "evaluation.png")
    print(f"wrote {folder / 'evaluation.json'} and {folder / 'figures' / 'evaluation.png'}")


if __name__ == "__main__":
    main()
