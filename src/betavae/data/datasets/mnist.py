"""MNIST, from the files inside this package."""

import hashlib
import lzma
import os
import tempfile
from importlib import resources
from pathlib import Path

import torch

from betavae.data.image_set import ImageSet
from betavae.errors import UserError

# Of the unpacked files, as published with the database.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
LARGEST_FILE = 47_040_016  # bytes; nothing of MNIST unpacks to more


def mnist(root: Path, split: str, download: bool = True) -> ImageSet | None:
    """MNIST (LeCun, Cortes & Burges), unpacked once into `root`/MNIST/raw, where torchvision looks for it too, and
    compared with its published MD5 sums. Without `download` nothing is written: it is unpacked into memory."""
    if split == "validation":
        return None
    part = {"train": "train", "test": "t10k"}[split]
    images, labels = (read_idx(root, f"{part}-{kind}", download) for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    # IDX: a header of 16 bytes before images, of 8 before labels.
    pixels = torch.frombuffer(images, dtype=torch.uint8, offset=16).view(-1, 1, 28, 28)
    return ImageSet(pixels, torch.frombuffer(labels, dtype=torch.uint8, offset=8).long(), [str(d) for d in range(10)])


def read_idx(root: Path, name: str, download: bool) -> bytearray:
    path = root / "MNIST" / "raw" / name
    if not path.exists():
        packed = resources.files("betavae.data.datasets") / "mnist_files" / f"{name}.xz"
        unpacked = lzma.LZMADecompressor().decompress(packed.read_bytes(), max_length=LARGEST_FILE)
        if not download:
            return bytearray(unpacked)
        atomic_write_bytes(path, unpacked)
    found = bytearray(path.read_bytes())
    if hashlib.md5(found, usedforsecurity=False).hexdigest() != MNIST_MD5[name]:
        raise UserError(f"{path} is not MNIST's file (its MD5 sum is wrong); delete it and it is unpacked anew")
    return found


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Written beside and renamed, so that two first runs at once both find whole files."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            part = Path(file.name)
            file.write(content)
        os.replace(part, path)
    except OSError as error:
        if part:
            part.unlink(missing_ok=True)
        raise UserError(f"data.root: cannot write {path} ({error.strerror}); name another folder") from error
