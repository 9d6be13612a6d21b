"""Show images above their reconstructions: `python scripts/reconstruct.py [images=PATH out=reconstructions.png]`."""

from pydantic import Field

from betavae.runtime.cli import DataSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import ImageSpec, NonEmptyStr, PositiveInt


class Settings(DataSettings, SeedSettings):
    images: ImageSpec = Field("test", title="images: a folder, file or list; .npy, .npz; test, train, ...; a data set")
    n: PositiveInt = Field(32, title="number of images, drawn at random")
    out: NonEmptyStr = Field("reconstructions.png", title="image file for the grid")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch

        from betavae import plotting
        from betavae.runtime import checkpoint
        from betavae.runtime.inputs import resolve_images

    run = checkpoint.load(settings.ckpt, settings.runs)
    run.require_images("reconstruct.py")
    images = resolve_images(run, settings.images, settings.data_root)
    order = torch.randperm(len(images.pixels), generator=torch.Generator().manual_seed(settings.seed))
    x = run.scaling.apply(images.pixels.index_select(0, order[: settings.n]))
    rows = run.scaling.to_picture(plotting.stack_reconstructions(run.vae, x))
    plotting.save_image(plotting.make_grid(rows, min(8, len(x))), settings.out)
    for note in images.notes:
        print(note)
    print(f"{len(x)} images, each row above its reconstructions by {run.path}, saved to {settings.out}")


if __name__ == "__main__":
    main()
