"""`ImageSet`: a split of a data set, in the type of its file."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from betavae.data.labels import find_class
from betavae.errors import UserError

MAX_COPY_BYTES = 2**28  # larger sets are indexed lazily, not copied


@dataclass(frozen=True)
class ImageSet:
    """Images with labels.

    Attributes:
        pixels: (N, C, H, W), bool, uint8, uint16 or floats: a tensor, or an object with a tensor's `shape`,
            `index_select(0, index)` and `to(device)`, which reads images from a file or draws them when they are
            indexed, and whose `dtype` is uint8 if it has none.
        labels: int64, (N,), or (N, F) for F factors.
        classes: The names of the values of a single label.
        names: The file name of each image, if images come from files.
        columns: The name of each channel, if these are the columns of a table and H = W = 1.
        has_labels: False for images without labels, whose `labels` are zeros.
    """

    pixels: Any
    labels: Tensor
    classes: list[str] | None = None
    names: list[str] | None = None
    columns: list[str] | None = None
    has_labels: bool = True

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def find_label(self, label: object, key: str = "label") -> int:
        """Return the number of a class as `find_class` finds it; without classes an integer label itself.

        Raises:
            UserError: If there is no such class, or without classes for a label that is no integer.
        """
        if self.classes:
            return find_class(label, self.classes, key)
        if not isinstance(label, int) or isinstance(label, bool):
            raise UserError(f"{key}={label} is invalid: expected an integer")
        return label

    @property
    def dtype(self) -> torch.dtype:
        return getattr(self.pixels, "dtype", torch.uint8)

    @property
    def item(self) -> str:
        """The word for one of them: "image", or "row" of a table."""
        return "image" if self.columns is None else "row"

    @property
    def nbytes(self) -> int:
        return math.prod(self.pixels.shape) * self.dtype.itemsize

    def select(self, index: Tensor) -> "ImageSet":
        """Select the images at `index`, (B,). A small tensor is copied, other pixels are indexed lazily."""
        small = isinstance(self.pixels, Tensor) and self.nbytes <= MAX_COPY_BYTES
        pixels = self.pixels.index_select(0, index) if small else LazySubset(self.pixels, index)
        names = self.names and [self.names[i] for i in index.tolist()]
        return replace(self, pixels=pixels, labels=self.labels[index], names=names)

    def to(self, device: torch.device) -> "ImageSet":
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def tensor(self) -> Tensor:
        """Return all pixels in memory."""
        return self.pixels if isinstance(self.pixels, Tensor) else self.pixels.index_select(0, torch.arange(len(self)))


class LazySubset:
    """The images at `index`, (N,), of `pixels` that stay in a file or are drawn."""

    def __init__(self, pixels: Any, index: Tensor):
        self.pixels, self.index = pixels, index
        self.shape = torch.Size((len(index), *pixels.shape[1:]))
        self.dtype = getattr(pixels, "dtype", torch.uint8)

    def __len__(self) -> int:
        return len(self.index)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        return self.pixels.index_select(dim, self.index.index_select(0, index))

    def to(self, device: torch.device | str) -> Any:
        """Return the subset itself for the CPU; elsewhere copy its images, or the object that draws them."""
        device = torch.device(device)
        if device.type == "cpu":
            return self
        if not isinstance(self.pixels, Tensor):
            return LazySubset(self.pixels.to(device), self.index.to(device))
        return self.pixels.index_select(0, self.index).to(device)
