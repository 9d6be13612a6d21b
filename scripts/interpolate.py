"""Interpolate between images in latent space: `python scripts/interpolate.py labels=[3,8]|images=[A,B] [ckpt=PATH]`."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from betavae.errors import UserError
from betavae.runtime.cli import DataSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import IntAtLeast2, NonEmptyStr, NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor

    from betavae.runtime.checkpoint import TrainedRun


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


def draw_pairs(run: "TrainedRun", settings: Settings) -> list["Tensor"]:
    """Draw `rows` test images of each of the two labels: `(rows, C, H, W)` each."""
    import torch

    x, labels = run.images("test", settings.data_root)
    generator = torch.Generator().manual_seed(settings.seed)
    ends = []
    for label in settings.labels:
        index = (labels == label).nonzero()[:, 0]
        if not len(index):
            span = f"from {int(labels.min())} to {int(labels.max())}"
            raise UserError(f"labels={settings.labels} is invalid: expected labels of test images, {span}")
        ends.append(x[index[torch.randint(len(index), (settings.rows,), generator=generator)]])
    return ends


def load_pair(run: "TrainedRun", settings: Settings) -> list["Tensor"]:
    """Load the start and the end that the setting `images` names: `(1, C, H, W)` each."""
    from betavae.runtime.inputs import resolve_images

    images = settings.images or []
    for key in ("labels", "rows"):
        if getattr(settings, key) != Settings.model_fields[key].default:
            raise UserError(f"{key}={getattr(settings, key)} is invalid with images: remove one of the two")
    numbers = [image for image in images if isinstance(image, int)]
    if not numbers:
        x = resolve_images(run, images).pixels.float() / 255  # type: ignore[arg-type]
        if len(x) != 2:
            raise UserError(f"images={images} is invalid: expected two images, found {len(x)}")
        return list(x.split(1))
    x, _ = run.images("test", settings.data_root)
    if len(images) != 2 or len(numbers) != 2 or max(numbers) >= len(x):
        expected = f"two image files, or two numbers of test images from 0 to {len(x) - 1}"
        raise UserError(f"images={images} is invalid: expected {expected}")
    return [x[[number]] for number in numbers]


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch

        from betavae import plotting
        from betavae.runtime import checkpoint

    run = checkpoint.load(settings.ckpt, settings.runs)
    starts, ends = draw_pairs(run, settings) if settings.images is None else load_pair(run, settings)
    rows = []
    for start, end in zip(starts.split(1), ends.split(1), strict=True):
        rows += [start, plotting.interpolate(run.vae, start, end, settings.steps), end]
    plotting.save_image(plotting.make_grid(torch.cat(rows), settings.steps + 2), settings.out)
    print(f"{len(starts)} interpolations by {run.path}, each between its two originals, saved to {settings.out}")


if __name__ == "__main__":
    main()
