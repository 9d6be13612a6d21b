"""New images from a trained VAE: `python scripts/sample.py [ckpt=PATH n=64 seed=0 temperature=1.0 out=samples.png]`."""

# mypy: disable-error-code="valid-type"

from pathlib import Path

from pydantic import Field

from betavae.running.cli import ModelSettings, importing, script
from betavae.running.settings import Count, Flag, NotNegative, Text


class Settings(ModelSettings):
    n: Count = Field(64, title="images")
    temperature: NotNegative = Field(1.0, title="times the prior's standard deviation")
    columns: Count = Field(8, title="images in a row")
    out: Text = Field("samples.png", title="the picture")
    save_images: Flag = Field(False, title="true: each image as a file too, in a folder named like `out`")
    save_tensor: Flag = Field(False, title="true: a tensor (n, C, H, W) too, named like `out`")


@script(Settings)
def main(settings: Settings) -> None:
    with importing():
        import torch

        from betavae import pictures
        from betavae.running import checkpoint

    run = checkpoint.load(settings.ckpt, settings.runs)
    images = run.vae.sample(settings.n, settings.temperature, torch.Generator().manual_seed(settings.seed))
    out = Path(settings.out)
    pictures.save_picture(pictures.grid(images, settings.columns), out)
    print(f"{settings.n} samples of {run.path} in {out}")
    if settings.save_images:
        folder = out.with_suffix("")
        for number, image in enumerate(images):
            pictures.save_picture(image, folder / f"{number:0{len(str(settings.n - 1))}d}.png", scale=1)
        print(f"each as a picture in {folder}/")
    if settings.save_tensor:
        path = pictures.save_tensor(images, out.with_suffix(".pt"))
        print(f"as a tensor {tuple(images.shape)} in {path}")


if __name__ == "__main__":
    main()
