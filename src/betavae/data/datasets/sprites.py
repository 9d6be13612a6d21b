"""Images with known factors: sprites like those of dSprites (Matthey et al. 2017), drawn on demand.

3 shapes x 6 scales x 40 orientations x 32 x 32 positions = 737,280 binary images, in dSprites' order: image 0 has all
factors 0, and the last factor varies fastest. As in dSprites, the scale runs from 0.5 to 1 and the orientation from 0
to 2 pi, both ends included, so orientations 0 and 39 are the same image. The pixels are not identical to dSprites'.
"""

import math
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from betavae.data.image_set import ImageSet, LazySubset
from betavae.errors import UserError

SHAPES = ["square", "ellipse", "heart"]
FACTORS = {"shape": 3, "scale": 6, "orientation": 40, "posX": 32, "posY": 32}  # the number of values of each
NUM_IMAGES = math.prod(FACTORS.values())
SPLIT_SEED, SPLIT_SIZE = 0, 10_000  # of validation and test
# In pixels of a 64 x 64 image, at scale 1: the distance from the border of the center of positions 0 and 31. Positions
# are 1 apart, and no shape extends further than this from its center.
RADIUS = 16.5
SUBPIXELS = 4  # along a side: a pixel is set if at least half of its 4 x 4 points lie in the shape


class Sprites:
    """All sprites, (N, 1, H, W), uint8, 0 or 255, rendered on access; 3 MB of memory.

    Each sprite is stored at the top left of an empty image, in one flat row of bytes with as many empty rows after it
    as it can move down. An image is a window into this row: a window that starts 1 byte (or H bytes) earlier shows the
    sprite 1 pixel further right (or down), and only empty pixels enter.

    Args:
        image_size: H and W, 64 or 32. At 32, a position is half a pixel.

    Raises:
        UserError: For another size.
    """

    def __init__(self, image_size: int = 64):
        if image_size not in (32, 64):
            raise UserError(f"data.image_size={image_size} is invalid: expected 64 or 32")
        self.image_size = image_size
        self.phases = 64 // image_size  # positions in a pixel; each is drawn
        self.shape = torch.Size([NUM_IMAGES, 1, image_size, image_size])
        sprites = torch.cat([render_sprites(shape, image_size) for shape in SHAPES])
        side = sprites.shape[-1]
        blocks = sprites.new_zeros(len(sprites) + 1, image_size, image_size)  # the first block is empty
        blocks[1:, :side, :side] = sprites
        self.bytes = blocks.flatten()

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, device: torch.device | str) -> "Sprites":
        moved = copy(self)
        moved.bytes = self.bytes.to(device)
        return moved

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Draw the images at `index`, (B,), as (B, 1, H, W)."""
        size, phases = self.image_size, self.phases
        y, x, sprite = index % 32, index // 32 % 32, index // 1024
        block = (sprite * phases + x % phases) * phases + y % phases
        start = (block + 1) * size**2 - x // phases - y // phases * size
        windows = self.bytes.as_strided((len(self.bytes) - size**2 + 1, size**2), (1, 1))
        return windows.index_select(0, start).view(-1, 1, size, size)


def render_sprites(shape: str, image_size: int) -> Tensor:
    """Draw every sprite of a shape at the top left.

    Returns:
        (6 * 40 * phases * phases, side, side), uint8, 0 or 255: one phase and side 33 in images of 64 x 64; two phases
        in each direction, half a pixel apart, and side 17 in images of 32 x 32.
    """
    phases = 64 // image_size
    side = math.ceil((2 * RADIUS + phases - 1) / phases)
    # Points in pixels of a 64 x 64 image, from the center of the sprite.
    points = (torch.arange(side * SUBPIXELS, dtype=torch.float64) + 0.5) / SUBPIXELS * phases - RADIUS
    moved = points - torch.arange(phases)[:, None]  # (phases, points)
    y, x = moved[:, None, :, None], moved[None, :, None, :]
    images = []
    for scale in torch.linspace(0.5, 1, 6, dtype=torch.float64):
        for angle in torch.linspace(0, 2 * math.pi, 40, dtype=torch.float64):
            cos, sin = angle.cos() / scale, angle.sin() / scale
            inside = contains(shape, cos * x + sin * y, cos * y - sin * x)  # (phases y, phases x, points y, points x)
            share = inside.unflatten(-1, (side, SUBPIXELS)).unflatten(-3, (side, SUBPIXELS)).double().mean((-3, -1))
            images.append((share >= 0.5).transpose(0, 1).flatten(0, 1))
    return torch.cat(images).to(torch.uint8) * 255


def contains(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Test whether points lie in a shape at scale 1.

    Points are in pixels of a 64 x 64 image, from the centroid of the shape; y points down.
    """
    if shape == "square":
        return (x.abs() < 11.3) & (y.abs() < 11.3)
    if shape == "ellipse":
        return (x / 16.3) ** 2 + (y / 8.2) ** 2 < 1
    # (x^2 + y^2 - 1)^3 = x^2 y^3 with y upwards, whose centroid is at y = 0.2935 and which extends 1.291 from there.
    x, y = x / 12.7, 0.2935 - y / 12.7
    inner = x * x + y * y - 1
    return inner * inner * inner < x * x * y * y * y


def load_sprites(root: Path, split: str, image_size: int = 64) -> ImageSet:
    """Load a split of the sprites with their factors, (N, 5), as labels. `root` is not used."""
    rows = split_indices(split, NUM_IMAGES)
    sprites = Sprites(image_size)
    return ImageSet(sprites if rows is None else LazySubset(sprites, rows), factor_labels(rows))


def factor_labels(rows: Tensor | None = None) -> Tensor:
    """Return the values 0, 1, ... of `FACTORS` of the images `rows` (None: of all), (N, 5) int64."""
    sizes = tuple(FACTORS.values())
    rows = torch.arange(NUM_IMAGES) if rows is None else rows
    return torch.stack(torch.unravel_index(rows, sizes), 1)


def split_indices(split: str, size: int) -> Tensor | None:
    """Return the images of a split, or None for all.

    "train" is all images, as in the literature on these data, where nothing is held out. "validation" and "test" are
    10,000 images each, drawn from a fixed seed, with no image in both. So the model was trained on the test images.
    """
    if split == "train":
        return None
    order = torch.randperm(size, generator=torch.Generator().manual_seed(SPLIT_SEED))
    start = SPLIT_SIZE * ["validation", "test"].index(split)
    return order[start : start + SPLIT_SIZE].sort().values
