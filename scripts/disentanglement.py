"""Compute disentanglement scores of a model: `python scripts/disentanglement.py [ckpt=PATH]`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from betavae.runtime.cli import DataSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import PathStr, PositiveInt


class Settings(DataSettings, SeedSettings):
    max_images: PositiveInt = Field(
        10_000, title="maximum number of test images; with fewer, beta_vae_score and DCI are too high"
    )
    latents: Literal["mean", "sample"] = Field("mean", title="mean of each posterior, or a sample")
    out: PathStr | None = Field(None, title="folder of disentanglement.json; null: the run's")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from betavae.metrics.disentanglement import SCORES
        from betavae.runtime import checkpoint
        from betavae.runtime.evaluation import DISENTANGLEMENT_FILE, measure_disentanglement

    run = checkpoint.load(settings.ckpt, settings.runs)
    out = (Path(settings.out) if settings.out else run.folder) / DISENTANGLEMENT_FILE
    result = measure_disentanglement(run, out, settings.max_images, settings.latents, settings.seed, settings.data_root)
    print(f"{run.path}, posterior {settings.latents}s of {result['images']:,} test images, ± standard error over them")
    for name in SCORES:
        print(f"{name:<22}{result[name]['value']:7.3f} ± {result[name]['se']:.3f}")
    print(f"wrote {out}; docs/disentanglement.md explains the scores")


if __name__ == "__main__":
    main()
