"""dSprites (Matthey et al. 2017), from the file that its authors publish."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from betavae.data.array_io import check_compression
from betavae.data.datasets.sprites import split_indices
from betavae.data.image_set import ImageSet
from betavae.errors import UserError

FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
CHUNK = 8192  # images that are unpacked at once, of 3 GB in all


class PackedImages:
    """Binary images (N, 1, H, W) with eight pixels a byte, unpacked to uint8, 0 or 255.

    Args:
        packed: (N, H * W / 8), uint8, the first pixel in the highest bit.
        width: W, in pixels.
    """

    def __init__(self, packed: Tensor, width: int):
        self.packed = packed
        self.shape = torch.Size([len(packed), 1, packed.shape[1] * 8 // width, width])
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1) * 255
        self.table = torch.from_numpy(bits).view(torch.int64).squeeze(1).to(packed.device)  # byte -> eight pixels

    def __len__(self) -> int:
        return len(self.packed)

    def to(self, device: torch.device | str) -> "PackedImages":
        return PackedImages(self.packed.to(device), self.shape[3])

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Unpack the images at `index`, (B,), as (B, 1, H, W)."""
        words = self.table.index_select(0, self.packed.index_select(0, index).flatten().int())
        return words.view(torch.uint8).view(-1, *self.shape[1:])


def load_dsprites(root: Path, split: str) -> ImageSet:
    """Load a split of the 737,280 images of `root/FILE`, which take 380 MB of memory.

    Labels are the factors (N, 5): shape, scale, orientation, posX, posY. The color, of one value, is left out.

    Raises:
        UserError: If the file is missing or damaged.
    """
    path = root / FILE
    if not path.exists():
        raise UserError(f"{path} is missing; download it from https://github.com/google-deepmind/dsprites-dataset")
    try:
        packed, width = read_packed(path)
        with np.load(path, allow_pickle=False) as file:  # other arrays are not read; one of them is pickled
            classes = file["latents_classes"]
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not dSprites' file, or is damaged ({error}); download it again") from error
    if classes.shape != (len(packed), 6) or classes.dtype.kind not in "iu":
        raise UserError(f"{path} is not dSprites' file: latents_classes is {classes.dtype} {classes.shape}")
    labels = torch.from_numpy(classes[:, 1:].astype(np.int64))
    rows = split_indices(split, len(packed))
    if rows is not None:
        packed, labels = packed[rows], labels[rows]
    return ImageSet(PackedImages(packed, width), labels)


def read_packed(path: Path) -> tuple[Tensor, int]:
    """Read the images eight pixels a byte, (N, H * W / 8), and their width.

    Raises:
        ValueError: If the array `imgs` has another type, shape or value.
    """
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
        for start in range(0, n, CHUNK):
            count = min(CHUNK, n - start)
            images = np.frombuffer(file.read(count * size), np.uint8).reshape(count, size)
            if images.max() > 1:
                raise ValueError("imgs has other values than 0 and 1")
            packed[start : start + count] = np.packbits(images, axis=1)
    return torch.from_numpy(packed), shape[2]
