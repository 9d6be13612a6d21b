"""Show the effect of each latent dimension, ordered by KL: `python scripts/traverse.py [ckpt=PATH dimensions=10]`."""

from pydantic import Field

from betavae.runtime.cli import DataSettings, gc_paused, script_command
from betavae.runtime.settings import IntAtLeast2, NonEmptyStr, NonNegativeInt, PositiveFloat, PositiveInt


class Settings(DataSettings):
    image: NonNegativeInt | None = Field(0, title="number of the test image to start from; null: the prior's mean")
    dimensions: PositiveInt | None = Field(None, title="number of dimensions, those with the largest KL; null: all")
    span: PositiveFloat = Field(3.0, title="each dimension goes from -span to span")
    steps: IntAtLeast2 = Field(11, title="images per dimension")
    out: NonEmptyStr = Field("traversal.png", title="file for the figure")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch

        from betavae import plotting
        from betavae.errors import UserError
        from betavae.objectives.elbo import gaussian_kl
        from betavae.runtime import checkpoint

    run = checkpoint.load(settings.ckpt, settings.runs)
    run.require_images("traverse.py")
    x, _ = run.images("test", settings.data_root)
    if settings.image is not None and settings.image >= len(x):
        raise UserError(f"image={settings.image} is invalid: expected the number of a test image, 0 to {len(x) - 1}")
    kl = gaussian_kl(run.vae.encode(x)).mean(0)
    order = kl.argsort(descending=True)[: settings.dimensions].tolist()
    start = torch.zeros(run.vae.latent_dim) if settings.image is None else run.vae.encode(x[[settings.image]]).mean[0]
    values = torch.linspace(-settings.span, settings.span, settings.steps)
    rows = plotting.traverse(run.vae, start, order, values)
    plotting.save_figure(plotting.plot_traversal(run.scaling.to_picture(rows), values, order, kl), settings.out)
    print(f"{len(order)} latent dimensions of {run.path}, ordered by KL, saved to {settings.out}")


if __name__ == "__main__":
    main()
