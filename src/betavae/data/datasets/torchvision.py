"""Sets that torchvision downloads: Fashion-MNIST, KMNIST, CIFAR-10 and SVHN, with the labels' names.

Without `download` nothing is written, and a set that is not there is an error.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from betavae.data.image_set import ImageSet
from betavae.errors import UserError

MNIST_FILES = (
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, unpacked"
)


def load_or_download(make: Callable[[], Any], name: str, folder: Path, files: str, download: bool) -> Any:
    """`make()`, or what is to be put into `folder` where that fails."""
    try:
        return make()
    except (AssertionError, ValueError) as error:
        raise UserError(f"{folder} holds files that are not {name}'s, or damaged; delete them") from error
    except Exception as error:  # torchvision lets through whatever a socket, a disk or an archive can raise
        if not download:
            raise UserError(
                f"{name} is not in {folder}; pass the folder that it is in, or can be downloaded to, by data_root=PATH"
            ) from error
        raise UserError(
            f"{name} is not in {folder} and could not be downloaded ({type(error).__name__}); with no network, put "
            f"its files there: {files}"
        ) from error


def load_mnist_like(name: str, root: Path, split: str, download: bool) -> ImageSet | None:
    """A set in MNIST's format. torchvision knows no checksums of unpacked files, so shapes are looked at."""
    from torchvision import datasets  # here and below, since it takes a second

    if split == "validation":
        return None
    cls, folder = getattr(datasets, name), root / name / "raw"
    data = load_or_download(
        lambda: cls(str(root), train=split == "train", download=download), name, folder, MNIST_FILES, download
    )
    size = 60_000 if split == "train" else 10_000
    if data.data.shape != (size, 28, 28) or data.targets.shape != (size,) or data.targets.max() > 9:
        raise UserError(f"{folder} holds files that are not {name}'s (the shape is wrong); delete them")
    return ImageSet(data.data.unsqueeze(1), data.targets, data.classes)


def fashion_mnist(root: Path, split: str, download: bool = True) -> ImageSet | None:
    """Clothes, 60,000 + 10,000 of 28 x 28 (Xiao et al. 2017)."""
    return load_mnist_like("FashionMNIST", root, split, download)


def kmnist(root: Path, split: str, download: bool = True) -> ImageSet | None:
    """Cursive Japanese, 60,000 + 10,000 of 28 x 28 (Clanuwat et al. 2018)."""
    return load_mnist_like("KMNIST", root, split, download)


def cifar10(root: Path, split: str, download: bool = True) -> ImageSet | None:
    """Small photographs in colour, 50,000 + 10,000 of 32 x 32 (Krizhevsky 2009)."""
    from torchvision import datasets

    if split == "validation":
        return None
    make = lambda: datasets.CIFAR10(str(root), train=split == "train", download=download)  # noqa: E731
    data = load_or_download(
        make, "CIFAR-10", root, f"{datasets.CIFAR10.filename}, from {datasets.CIFAR10.url}", download
    )
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(pixels, torch.tensor(data.targets), data.classes)


def svhn(root: Path, split: str, download: bool = True) -> ImageSet | None:
    """House numbers in colour, 73,257 + 26,032 of 32 x 32 (Netzer et al. 2011)."""
    if split == "validation":
        return None
    if importlib.util.find_spec("scipy") is None:
        raise UserError("data=svhn is in MATLAB's format, which scipy reads: pip install scipy")
    from torchvision import datasets

    folder = root / "SVHN"
    url, name, _ = datasets.SVHN.split_list[split]
    make = lambda: datasets.SVHN(str(folder), split=split, download=download)  # noqa: E731
    data = load_or_download(make, "SVHN", folder, f"{name}, from {url}", download)
    return ImageSet(torch.from_numpy(np.ascontiguousarray(data.data)), torch.from_numpy(data.labels))
