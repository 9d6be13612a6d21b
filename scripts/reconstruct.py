"""Test images above their reconstructions: `python scripts/reconstruct.py [ckpt=PATH n=32 out=reconstructions.png]`."""

# mypy: disable-error-code="valid-type"

from pydantic import Field

from betavae.running.cli import DataSettings, importing, script
from betavae.running.settings import Count, Text


class Settings(DataSettings):
    n: Count = Field(32, title="test images, chosen by the seed")
    out: Text = Field("reconstructions.png", title="the picture")


@script(Settings)
def main(settings: Settings) -> None:
    with importing():
        import torch

        from betavae import pictures
        from betavae.running import checkpoint

    run = checkpoint.load(settings.ckpt, settings.runs)
    x, _ = run.images("test", settings.data_root)
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(settings.seed))[: settings.n]
    pictures.save_picture(pictures.grid(pictures.reconstructions(run.vae, x[chosen]), 8), settings.out)
    print(f"{len(chosen)} test images and, below each row, what {run.path} makes of them, in {settings.out}")


if __name__ == "__main__":
    main()
