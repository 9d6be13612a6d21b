"""Data sets that torchvision downloads: Fashion-MNIST, KMNIST, CIFAR-10 and SVHN.

Each function takes the folder `root` and a split, "train" or "test"; there are no "validation" images. Without
`download`, nothing is written. UserError is raised if the data set is missing, damaged or not downloadable.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from betavae.data.image_set import ImageSet
from betavae.errors import UserError

MNIST_FILES = (
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, unpacked"
)


def load_or_download(load: Callable[..., Any], name: str, folder: Path, files: str, download: bool) -> Any:
    """Return `load(download=download)`.

    Raises:
        UserError: If it fails. The message says which `files` to put into `folder`.
    """
    try:
        return load(download=download)
    except (AssertionError, ValueError) as error:
        raise UserError(f"{folder} holds damaged files, or files that are not {name}'s; delete them") from error
    except Exception as error:  # torchvision does not catch the errors of sockets, disks and archives
        if not download:
            raise UserError(
                f"{name} is not in {folder}; pass its folder, or a folder to download it to, with data_root=PATH"
            ) from error
        raise UserError(
            f"{name} is not in {folder} and the download failed ({type(error).__name__}); without a network, put these "
            f"files there: {files}"
        ) from error


def load_mnist_like(name: str, root: Path, split: str, download: bool) -> ImageSet | None:
    """Load a data set in MNIST's format."""
    from torchvision import datasets  # imported late, here and below, since it takes a second

    if split == "validation":
        return None
    folder = root / name / "raw"
    load = partial(getattr(datasets, name), str(root), train=split == "train")
    data = load_or_download(load, name, folder, MNIST_FILES, download)
    # torchvision has no checksums of unpacked files.
    size = 60_000 if split == "train" else 10_000
    if data.data.shape != (size, 28, 28) or data.targets.shape != (size,) or data.targets.max() > 9:
        raise UserError(f"{folder} holds files that are not {name}'s: the shape is wrong; delete them")
    return ImageSet(data.data.unsqueeze(1), data.targets, data.classes)


def load_fashion_mnist(root: Path, split: str, download: bool = True) -> ImageSet | None:
    """Load Fashion-MNIST, 60,000 + 10,000 gray images of clothes of 28 x 28 (Xiao et al. 2017)."""
    return load_mnist_like("FashionMNIST", root, split, download)


def load_kmnist(root: Path, split: str, download: bool = True) -> ImageSet | None:
    """Load KMNIST, 60,000 + 10,000 gray images of cursive Japanese of 28 x 28 (Clanuwat et al. 2018)."""
    return load_mnist_like("KMNIST", root, split, download)


def load_cifar10(root: Path, split: str, download: bool = True) -> ImageSet | None:
    """Load CIFAR-10, 50,000 + 10,000 small color photographs of 32 x 32 (Krizhevsky 2009)."""
    from torchvision.datasets import CIFAR10

    if split == "validation":
        return None
    load = partial(CIFAR10, str(root), train=split == "train")
    data = load_or_download(load, "CIFAR-10", root, f"{CIFAR10.filename}, from {CIFAR10.url}", download)
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(pixels, torch.tensor(data.targets), data.classes)


def load_svhn(root: Path, split: str, download: bool = True) -> ImageSet | None:
    """Load SVHN, 73,257 + 26,032 color photographs of house numbers of 32 x 32 (Netzer et al. 2011)."""
    if split == "validation":
        return None
    if importlib.util.find_spec("scipy") is None:
        raise UserError("data=svhn needs scipy, which reads MATLAB's format: pip install scipy")
    from torchvision.datasets import SVHN

    folder = root / "SVHN"
    url, name, _ = SVHN.split_list[split]
    data = load_or_download(partial(SVHN, str(folder), split=split), "SVHN", folder, f"{name}, from {url}", download)
    return ImageSet(torch.from_numpy(np.ascontiguousarray(data.data)), torch.from_numpy(data.labels))
