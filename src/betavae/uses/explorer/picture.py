"""Pictures on their way in and out: what a user draws or uploads as a model's pixels, a model's pixels as text."""

import base64
import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from betavae.data.batches import binarized
from betavae.errors import UserError

UPLOAD = 10 * 2**20  # bytes
PIXELS = 25_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
INK = 0.1  # of full brightness: darker pixels are no part of a digit


def read(content: bytes, shape: tuple[int, int, int], centre: bool, invert: bool, binarize: str) -> Tensor:
    """A picture file as `(C, H, W)` uint8, as models of images of that shape would see it: cropped around its middle to
    their aspect ratio and scaled; with `invert`, light for dark; with `centre`, a single light figure on black put as
    MNIST's digits are; of models of binarised images, black and white. Transparent parts are white.

    Raises UserError if it is no picture, one of more than `PIXELS`, or damaged.
    """
    channels, height, width = shape
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow warns of its own, larger limit
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
        if opened.width * opened.height > PIXELS:
            raise UserError(f"the picture has {opened.width} x {opened.height} pixels; {PIXELS:,} are the most")
        picture = ImageOps.exif_transpose(opened).convert("RGBA")  # photographs are stored lying down
    except UserError:
        raise
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise UserError(f"this is no picture that can be read, of {', '.join(FORMATS)} ({error})") from error
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("L" if channels == 1 else "RGB")
    if invert:
        picture = ImageOps.invert(picture)
    if centre:
        picture = centred(picture, (width, height))
    else:
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture)).view(height, width, -1).permute(2, 0, 1)
    return pixels if binarize == "none" else binarized(pixels, "threshold").to(torch.uint8) * 255


def centred(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """What is light in it, scaled to 20/28 of `size` and put with its centre of mass at the middle (LeCun et al. 1998,
    as MNIST was made)."""
    brightness = np.asarray(picture.convert("L"), dtype=float)
    ink = brightness > INK * brightness.max()
    if not ink.any():
        return Image.new(picture.mode, size)
    (top, bottom), (left, right) = (np.flatnonzero(ink.any(axis))[[0, -1]] for axis in (1, 0))
    figure = picture.crop((int(left), int(top), int(right) + 1, int(bottom) + 1))
    scale = 20 / 28 * min(size[0] / figure.width, size[1] / figure.height)
    figure = figure.resize(
        (max(1, round(scale * figure.width)), max(1, round(scale * figure.height))), Image.Resampling.BILINEAR
    )
    mass = np.asarray(figure.convert("L"), dtype=float)
    # MNIST's are at the middle of pixel 14 of 0 to 27.
    x, y = (
        np.average(np.arange(n) + 0.5, weights=mass.sum(axis)) for n, axis in ((figure.width, 0), (figure.height, 1))
    )
    canvas = Image.new(picture.mode, size)
    canvas.paste(figure, (round((size[0] + 1) / 2 - x), round((size[1] + 1) / 2 - y)))
    return canvas


def text(images: Tensor) -> list[str]:
    """`(N, C, H, W)` in [0, 1]: of each its bytes by row, pixel and channel, in base64."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return [base64.b64encode(image.numpy().tobytes()).decode() for image in pixels]
