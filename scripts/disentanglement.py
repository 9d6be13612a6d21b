"""Does each latent dimension follow one factor? `python scripts/disentanglement.py [ckpt=PATH latents=mean]`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from betavae.runtime.cli import DataSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import PathStr, PositiveInt


class Settings(DataSettings, SeedSettings):
    images: PositiveInt = Field(10_000, title="test images at most; all scores depend on it a little")
    latents: Literal["mean", "sample"] = Field("mean", title="mean of each posterior, or a sample")
    folder: PathStr | None = Field(None, title="for disentanglement.json; null: the run's")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from betavae.metrics.disentanglement import SCORES
        from betavae.runtime import checkpoint, evaluation

    run = checkpoint.load(settings.ckpt, settings.runs)
    out = (Path(settings.folder) if settings.folder else run.folder) / evaluation.DISENTANGLEMENT_FILE
    result = evaluation.disentanglement(run, out, settings.images, settings.latents, settings.seed, settings.data_root)
    print(f"{run.path}, posterior {settings.latents}s of {result['images']:,} test images, ± standard error over them")
    for name in SCORES:
        print(f"{name:<22}{result[name]['value']:7.3f} ± {result[name]['se']:.3f}")
    print(f"in {out}; docs/disentanglement.md says what each is")


if __name__ == "__main__":
    main()
