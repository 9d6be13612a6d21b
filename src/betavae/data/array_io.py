"""Read images and labels from NumPy files. Nothing is ever unpickled."""

import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from betavae.data.file_listing import natural_sort_key
from betavae.data.scaling import FULL_SCALE
from betavae.errors import UserError


class ArrayFile:
    """The arrays of a NumPy file.

    Those of FILE.npz are read on demand. That of FILE.npy has the name `images`, and is mapped into memory.

    Raises:
        UserError: If the file does not exist or is not a NumPy file.
    """

    arrays: Mapping[str, np.ndarray]

    def __init__(self, path: Path):
        self.path = path
        try:
            content = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(content, np.ndarray):
                check_compression(content.zip)
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist") from error
        except Exception as error:  # ValueError, EOFError, BadZipFile, OSError, ...
            raise UserError(f"{path} is not a complete NumPy file of plain arrays: {error}") from error
        self.arrays = {"images": content} if isinstance(content, np.ndarray) else content

    def read(self, key: str) -> np.ndarray:
        """Read an array.

        Raises:
            UserError: If the file has no such array, or the array is damaged.
        """
        if key not in self.arrays:
            raise UserError(f"{self.path} has no array {key} (it has {', '.join(self.arrays) or 'none'})")
        try:
            return self.arrays[key]
        except Exception as error:  # a pickled object, a damaged archive
            raise UserError(f"{self.path}: {key} is not a plain array: {error}") from error

    def read_pixels(self, key: str | None = None) -> Tensor:
        """Read images (N, H, W), (N, H, W, C) or (N, C, H, W) in their own type, with C 1 or 3.

        An array of either of the last two layouts is taken as (N, C, H, W).

        Args:
            key: The name of the array. None takes `images`, or else the only array beside `labels`.

        Returns:
            (N, C, H, W), of one of the types of `FULL_SCALE`.

        Raises:
            UserError: If there is no such array. For another type, the message says how to convert it.
        """
        if key is None:
            candidates = [name for name in self.arrays if name not in ("labels", "names")]
            if "images" not in self.arrays and len(candidates) != 1:
                found = ", ".join(self.arrays) or "no arrays"
                raise UserError(f"{self.path} holds {found}: expected one array of images; name it images")
            key = "images" if "images" in self.arrays else candidates[0]
        array = self.read(key)
        if array.dtype.name not in FULL_SCALE or not array.dtype.isnative:
            raise UserError(f"{self.path}: {key} {describe_type(array)}")
        if array.ndim == 3:
            array = array[:, None]
        elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
            array = array.transpose(0, 3, 1, 2)
        if array.ndim != 4 or array.shape[1] not in (1, 3) or not array.size:
            raise UserError(
                f"{self.path}: {key} has shape {tuple(array.shape)}: expected (N, H, W), (N, H, W, C) or (N, C, H, W) "
                "with C 1 or 3"
            )
        return tensor_from_mmap(array)

    def read_labels(self, key: str, n: int, keys: Sequence[str] = ()) -> tuple[Tensor, list[str] | None]:
        """Read the labels of `n` images, integers or text; zeros if the file has none.

        Args:
            key: The name of the array.
            n: The number of images.
            keys: The label arrays of all splits, which share their classes.

        Returns:
            int64, (N,) or (N, F) for F factors, and the classes of single labels. Labels 0, 1, ..., K - 1 stay as they
            are, without classes. Others are numbered in order, and the classes are their names.

        Raises:
            UserError: If they have another type or shape.
        """
        if key not in self.arrays:
            return torch.zeros(n, dtype=torch.int64), None
        labels = self.read(key)
        if labels.dtype.kind == "b":
            labels = labels.astype(np.int64)
        if labels.shape[1:] == (1,):
            labels = labels[:, 0]
        kinds = "iubUS" if labels.ndim == 1 else "iub"
        if labels.dtype.kind not in kinds or labels.ndim not in (1, 2) or len(labels) != n:
            raise UserError(
                f"{self.path}: {key} is {labels.dtype} {tuple(labels.shape)}: expected integers or text, ({n},), or "
                f"integers ({n}, F)"
            )
        if labels.ndim == 2:
            return torch.from_numpy(labels.astype(np.int64)), None
        others = [self.read(other).reshape(-1) for other in keys if other in self.arrays]
        for other in others:
            if (other.dtype.kind in "US") != (labels.dtype.kind in "US") or other.dtype.kind not in kinds:
                raise UserError(f"{self.path}: {key} is {labels.dtype}, and other labels are {other.dtype}")
        return number_labels(labels, np.concatenate([labels, *others]))


def number_labels(labels: np.ndarray, known: np.ndarray) -> tuple[Tensor, list[str] | None]:
    """Number labels among the `known` ones of all splits; see `ArrayFile.read_labels`."""
    values = np.unique(known)
    if values.dtype.kind in "iub" and values[0] == 0 and values[-1] == len(values) - 1:
        return torch.from_numpy(labels.astype(np.int64)), None
    if values.dtype.kind == "S":
        values, labels = (np.char.decode(part, "utf-8", "backslashreplace") for part in (values, labels))
    if values.dtype.kind == "U":
        values = np.array(sorted(values.tolist(), key=natural_sort_key))
    index = {value: number for number, value in enumerate(values.tolist())}
    return torch.tensor([index[value] for value in labels.tolist()]), [str(value) for value in values.tolist()]


def describe_type(array: np.ndarray) -> str:
    """Describe an array of a type that is not read, and how to convert it without a loss."""
    expected = ", ".join(FULL_SCALE)
    if array.dtype.kind not in "iuf" or not array.size:
        return f"is of type {array.dtype}: expected one of {expected}"
    low, high = array.min(), array.max()
    if array.dtype.name in FULL_SCALE:  # in the other byte order
        name = array.dtype.name
    elif array.dtype.kind == "f":
        name = "float64"
    else:
        exact = {"uint8": (0, 2**8 - 1), "uint16": (0, 2**16 - 1), "float32": (-(2**24), 2**24)}
        name = next((name for name, (least, most) in exact.items() if least <= low and high <= most), "float64")
    scaling = " and pass data.scaling=minmax or standardize" if name.startswith("float") else ""
    return (
        f"holds {array.dtype} from {low} to {high}: expected one of {expected}; convert it once by "
        f"`images = images.astype('{name}')`{scaling}"
    )


def check_compression(archive: zipfile.ZipFile) -> None:
    """Reject compression methods that NumPy does not write, since their compression ratio has no limit.

    Raises:
        ValueError: For a member of another method.
    """
    for member in archive.infolist():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{member.filename} is compressed by a method that NumPy does not write")


def tensor_from_mmap(array: np.ndarray) -> Tensor:
    """Wrap an array as a tensor that shares its memory, which may be mapped read-only."""
    # Copy-on-write would avoid torch's warning, but Linux then refuses to map a file that is larger than memory.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
