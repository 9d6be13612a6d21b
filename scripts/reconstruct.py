"""Images above their reconstructions: `python scripts/reconstruct.py [images=PATH out=reconstructions.png]`."""

# mypy: disable-error-code="valid-type"

from pydantic import Field

from betavae.running.cli import DataSettings, Seeded, importing, script
from betavae.running.settings import Count, Images, Text


class Settings(DataSettings, Seeded):
    images: Images = Field("test", title="pictures (folder, file, list); .npy, .npz; test, train, ...; a data set")
    n: Count = Field(32, title="so many of them, chosen by the seed")
    out: Text = Field("reconstructions.png", title="the picture")


@script(Settings)
def main(settings: Settings) -> None:
    with importing():
        import torch

        from betavae import pictures
        from betavae.running import checkpoint
        from betavae.running.inputs import named_images

    run = checkpoint.load(settings.ckpt, settings.runs)
    found = named_images(run, settings.images, settings.data_root)
    order = torch.randperm(len(found.pixels), generator=torch.Generator().manual_seed(settings.seed))
    x = found.pixels[order[: settings.n]].float() / 255
    columns = min(8, len(x))
    pictures.save_picture(pictures.grid(pictures.reconstructions(run.vae, x), columns), settings.out)
    for note in found.notes:
        print(note)
    print(f"{len(x)} images and, below each row, what {run.path} makes of them, in {settings.out}")


if __name__ == "__main__":
    main()
