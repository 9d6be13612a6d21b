"""Interpolate between images in latent space: `python scripts/interpolate.py labels=[3,8]`.

The ends are test images with two labels. With `images=[A,B]` they are two test images by number or two files.

A conditional model encodes each image with its own label, and decodes with that of the start.
"""

from typing import Annotated

from pydantic import Field

from betavae.errors import UserError
from betavae.runtime.cli import DataSettings, LabelSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import IntAtLeast2, Label, NonEmptyStr, NonNegativeInt, PositiveInt


class Settings(DataSettings, SeedSettings, LabelSettings):
    labels: Annotated[list[Label], Field(min_length=2, max_length=2)] = Field(
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

        from betavae import grids, plotting
        from betavae.applications.interpolation import draw_pairs, select_pair
        from betavae.data.labels import match_labels
        from betavae.runtime import checkpoint
        from betavae.runtime.inputs import resolve_images, resolve_labels

    images = settings.images
    for key in ("labels", "rows"):
        if images is not None and key in settings.model_fields_set:
            raise UserError(f"{key}={getattr(settings, key)} is invalid with images: remove one of the two")
    run = checkpoint.load(settings.ckpt, settings.runs)
    run.require_images("interpolate.py")
    if images is None:
        test = run.subset("test", settings.data_root)
        numbers = [test.find_label(label, f"labels={settings.labels}: label") for label in settings.labels]
        x = run.scaling.apply(test.pixels)
        starts, ends = draw_pairs(x, test.labels, numbers, settings.rows, settings.seed, settings.labels)
        pairs = torch.tensor([numbers]).expand(settings.rows, 2)
    elif isinstance(images, str) or not any(isinstance(image, int) for image in images):
        files = images if isinstance(images, str) else list(map(str, images))
        found = resolve_images(run, files, settings.data_root)
        x, pairs = run.scaling.apply(found.pixels), resolve_labels(run, files, found, settings.label)[None]
        if len(x) != 2:
            raise UserError(f"images={images} is invalid: expected two images, found {len(x)}")
        starts, ends = x.split(1)
    else:
        x, labels = run.images("test", settings.data_root)
        starts, ends = select_pair(x, images)
        pairs = labels[[int(image) for image in images]][None]
    if settings.label is not None:
        pairs = match_labels(run.vae.classes, 2, settings.label, None, "").expand(len(starts), 2)
    rows = []
    for start, end, labels in zip(starts.split(1), ends.split(1), pairs, strict=True):
        vae, end_vae = run.vae.given(labels[:1]), run.vae.given(labels[1:])
        rows += [start, plotting.interpolate(vae, start, end, settings.steps, end_vae), end]
    weights = [f"{weight:.2g}" for weight in torch.linspace(0, 1, settings.steps).tolist()]
    grid = grids.Grid(
        run.scaling.to_picture(torch.cat(rows)), settings.steps + 2, column_labels=["start", *weights, "end"]
    )
    shown = f"decoded as {settings.label}" if settings.label is not None else "decoded with the label of the start"
    given = f"{shown}; " if run.vae.classes else ""
    caption = f"between posterior means; start and end are the images; {given}{run.caption}"
    grids.save_grids([grid], settings.out, caption)
    count = f"{len(starts)} interpolation{'s' * (len(starts) > 1)}"
    print(f"{count} by {run.path}, each between its two originals, saved to {settings.out}")


if __name__ == "__main__":
    main()
