"""Images above their reconstructions: `python scripts/reconstruct.py [images=PATH out=reconstructions.png]`."""

from pydantic import Field

from betavae.runtime.cli import DataSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import ImageSpec, NonEmptyStr, PositiveInt


class Settings(DataSettings, SeedSettings):
    images: ImageSpec = Field("test", title="pictures (folder, file, list); .npy, .npz; test, train, ...; a data set")
    n: PositiveInt = Field(32, title="so many of them, chosen by the seed")
    out: NonEmptyStr = Field("reconstructions.png", title="the picture")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch

        from betavae import plotting
        from betavae.runtime import checkpoint
        from betavae.runtime.inputs import resolve_images

    run = checkpoint.load(settings.ckpt, settings.runs)
    found = resolve_images(run, settings.images, settings.data_root)
    order = torch.randperm(len(found.pixels), generator=torch.Generator().manual_seed(settings.seed))
    x = found.pixels[order[: settings.n]].float() / 255
    columns = min(8, len(x))
    plotting.save_image(plotting.make_grid(plotting.stack_reconstructions(run.vae, x), columns), settings.out)
    for note in found.notes:
        print(note)
    print(f"{len(x)} images and, below each row, what {run.path} makes of them, in {settings.out}")


if __name__ == "__main__":
    main()
