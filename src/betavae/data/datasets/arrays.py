"""Images in a NumPy file, FILE.npy or FILE.npz, as `np.save` and `np.savez` write them. Nothing is ever unpickled."""

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from betavae.data.holdout import DEFAULT_HOLDOUT, random_holdout_indices, remaining_indices
from betavae.data.image_set import ImageSet, LazySubset
from betavae.errors import UserError


def tensor_from_mmap(array: np.ndarray) -> Tensor:
    """A tensor on the array's own memory, which may be a file mapped for reading.

    Mapped copy-on-write instead, torch would have nothing to warn of; but Linux counts such a mapping as memory that
    may be wanted, and refuses one of a file larger than memory.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def open_arrays(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of a .npz by their names, read when asked for; a .npy as `images`, mapped and not read.

    Raises UserError if there is no such file, or it is not what its name says.
    """
    try:
        archive = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(archive, np.ndarray):
            check_compression(archive.zip)
    except FileNotFoundError as error:
        raise UserError(f"{path} cannot be read: there is no such file") from error
    except Exception as error:  # ValueError, EOFError, BadZipFile, OSError, ...
        raise UserError(f"{path} is not a whole NumPy file of plain arrays ({error})") from error
    return {"images": archive} if isinstance(archive, np.ndarray) else archive


def check_compression(archive: zipfile.ZipFile) -> None:
    """Raises ValueError for other compression than NumPy's, whose ratio is at most 1032, where theirs has no limit."""
    for part in archive.infolist():
        if part.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{part.filename} is compressed by a method that NumPy does not write")


def read_array(held: Mapping[str, np.ndarray], key: str, path: Path) -> np.ndarray:
    """Raises UserError if there is no such array in the file, or it cannot be read."""
    if key not in held:
        raise UserError(f"{path} holds {', '.join(held) or 'nothing'}; it must hold {key} as well")
    try:
        return held[key]
    except Exception as error:  # a pickled object, a damaged archive
        raise UserError(f"{path}: {key} cannot be read ({error})") from error


def read_pixels(held: Mapping[str, np.ndarray], path: Path, key: str | None = None) -> Tensor:
    """`(N, C, H, W)` uint8, from the array named `key`, else `images`, else the only one.

    `(N, H, W)`, `(N, H, W, C)` and `(N, C, H, W)` are told apart by C, which is 1 or 3; where both could be, it is
    `(N, C, H, W)`. Raises UserError for anything else, with the line that converts it where there is one.
    """
    if key is None:
        pictures = [name for name in held if name != "labels"]
        if "images" not in held and len(pictures) != 1:
            raise UserError(f"{path} holds {', '.join(held) or 'nothing'}: which are the pictures? Name them images")
        key = "images" if "images" in held else pictures[0]
    array = read_array(held, key, path)
    if array.dtype != np.uint8:
        scale = " * 255" if array.dtype.kind in "fb" else " / 257" if array.dtype == np.uint16 else ""
        meant = "floats in [0, 1]" if array.dtype.kind == "f" else str(array.dtype)
        raise UserError(
            f"{path}: {key} holds {meant} and must hold bytes (uint8, 0 to 255); convert it once, by "
            f"`pixels = ({key}{scale}).round().clip(0, 255).astype('uint8')`"
        )
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or not array.size:
        raise UserError(
            f"{path}: {key} is {tuple(array.shape)}; it must be (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3"
        )
    return tensor_from_mmap(array)


def read_labels(held: Mapping[str, np.ndarray], key: str, n: int, path: Path) -> Tensor:
    """`(n,)` or `(n, F)` int64; zeros where the file has none. Raises UserError for other shapes and types."""
    if key not in held:
        return torch.zeros(n, dtype=torch.int64)
    labels = read_array(held, key, path)
    if labels.dtype.kind not in "iub" or labels.ndim not in (1, 2) or len(labels) != n:
        raise UserError(
            f"{path}: {key} is {tuple(labels.shape)} of {labels.dtype}; it must be whole numbers, ({n},) or ({n}, F)"
        )
    numbers = torch.from_numpy(labels.astype(np.int64))
    return numbers[:, 0] if numbers.shape[1:] == (1,) else numbers


def arrays(root: Path, split: str, test_size: float | None = None) -> ImageSet | None:
    """`root` is FILE.npy or FILE.npz with `images` (uint8) and, if there are any, `labels`; or with `x_train`,
    `y_train`, `x_test`, `y_test`, as Keras publishes its sets.

    Where it has no test images of its own, `test_size` of them (a share or a count; None: a tenth) are set aside by a
    fixed seed. A .npy stays in its file and is mapped into memory.
    """
    path = Path(root).expanduser()
    held = open_arrays(path)
    if split == "validation":
        return None
    if "x_train" in held:
        if test_size is not None:
            raise UserError(f"data.test_size={test_size} is invalid: expected null ({path} has its own test images)")
        pixels = read_pixels(held, path, f"x_{split}")
        return ImageSet(pixels, read_labels(held, f"y_{split}", len(pixels), path))
    pixels = read_pixels(held, path)
    labels = read_labels(held, "labels", len(pixels), path)
    test = random_holdout_indices(len(pixels), DEFAULT_HOLDOUT if test_size is None else test_size, "data.test_size")
    index = test.sort().values if split == "test" else remaining_indices(len(pixels), test)
    return ImageSet(LazySubset(pixels, index), labels[index])
