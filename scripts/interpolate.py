"""From one image to another through the latent space: `python scripts/interpolate.py digits=[3,8]|images=[A,B]`."""

from typing import Annotated, Any

from pydantic import Field

from betavae.runtime.cli import DataSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import IntAtLeast2, NonEmptyStr, NonNegativeInt, PositiveInt


class Settings(DataSettings, SeedSettings):
    digits: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(
        [3, 8], title="from a test image of the first label to one of the second, chosen by the seed"
    )
    images: Annotated[list[NonEmptyStr | NonNegativeInt], Field(min_length=1)] | NonEmptyStr | None = Field(
        None, title="two test images by number, [0,7], or two pictures, instead of digits"
    )
    steps: IntAtLeast2 = Field(11, title="pictures from one end to the other")
    rows: PositiveInt = Field(6, title="different pairs of images of these digits")
    out: NonEmptyStr = Field("interpolation.png", title="the picture")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch

        from betavae import plotting
        from betavae.errors import UserError
        from betavae.runtime import checkpoint
        from betavae.runtime.inputs import resolve_images

    run = checkpoint.load(settings.ckpt, settings.runs)
    chosen: Any = settings.images
    for key in ("digits", "rows"):
        if chosen is not None and getattr(settings, key) != Settings.model_fields[key].default:
            raise UserError(f"{key}={getattr(settings, key)} goes without images")
    if chosen is not None and not all(isinstance(image, int) for image in chosen):
        if not isinstance(chosen, str) and any(isinstance(image, int) for image in chosen):
            raise UserError(f"images={chosen} cannot be: it must be two numbers, or two pictures")
        x = resolve_images(run, chosen).pixels.float() / 255
        if len(x) != 2:
            raise UserError(f"images={chosen} cannot be: it must be two pictures, and is {len(x)}")
        pairs = [(0, 1)]
    elif chosen is not None:
        x, _ = run.images("test", settings.data_root)
        if len(chosen) != 2 or max(chosen) >= len(x):
            raise UserError(f"images={chosen} cannot be: it must be two of the test images, 0 to {len(x) - 1}")
        pairs = [tuple(chosen)]
    else:
        x, labels = run.images("test", settings.data_root)
        generator = torch.Generator().manual_seed(settings.seed)
        ends = []
        for digit in settings.digits:
            of_digit = (labels == digit).nonzero()[:, 0]
            if not len(of_digit):
                raise UserError(
                    f"digits={settings.digits} cannot be: the labels are {int(labels.min())} to {int(labels.max())}"
                )
            ends.append(of_digit[torch.randint(len(of_digit), (settings.rows,), generator=generator)].tolist())
        pairs = list(zip(*ends, strict=True))
    rows = [plotting.interpolate(run.vae, x[[start]], x[[end]], settings.steps) for start, end in pairs]
    # Each row between its two originals.
    framed = [torch.cat((x[[start]], row, x[[end]])) for (start, end), row in zip(pairs, rows, strict=True)]
    plotting.save_image(plotting.make_grid(torch.cat(framed), settings.steps + 2), settings.out)
    print(f"{len(rows)} interpolations by {run.path}, the originals at both ends, in {settings.out}")


if __name__ == "__main__":
    main()
