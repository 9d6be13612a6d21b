"""Show a 2-D latent space as a grid of images: `python scripts/manifold.py [ckpt=PATH size=20 out=manifold.png]`."""

from pydantic import Field

from betavae.runtime.cli import ModelSettings, gc_paused, script_command
from betavae.runtime.settings import NonEmptyStr, PositiveInt


class Settings(ModelSettings):
    size: PositiveInt = Field(20, title="images along each side, at quantiles of the prior")
    out: NonEmptyStr = Field("manifold.png", title="image file for the grid")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from betavae import plotting
        from betavae.runtime import checkpoint

    run = checkpoint.load(settings.ckpt, settings.runs)
    run.require_images("manifold.py")
    pictures = run.scaling.to_picture(plotting.decode_manifold(run.vae, settings.size))
    plotting.save_image(plotting.make_grid(pictures, settings.size), settings.out)
    print(f"the manifold of {run.path}, {settings.size} x {settings.size} images, saved to {settings.out}")


if __name__ == "__main__":
    main()
