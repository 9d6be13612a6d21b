"""dSprites itself (Matthey et al. 2017), from the file that its authors publish."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from betavae.data.datasets.arrays import check_compression
from betavae.data.datasets.sprites import split_indices
from betavae.data.image_set import ImageSet
from betavae.errors import UserError

FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"


class PackedImages:
    """Binary images `(N, 1, H, W)`, eight pixels a byte, handed out as uint8, 0 or 255."""

    def __init__(self, packed: Tensor, width: int):
        """`packed` is uint8 `(N, H * W / 8)`, the first pixel in the highest bit."""
        self.packed = packed
        self.shape = torch.Size([len(packed), 1, packed.shape[1] * 8 // width, width])
        eight = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1) * 255
        self.pixels = torch.from_numpy(eight).view(torch.int64).squeeze(1).to(packed.device)  # of each byte

    def __len__(self) -> int:
        return len(self.packed)

    def to(self, device: torch.device | str) -> "PackedImages":
        return PackedImages(self.packed.to(device), self.shape[3])

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """The images `index` `(B,)` as `(B, 1, H, W)` uint8."""
        words = self.pixels.index_select(0, self.packed.index_select(0, index).flatten().int())
        return words.view(torch.uint8).view(-1, *self.shape[1:])


def dsprites(root: Path, split: str) -> ImageSet:
    """The 737,280 images of `root/FILE` and their factors `(N, 5)`: shape, scale, orientation, posX, posY.

    The colour, of one value, is left out. Splits are those of `rows_of`. Packed images take 380 MB of memory.
    """
    path = root / FILE
    if not path.exists():
        raise UserError(f"{path} is not there; put it there from https://github.com/google-deepmind/dsprites-dataset")
    try:
        packed, width = read_bits(path)
        with np.load(path, allow_pickle=False) as file:  # the other arrays, of which one is pickled, are not opened
            classes = file["latents_classes"]
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not dSprites' file, or is damaged ({error}); fetch it again") from error
    if classes.shape != (len(packed), 6) or classes.dtype.kind not in "iu":
        raise UserError(f"{path} is not dSprites' file: latents_classes is {classes.dtype} {classes.shape}")
    labels = torch.from_numpy(classes[:, 1:].astype(np.int64))
    rows = split_indices(split, len(packed))
    return (
        ImageSet(PackedImages(packed, width), labels)
        if rows is None
        else ImageSet(PackedImages(packed[rows], width), labels[rows])
    )


def read_bits(path: Path, at_once: int = 8192) -> tuple[Tensor, int]:
    """The array imgs packed, and the width of an image; never all of its 3 GB at once."""
    with zipfile.ZipFile(path) as archive, archive.open("imgs.npy") as file:
        check_compression(archive)
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"imgs.npy is of version {version}")
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
        if len(shape) != 3 or columns_first or dtype != np.uint8 or shape[2] % 8:
            raise ValueError(f"imgs is {dtype} {shape}")
        n, size = shape[0], shape[1] * shape[2]
        if n * size > archive.getinfo("imgs.npy").file_size:
            raise ValueError(f"imgs.npy has no {shape} bytes")
        packed = np.empty((n, size // 8), np.uint8)
        for first in range(0, n, at_once):
            count = min(at_once, n - first)
            images = np.frombuffer(file.read(count * size), np.uint8).reshape(count, size)
            if images.max() > 1:
                raise ValueError("imgs has other values than 0 and 1")
            packed[first : first + count] = np.packbits(images, axis=1)
    return torch.from_numpy(packed), shape[2]
