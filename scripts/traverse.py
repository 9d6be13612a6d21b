"""Show the effect of each latent dimension: `python scripts/traverse.py [ckpt=PATH dimensions=10]`.

The dimensions are ordered by KL.
"""

from pydantic import Field

from betavae.runtime.cli import DataSettings, LabelSettings, gc_paused, script_command
from betavae.runtime.settings import IntAtLeast2, NonEmptyStr, NonNegativeInt, PositiveFloat, PositiveInt


class Settings(DataSettings, LabelSettings):
    image: NonNegativeInt | None = Field(0, title="number of the test image to start from; null: the prior's mean")
    dimensions: PositiveInt | None = Field(None, title="number of dimensions, those with the largest KL; null: all")
    span: PositiveFloat = Field(3.0, title="each dimension goes from -span to span standard deviations of the prior")
    steps: IntAtLeast2 = Field(11, title="images per dimension")
    out: NonEmptyStr = Field("traversal.png", title="file for the figure")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch

        from betavae import grids
        from betavae.data.labels import match_labels
        from betavae.errors import UserError
        from betavae.metrics.collapse import count_active_units, describe_collapse, estimate_kl
        from betavae.runtime import checkpoint

    run = checkpoint.load(settings.ckpt, settings.runs)
    run.require_images("traverse.py")
    x, labels = run.images("test", settings.data_root)
    if settings.image is not None and settings.image >= len(x):
        raise UserError(f"image={settings.image} is invalid: expected the number of a test image, 0 to {len(x) - 1}")
    view = run.vae.given(labels)
    posterior = view.encode(x)
    kl = view.kl_per_dimension(posterior).mean(0)
    if settings.image is None:
        label = match_labels(run.vae.classes, 1, settings.label, None, "image=null")
        start = run.vae.given(label).prior.moments()[0]
    else:
        label = labels[[settings.image]]
        start = run.vae.given(label).encode(x[[settings.image]]).mean[0]
        if settings.label is not None:
            label = match_labels(run.vae.classes, 1, settings.label, None, "image=null")
    values = torch.linspace(-settings.span, settings.span, settings.steps)
    grid = grids.make_traversal_grid(run.vae.given(label), start, values, kl, settings.dimensions)
    grid = grid._replace(images=run.scaling.to_picture(grid.images))
    origin = "the prior's mean" if settings.image is None else f"test image {settings.image}"
    if settings.label is not None:
        origin += f"{', decoded' * (settings.image is not None)} with label {settings.label}"
    caption = (
        f"from {origin}, one latent dimension per row with its KL, in standard deviations of the prior; {run.caption}"
    )
    grids.save_grids([grid], settings.out, caption)
    print(f"{grid.rows} latent dimensions of {run.path}, ordered by KL, saved to {settings.out}")
    total = estimate_kl(view, posterior)  # of a learned prior, not the sum of the parts per dimension
    if collapse := describe_collapse(count_active_units(posterior.mean), run.vae.latent_dim, total):
        print(f"note  {collapse}")


if __name__ == "__main__":
    main()
