"""Show images above their reconstructions: `python scripts/reconstruct.py [images=PATH]`."""

from pydantic import Field

from betavae.runtime.cli import DataSettings, LabelSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import ImageSpec, NonEmptyStr, PositiveInt


class Settings(DataSettings, SeedSettings, LabelSettings):
    images: ImageSpec = Field("test", title="images: a folder, file or list; .npy, .npz; test, train, ...; a data set")
    n: PositiveInt = Field(32, title="number of images, drawn at random")
    out: NonEmptyStr = Field("reconstructions.png", title="image file for the grid")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch

        from betavae import grids
        from betavae.metrics.collapse import MAX_IMAGES, diagnose_collapse
        from betavae.runtime import checkpoint
        from betavae.runtime.inputs import resolve_images, resolve_labels

    run = checkpoint.load(settings.ckpt, settings.runs)
    run.require_images("reconstruct.py")
    images = resolve_images(run, settings.images, settings.data_root)
    labels = resolve_labels(run, settings.images, images, settings.label)
    order = torch.randperm(len(images.pixels), generator=torch.Generator().manual_seed(settings.seed))
    x = run.scaling.apply(images.pixels.index_select(0, order[: settings.n]))
    grid = grids.make_reconstruction_grid(run.vae.given(labels[order[: settings.n]]), x)
    grids.save_grids([grid._replace(images=run.scaling.to_picture(grid.images))], settings.out, run.caption)
    for note in images.notes:
        print(note)
    order = order[:MAX_IMAGES]
    if collapse := diagnose_collapse(run.vae.given(labels[order]), run.scaling.apply(images.pixels[order])):
        print(f"note  {collapse}")
    print(f"{len(x)} images, each row above its reconstructions by {run.path}, saved to {settings.out}")


if __name__ == "__main__":
    main()
