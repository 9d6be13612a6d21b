"""Interpolate between images in latent space: `python scripts/interpolate.py labels=[3,8]|images=[A,B] [ckpt=PATH]`."""

from typing import Annotated

from pydantic import Field

from betavae.errors import UserError
from betavae.runtime.cli import DataSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import IntAtLeast2, NonEmptyStr, NonNegativeInt, PositiveInt


class Settings(DataSettings, SeedSettings):
    labels: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(
        [3, 8], title="labels of the start and the end, which are random test images"
    )
    images: Annotated[list[NonEmptyStr | NonNegativeInt], Field(min_length=1)] | NonEmptyStr | None = Field(
        None, title="two test images by number, [0,7], or two image files, instead of labels"
    )
    steps: IntAtLeast2 = Field(11, title="images from start to end")
    rows: PositiveInt = Field(6, title="pairs of images with these labels")
    out: NonEmptyStr = Field("interpolation.png", title="image file for the grid")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch

        from betavae import plotting
        from betavae.applications.interpolation import draw_pairs, select_pair
        from betavae.runtime import checkpoint
        from betavae.runtime.inputs import resolve_images

    images = settings.images
    for key in ("labels", "rows"):
        if images is not None and getattr(settings, key) != Settings.model_fields[key].default:
            raise UserError(f"{key}={getattr(settings, key)} is invalid with images: remove one of the two")
    run = checkpoint.load(settings.ckpt, settings.runs)
    run.require_images("interpolate.py")
    if images is None:
        x, labels = run.images("test", settings.data_root)
        starts, ends = draw_pairs(x, labels, settings.labels, settings.rows, settings.seed)
    elif isinstance(images, str) or not any(isinstance(image, int) for image in images):
        found = resolve_images(run, images if isinstance(images, str) else list(map(str, images)))
        x = run.scaling.apply(found.pixels)
        if len(x) != 2:
            raise UserError(f"images={images} is invalid: expected two images, found {len(x)}")
        starts, ends = x.split(1)
    else:
        starts, ends = select_pair(run.images("test", settings.data_root)[0], images)
    rows = []
    for start, end in zip(starts.split(1), ends.split(1), strict=True):
        rows += [start, plotting.interpolate(run.vae, start, end, settings.steps), end]
    plotting.save_image(plotting.make_grid(run.scaling.to_picture(torch.cat(rows)), settings.steps + 2), settings.out)
    print(f"{len(starts)} interpolations by {run.path}, each between its two originals, saved to {settings.out}")


if __name__ == "__main__":
    main()
