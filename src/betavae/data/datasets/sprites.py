"""Images with known factors: sprites drawn here, with the factors of dSprites (Matthey et al. 2017).

3 shapes x 6 scales x 40 orientations x 32 x 32 positions = 737,280 binary images, in dSprites' order: image 0 has all
factors 0, and the last factor runs fastest. As there, the scale goes from 0.5 to 1 and the orientation from 0 to 2 pi,
both ends included, so that orientations 0 and 39 are the same picture. Pictures are not dSprites' own, pixel for pixel.
"""

import math
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from betavae.data.image_set import ImageSet
from betavae.errors import UserError

SHAPES = ["square", "ellipse", "heart"]
FACTORS = {"shape": 3, "scale": 6, "orientation": 40, "posX": 32, "posY": 32}  # and how many values each has
SPLIT_SEED, SPLIT_SIZE = 0, 10_000  # of validation and test
# In pixels of a 64 x 64 image, at scale 1. The centre of position 0 is RADIUS from the border, each next position is 1
# further, and position 31 is again RADIUS from the border; no shape reaches further than RADIUS from its centre.
RADIUS = 16.5
SUBPIXELS = 4  # to a side: a pixel is lit if at least half of its 4 x 4 points lie in the shape


class Sprites:
    """Pixels `(N, 1, image_size, image_size)` uint8, 0 or 255, made when they are asked for; 3 MB of memory.

    An image is a window into one flat row of bytes. In it stands each sprite as it is at the top left, its rows as far
    apart as those of an image and as many empty rows below it as it can move down. So to move a sprite right by 1 or
    down by a row is to let the window begin 1 or `image_size` bytes earlier, and what enters it there is empty.
    """

    def __init__(self, image_size: int = 64, index: Tensor | None = None):
        """Of all images or, with `index` `(N,)`, of those. In half the size, a position is half a pixel."""
        if image_size not in (32, 64):
            raise UserError(f"image_size={image_size} cannot be: sprites are drawn in 64 or 32 pixels")
        self.index = index
        self.image_size = image_size
        self.phases = 64 // image_size  # positions to a pixel; each is drawn
        self.shape = torch.Size(
            [math.prod(FACTORS.values()) if index is None else len(index), 1, image_size, image_size]
        )
        pictures = torch.cat([render_sprites(shape, image_size) for shape in SHAPES])
        side = pictures.shape[-1]
        rows = pictures.new_zeros(len(pictures) + 1, image_size, image_size)  # the first block is empty
        rows[1:, :side, :side] = pictures
        self.bytes = rows.flatten()

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, device: torch.device | str) -> "Sprites":
        moved = copy(self)
        moved.bytes = self.bytes.to(device)
        moved.index = None if self.index is None else self.index.to(device)
        return moved

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """The images `index` `(B,)` as `(B, 1, H, W)` uint8."""
        size, phases = self.image_size, self.phases
        if self.index is not None:
            index = self.index.index_select(0, index)
        y, x, sprite = index % 32, index // 32 % 32, index // 1024
        picture = (sprite * phases + x % phases) * phases + y % phases
        start = (picture + 1) * size**2 - x // phases - y // phases * size
        windows = self.bytes.as_strided((len(self.bytes) - size**2 + 1, size**2), (1, 1))
        return windows.index_select(0, start).view(-1, 1, size, size)


def render_sprites(shape: str, image_size: int) -> Tensor:
    """Every sprite of a shape, as it is at the top left: `(6 * 40 * phases * phases, side, side)` uint8, 0 or 255.

    In 64 pixels there is one phase and sprites are 33 pixels to a side; in 32 there are two in each direction, half a
    pixel apart, and sprites are 17 to a side.
    """
    phases = 64 // image_size
    side = math.ceil((2 * RADIUS + phases - 1) / phases)
    # Points in pixels of a 64 x 64 image, from the centre of the sprite.
    points = (torch.arange(side * SUBPIXELS, dtype=torch.float64) + 0.5) / SUBPIXELS * phases - RADIUS
    moved = points - torch.arange(phases)[:, None]  # (phases, points)
    y, x = moved[:, None, :, None], moved[None, :, None, :]
    pictures = []
    for scale in torch.linspace(0.5, 1, 6, dtype=torch.float64):
        for angle in torch.linspace(0, 2 * math.pi, 40, dtype=torch.float64):
            cos, sin = angle.cos() / scale, angle.sin() / scale
            lit = contains(shape, cos * x + sin * y, cos * y - sin * x)  # (phases y, phases x, points y, points x)
            share = lit.unflatten(-1, (side, SUBPIXELS)).unflatten(-3, (side, SUBPIXELS)).double().mean((-3, -1))
            pictures.append((share >= 0.5).transpose(0, 1).flatten(0, 1))
    return torch.cat(pictures).to(torch.uint8) * 255


def contains(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Whether points, in pixels of a 64 x 64 image, lie in the shape at scale 1, its centroid at 0; y points down."""
    if shape == "square":
        return (x.abs() < 11.3) & (y.abs() < 11.3)
    if shape == "ellipse":
        return (x / 16.3) ** 2 + (y / 8.2) ** 2 < 1
    # (x^2 + y^2 - 1)^3 = x^2 y^3 with y upwards, whose centroid is at y = 0.2935 and reaches 1.291 from there.
    x, y = x / 12.7, 0.2935 - y / 12.7
    inner = x * x + y * y - 1
    return inner * inner * inner < x * x * y * y * y


def sprites(root: Path, split: str, image_size: int = 64) -> ImageSet:
    """Sprites of 64 x 64 pixels, or of 32 x 32, and their factors `(N, 5)`, see `rows_of`. `root` is not used."""
    rows = split_indices(split, math.prod(FACTORS.values()))
    return ImageSet(Sprites(image_size, rows), factor_labels(rows))


def factor_labels(rows: Tensor | None = None) -> Tensor:
    """(N, 5) int64: the values 0, 1, ... of `FACTORS` of the images `rows`, or of all."""
    sizes = tuple(FACTORS.values())
    rows = torch.arange(math.prod(sizes)) if rows is None else rows
    return torch.stack(torch.unravel_index(rows, sizes), 1)


def split_indices(split: str, size: int) -> Tensor | None:
    """Which images a split has; None: all.

    "train" is all of them, as in the literature on these data, where nothing is held out. "validation" and "test" are
    10,000 each, drawn once for everybody, with no image in both. So their numbers are of images trained on.
    """
    if split == "train":
        return None
    order = torch.randperm(size, generator=torch.Generator().manual_seed(SPLIT_SEED))
    start = SPLIT_SIZE * ["validation", "test"].index(split)
    return order[start : start + SPLIT_SIZE].sort().values
