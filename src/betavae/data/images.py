"""What a data source gives: `Images`, whose pixels lie in memory, in a mapped file, or are some rows of either."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from betavae.errors import UserError


class Subset:
    """The rows `index` `(M,)` of `pixels` `(N, C, H, W)`, copied only when and as far as they are asked for."""

    def __init__(self, pixels: "Tensor | Subset", index: Tensor):
        self.pixels, self.index = pixels, index
        self.shape: torch.Size = torch.Size((len(index), *pixels.shape[1:]))

    def __len__(self) -> int:
        return len(self.index)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        return self.pixels.index_select(dim, self.index.index_select(0, index))

    def to(self, device: torch.device | str) -> "Tensor | Subset":
        """Itself on the CPU; elsewhere a copy of all its rows."""
        if torch.device(device).type == "cpu":
            return self
        return self.pixels.index_select(0, self.index).to(device)


class Images(NamedTuple):
    """`pixels` uint8 `(N, C, H, W)`; `labels` int64 `(N,)`, or `(N, F)` for F factors; names of the labels' values."""

    pixels: Tensor | Subset
    labels: Tensor
    classes: list[str] | None = None


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the array's own memory, which may be a file mapped for reading.

    Mapped copy-on-write instead, torch would have nothing to warn of; but Linux counts such a mapping as memory that
    may be wanted, and refuses one of a file larger than memory.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def count_of(size: float, n: int, key: str) -> int:
    """How many of `n` images `size` means: a count, or, below 1, a share (of at least one image).

    Raises UserError, naming `key`, unless some are taken and some are left.
    """
    count = max(1, round(size * n)) if 0 < size < 1 else int(size)
    if not 0 < count < n:
        raise UserError(
            f"{key}={size} cannot be: it must be a share, such as 0.1, or a count of the {n} images there are"
        )
    return count
