"""Images from and to the page: read the pictures a user draws or uploads, and encode images as text."""

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from betavae.data.image_io import UnreadableImage, read_image
from betavae.data.loader import binarize_pixels
from betavae.errors import UserError

MAX_UPLOAD_BYTES = 10 * 2**20
MAX_PIXELS = 25_000_000
INK_THRESHOLD = 0.1  # share of the highest brightness from which a pixel counts as ink
MNIST_FIGURE_SIZE = 20 / 28  # share of the image that the figure fills


def read_upload(
    content: bytes,
    shape: tuple[int, int, int],
    center: bool = False,
    invert: bool = False,
    binarize: str = "none",
    fit: str = "crop",
    background: str = "white",
) -> Tensor:
    """Read a picture file as a model for images of `shape` sees it: `(C, H, W)` uint8.

    Args:
        content: The file.
        shape: (C, H, W).
        center: Scale and center a light figure on black as MNIST's digits are.
        invert: Swap light and dark.
        binarize: The data setting of the model; except for "none", the result is black and white.
        fit: See `read_image`.
        background: See `read_image`.

    Raises:
        UserError: If the file is not a picture, is damaged, or has more than `MAX_PIXELS`.
    """
    try:
        pixels, _ = read_image(io.BytesIO(content), shape, fit, background, MAX_PIXELS, own_size=center)
    except UnreadableImage as error:
        raise UserError(f"this picture is not readable ({error})") from error
    if invert:
        pixels = 255 - pixels
    if center:
        pixels = center_figure(pixels, shape[1:])
    return pixels if binarize == "none" else binarize_pixels(pixels, "threshold").to(torch.uint8) * 255


def center_figure(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale the ink of `(C, H, W)` to fit `size` (H, W), with its center of mass in the middle.

    This is how MNIST was made (LeCun et al. 1998).
    """
    picture = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
    brightness = np.asarray(picture.convert("L"), dtype=np.float32)
    ink = brightness > INK_THRESHOLD * brightness.max()
    canvas = Image.new(picture.mode, (size[1], size[0]))
    if ink.any():
        (top, bottom), (left, right) = (np.flatnonzero(ink.any(axis))[[0, -1]] for axis in (1, 0))
        figure = picture.crop((int(left), int(top), int(right) + 1, int(bottom) + 1))
        scale = MNIST_FIGURE_SIZE * min(canvas.width / figure.width, canvas.height / figure.height)
        scaled = (max(1, round(scale * figure.width)), max(1, round(scale * figure.height)))
        figure = figure.resize(scaled, Image.Resampling.BILINEAR)
        mass = np.asarray(figure.convert("L"), dtype=float)
        mass += mass.sum() == 0  # ink that is too fine for the model's size
        x, y = (
            np.average(np.arange(n) + 0.5, weights=mass.sum(axis))
            for n, axis in ((figure.width, 0), (figure.height, 1))
        )
        # MNIST's centers are in the middle of pixel 14 of 0 to 27.
        canvas.paste(figure, (round((canvas.width + 1) / 2 - x), round((canvas.height + 1) / 2 - y)))
    return torch.from_numpy(np.array(canvas)).view(*size, -1).permute(2, 0, 1)


def to_base64(images: Tensor) -> list[str]:
    """Encode images `(N, C, H, W)` in [0, 1] as base64 of their bytes, ordered by row, column and channel."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return [base64.b64encode(image.numpy().tobytes()).decode() for image in pixels]
