"""Show a 2-D latent space as a grid of images: `python scripts/manifold.py [ckpt=PATH size=20]`."""

from pydantic import Field

from betavae.runtime.cli import ModelSettings, gc_paused, script_command
from betavae.runtime.settings import Label, NonEmptyStr, PositiveInt


class Settings(ModelSettings):
    label: Label | None = Field(None, title="the label, which a conditional model needs")
    size: PositiveInt = Field(20, title="images along each side, at quantiles of the prior")
    out: NonEmptyStr = Field("manifold.png", title="image file for the grid")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from betavae import grids
        from betavae.data.labels import match_labels
        from betavae.runtime import checkpoint

    run = checkpoint.load(settings.ckpt, settings.runs)
    run.require_images("manifold.py")
    vae = run.vae.given(match_labels(run.vae.classes, 1, settings.label, None, "the manifold"))
    label = "" if settings.label is None else f"label {settings.label}; "
    caption = f"{label}z0 to the right, z1 up, at quantiles of the prior; {run.caption}"
    grid = grids.make_manifold_grid(vae, settings.size)
    grids.save_grids([grid._replace(images=run.scaling.to_picture(grid.images))], settings.out, caption)
    print(f"the manifold of {run.path}, {settings.size} x {settings.size} images, saved to {settings.out}")


if __name__ == "__main__":
    main()
