"""Pictures on their way in and out: what a user draws or uploads as a model's pixels, a model's pixels as text."""

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from betavae.data.image_io import UnreadableImage, read_image
from betavae.data.loader import binarize_pixels
from betavae.errors import UserError

MAX_UPLOAD_BYTES = 10 * 2**20  # bytes
PIXELS = 25_000_000
INK_THRESHOLD = 0.1  # of full brightness: darker pixels are no part of a digit


def read_upload(
    content: bytes,
    shape: tuple[int, int, int],
    centre: bool = False,
    invert: bool = False,
    binarize: str = "none",
    fit: str = "crop",
    background: str = "white",
) -> Tensor:
    """A picture file as `(C, H, W)` uint8, as models of images of that shape would see it: read by `read_picture`; with
    `invert`, light for dark; with `centre`, a single light figure on black put as MNIST's digits are; of models of
    binarised images, black and white.

    Raises UserError if it is no picture, one of more than `PIXELS`, or damaged.
    """
    try:
        pixels, _ = read_image(io.BytesIO(content), shape, fit, background, PIXELS, own_size=centre)
    except UnreadableImage as error:
        raise UserError(f"this picture cannot be read ({error})") from error
    if invert:
        pixels = 255 - pixels
    if centre:
        pixels = centred(pixels, shape[1:])
    return pixels if binarize == "none" else binarize_pixels(pixels, "threshold").to(torch.uint8) * 255


def centred(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """What is light in `(C, H, W)`, scaled to 20/28 of `size` (height and width) and put with its centre of mass at the
    middle (LeCun et al. 1998, as MNIST was made)."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
    brightness = np.asarray(picture.convert("L"), dtype=np.float32)
    ink = brightness > INK_THRESHOLD * brightness.max()
    canvas = Image.new(picture.mode, (size[1], size[0]))
    if ink.any():
        (top, bottom), (left, right) = (np.flatnonzero(ink.any(axis))[[0, -1]] for axis in (1, 0))
        figure = picture.crop((int(left), int(top), int(right) + 1, int(bottom) + 1))
        scale = 20 / 28 * min(canvas.width / figure.width, canvas.height / figure.height)
        figure = figure.resize(
            (max(1, round(scale * figure.width)), max(1, round(scale * figure.height))), Image.Resampling.BILINEAR
        )
        mass = np.asarray(figure.convert("L"), dtype=float)
        # MNIST's are at the middle of pixel 14 of 0 to 27.
        x, y = (
            np.average(np.arange(n) + 0.5, weights=mass.sum(axis))
            for n, axis in ((figure.width, 0), (figure.height, 1))
        )
        canvas.paste(figure, (round((canvas.width + 1) / 2 - x), round((canvas.height + 1) / 2 - y)))
    return torch.from_numpy(np.array(canvas)).view(*size, -1).permute(2, 0, 1)


def to_base64(images: Tensor) -> list[str]:
    """`(N, C, H, W)` in [0, 1]: of each its bytes by row, pixel and channel, in base64."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return [base64.b64encode(image.numpy().tobytes()).decode() for image in pixels]
