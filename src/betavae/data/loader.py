"""`Batches`: the loader. Each batch is one indexed read."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from betavae.data.image_set import ImageSet
from betavae.data.read_ahead import read_ahead

BINARIZE_SEED = 0  # one draw for all runs, whatever their seed


class BatchLoader:
    """Batches `(x, label)`, x `(B, C, H, W)` float in [0, 1], of uint8 images.

    The order is a pure function of (seed, epoch), and the position within an epoch is part of a checkpoint, so that a
    resumed run sees just the images that an uninterrupted one sees.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        epoch: Callable[[], int] | None = None,
        seed: int = 0,
        reshuffle: bool = True,
        binarize: str = "none",
    ):
        """`epoch` tells which epoch it is, and asks for shuffling, without `reshuffle` in the same way in every epoch.
        `binarize`: "none", "threshold" (above 127), or "dynamic" (a Bernoulli draw for each pixel, afresh in each
        batch)."""
        self.images, self.batch_size = images, batch_size
        self.epoch, self.seed, self.reshuffle, self.binarize = epoch, seed, reshuffle, binarize
        self.progress = {"epoch": -1, "batches": 0}
        self.device = images.labels.device  # of the batches
        self.shard(0, 1)

    def shard(self, rank: int, processes: int) -> None:
        """Only the images of one of several processes: every `processes`-th in this order."""
        self.rank, self.processes = rank, processes
        # Training shares are of equal size, since every step waits for all processes. Evaluation covers every image, in
        # as many batches on each process: the last one may be empty.
        n = len(self.images)
        self.size = n // processes if self.epoch else -(-n // processes)

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        on_device = self.device.type == self.images.labels.device.type
        return map(self.batch, self.indices()) if on_device else self.from_host()

    def from_host(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each batch converted on the device from its bytes, which are read ahead."""
        items = ((index, self.progress) for index in self.indices())
        for (_, position), parts in read_ahead(lambda item: self.read(item[0]), items, self.device):
            self.progress = position
            yield self.convert(*parts)

    def indices(self) -> Iterator[Tensor]:
        """Yield the index of each batch in the images, on their device."""
        epoch, start = 0, 0
        order = torch.arange(len(self.images))
        if self.epoch:
            epoch = self.epoch()
            start = self.progress["batches"] if self.progress["epoch"] == epoch else 0
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch * self.reshuffle)
            order = torch.randperm(len(order), generator=generator)
        mine = order[self.rank :: self.processes][: self.size].to(self.images.labels.device)
        for number in range(start, len(self)):
            self.progress = {"epoch": epoch, "batches": number + 1}
            yield mine[number * self.batch_size : (number + 1) * self.batch_size]

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.convert(*self.read(index))

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        # A tenth of the time of pixels[index].
        return self.images.pixels.index_select(0, index), self.images.labels.index_select(0, index)

    def convert(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.binarize == "none":
            return pixels.float().div_(255), labels
        return binarize_pixels(pixels, self.binarize).float(), labels

    def state_dict(self) -> dict[str, int]:
        return self.progress

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.progress = state


def binarize_pixels(pixels: Tensor, how: str, generator: torch.Generator | None = None) -> Tensor:
    """uint8 -> bool: above 127 ("threshold"), or a draw of probability pixel / 255 ("dynamic")."""
    if how == "threshold":
        return pixels > 127
    # P(random byte in 0..254 < pixel) = pixel / 255, exactly.
    return torch.randint(255, pixels.shape, dtype=torch.uint8, device=pixels.device, generator=generator) < pixels


def binarize_images(images: ImageSet, mode: str) -> ImageSet:
    """Binarize a set to 0 and 255, with one draw from a fixed seed."""
    pixels = binarize_pixels(images.tensor(), mode, torch.Generator().manual_seed(BINARIZE_SEED))
    return replace(images, pixels=pixels.to(torch.uint8) * 255)
