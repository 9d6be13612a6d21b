"""What a source of images gives: bytes, and what is known of each image."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """uint8 images `(N, C, H, W)` with labels.

    `pixels` is a tensor, or anything with a tensor's `shape`, `index_select(0, index)` and `to(device)`, so that images
    may lie in a file or be drawn when they are asked for. `labels` is int64, `(N,)`, or `(N, F)` for F factors;
    `classes` names the values of one label.
    """

    pixels: Any
    labels: Tensor
    classes: list[str] | None = None

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def take(self, index: Tensor) -> "Images":
        """Those at `index`: copied where they lie in a tensor, looked up when asked for where not."""
        held = isinstance(self.pixels, Tensor)
        pixels = self.pixels.index_select(0, index) if held else Subset(self.pixels, index)
        return replace(self, pixels=pixels, labels=self.labels[index])

    def to(self, device: torch.device) -> "Images":
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def tensor(self) -> Tensor:
        """All pixels in memory."""
        index = torch.arange(len(self))
        return self.pixels if isinstance(self.pixels, Tensor) else self.pixels.index_select(0, index)


class Subset:
    """Some of the images that lie in a file, or are drawn."""

    def __init__(self, pixels: Any, index: Tensor):
        self.pixels, self.index = pixels, index
        self.shape = (len(index), *pixels.shape[1:])

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        return self.pixels.index_select(dim, self.index[index])

    def to(self, device: torch.device) -> "Subset":
        return Subset(self.pixels.to(device), self.index.to(device))
