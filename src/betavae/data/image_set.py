"""What a source of images gives: bytes, and what is known of each image."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

MAX_COPY_BYTES = 2**28  # bytes; of more images than that, a part is looked up, not copied


@dataclass(frozen=True)
class ImageSet:
    """uint8 images `(N, C, H, W)` with labels.

    `pixels` is a tensor, or anything with a tensor's `shape`, `index_select(0, index)` and `to(device)`, so that images
    may lie in a file or be drawn when they are asked for. `labels` is int64, `(N,)`, or `(N, F)` for F factors;
    `classes` names the values of one label; `names` are the files' of images that come from files.
    """

    pixels: Any
    labels: Tensor
    classes: list[str] | None = None
    names: list[str] | None = None

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def select(self, index: Tensor) -> "ImageSet":
        """Those at `index`: copied where they are few and lie in a tensor, else looked up when they are asked for."""
        few = isinstance(self.pixels, Tensor) and self.pixels.numel() <= MAX_COPY_BYTES
        pixels = self.pixels.index_select(0, index) if few else LazySubset(self.pixels, index)
        names = self.names and [self.names[i] for i in index.tolist()]
        return replace(self, pixels=pixels, labels=self.labels[index], names=names)

    def to(self, device: torch.device) -> "ImageSet":
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def tensor(self) -> Tensor:
        """All pixels in memory."""
        index = torch.arange(len(self))
        return self.pixels if isinstance(self.pixels, Tensor) else self.pixels.index_select(0, index)


class LazySubset:
    """Some of the images that lie in a file, or are drawn."""

    def __init__(self, pixels: Any, index: Tensor):
        self.pixels, self.index = pixels, index
        self.shape = (len(index), *pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.index)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        return self.pixels.index_select(dim, self.index.index_select(0, index))

    def to(self, device: torch.device | str) -> Any:
        """On the CPU itself; elsewhere a copy of its rows, or (of images that are drawn) of what draws them."""
        if torch.device(device).type == "cpu":
            return self
        if not isinstance(self.pixels, Tensor):
            return LazySubset(self.pixels.to(device), self.index.to(device))
        return self.pixels.index_select(0, self.index).to(device)
