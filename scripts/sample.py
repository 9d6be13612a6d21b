"""New images from a trained VAE: `python scripts/sample.py [ckpt=PATH sampler=mixture digit=7 n=64 out=PNG]`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from betavae.runtime.cli import DataSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import NonNegativeFloat, PathStr, PositiveInt, RegisteredName


class Settings(DataSettings, SeedSettings):
    n: PositiveInt = Field(64, title="images")
    sampler: Annotated[str, RegisteredName("betavae.applications.sampling", "SAMPLERS")] = Field(
        "prior", title="or one fitted to the training images: gaussian, mixture, knn"
    )
    digit: int | None = Field(None, title="images of one label; not with sampler=prior")
    temperature: NonNegativeFloat = Field(1.0, title="times the prior's standard deviation")
    columns: PositiveInt = Field(8, title="images in a row")
    out: PathStr = Field("samples.png", title="the picture")
    save_images: bool = Field(False, title="true: each image as a file too, in a folder named like `out`")
    save_tensor: bool = Field(False, title="true: a tensor (n, C, H, W) too, named like `out`")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch

        from betavae import plotting
        from betavae.applications.sampling import MOST_IMAGES, load_or_fit_sampler
        from betavae.errors import UserError
        from betavae.runtime import checkpoint

    run = checkpoint.load(settings.ckpt, settings.runs)
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.sampler == "prior" and settings.digit is None:
        images = run.vae.sample(settings.n, settings.temperature, generator)
    elif settings.temperature != 1:
        raise UserError(f"temperature={settings.temperature:g} goes with sampler=prior and no digit")
    else:
        latents = load_or_fit_sampler(
            settings.sampler,
            run.vae,
            lambda: run.images("train", settings.data_root, MOST_IMAGES),
            run.path,
            run.folder,
            settings.digit,
        )
        images = run.vae.decode(latents.sample(settings.n, generator))
    out = Path(settings.out)
    plotting.save_image(plotting.make_grid(images, settings.columns), out)
    print(f"{settings.n} samples of {run.path} by sampler={settings.sampler} in {out}")
    if settings.save_images:
        folder = out.with_suffix("")
        for number, image in enumerate(images):
            plotting.save_image(image, folder / f"{number:0{len(str(settings.n - 1))}d}.png", scale=1)
        print(f"each as a picture in {folder}/")
    if settings.save_tensor:
        path = plotting.save_tensor(images, out.with_suffix(".pt"))
        print(f"as a tensor {tuple(images.shape)} in {path}")


if __name__ == "__main__":
    main()
