"""MNIST (LeCun, Cortes & Burges), from the files inside this package."""

import hashlib
import lzma
from importlib import resources
from pathlib import Path

import torch

from betavae.data.image_set import ImageSet
from betavae.errors import UserError
from betavae.storage.files import atomic_write_bytes

# The published MD5 sums of the unpacked files.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
MAX_FILE_BYTES = 47_040_016  # the largest unpacked file


def load_mnist(root: Path, split: str, download: bool = True) -> ImageSet | None:
    """Load the 60,000 training or 10,000 test images, (N, 1, 28, 28).

    Args:
        root: The folder where the files are unpacked once, in MNIST/raw, as torchvision has them.
        split: "train" or "test"; there are no "validation" images.
        download: Unpack into `root`; False unpacks into memory.

    Raises:
        UserError: If a file in `root` is not MNIST's, or not writable.
    """
    if split == "validation":
        return None
    part = {"train": "train", "test": "t10k"}[split]
    images, labels = (read_idx(root, f"{part}-{kind}", download) for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    # The IDX format has a header of 16 bytes before images and of 8 before labels.
    pixels = torch.frombuffer(images, dtype=torch.uint8, offset=16).view(-1, 1, 28, 28)
    return ImageSet(pixels, torch.frombuffer(labels, dtype=torch.uint8, offset=8).long(), [str(d) for d in range(10)])


def read_idx(root: Path, name: str, download: bool) -> bytearray:
    """Read a file of MNIST, and unpack it first if it is not there."""
    path = root / "MNIST" / "raw" / name
    if not path.exists():
        packed = resources.files("betavae.data.datasets") / "mnist_files" / f"{name}.xz"
        unpacked = lzma.LZMADecompressor().decompress(packed.read_bytes(), max_length=MAX_FILE_BYTES)
        if not download:
            return bytearray(unpacked)
        try:
            atomic_write_bytes(path, unpacked)
        except OSError as error:
            raise UserError(f"data.root: cannot write {path} ({error.strerror}); name another folder") from error
    content = bytearray(path.read_bytes())
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MNIST_MD5[name]:
        raise UserError(f"{path} is not MNIST's file: its MD5 sum is wrong; delete it, and it is unpacked again")
    return content
