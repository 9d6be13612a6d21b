"""`BatchLoader`: shuffled, sharded and converted batches, each from one indexed read."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from betavae.data.image_set import ImageSet
from betavae.data.scaling import Scaling

BYTES = Scaling.unit()
HOST_TYPES = (torch.uint16, torch.float64)  # scaled on the host, since some devices do not compute with them
BINARIZE_SEED = 0  # one draw for all runs, whatever their seed
Item = TypeVar("Item")
Result = TypeVar("Result")


class BatchLoader:
    """Iterate over batches `(x, label)`, with x (B, C, H, W) float32.

    The order is a function of the seed and the epoch, and `state_dict` holds the position within an epoch, so a resumed
    run sees the same batches as one that was not interrupted.

    Args:
        images: The images to load.
        batch_size: The images of a batch; the last batch may be smaller.
        epoch: A function that returns the current epoch, for training; None keeps the order of `images`.
        seed: The seed of the order.
        reshuffle: Change the order in every epoch.
        binarize: "none", or how `binarize_pixels` draws the pixels of each batch.
        scaling: From stored pixels to x.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        epoch: Callable[[], int] | None = None,
        seed: int = 0,
        reshuffle: bool = True,
        binarize: str = "none",
        scaling: Scaling = BYTES,
    ):
        self.images, self.batch_size, self.scaling = images, batch_size, scaling
        self.epoch, self.seed, self.reshuffle, self.binarize = epoch, seed, reshuffle, binarize
        self.progress = {"epoch": -1, "batches": 0}
        self.device = images.labels.device  # of the batches
        self.shard(0, 1)

    def shard(self, rank: int, processes: int) -> None:
        """Restrict the loader to the images of one of several processes."""
        self.rank, self.processes = rank, processes
        # Training shards have equal sizes, since every step waits for all processes. Evaluation covers every image, in
        # the same number of batches on each process; the last one may be empty.
        n = len(self.images)
        self.size = n // processes if self.epoch else -(-n // processes)

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.device.type != self.images.labels.device.type:
            return self.iter_from_host()
        return map(self.batch, self.indices())

    def iter_from_host(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the next batch while the device is busy, and convert batches on the device."""
        cuda = self.device.type == "cuda"
        on_host = self.images.dtype in HOST_TYPES

        def read(item: tuple[Tensor, dict[str, int]]) -> tuple[list[Tensor], dict[str, int]]:
            index, progress = item
            # A GPU copies from pinned memory without blocking the host.
            parts = self.batch(index) if on_host else self.read(index)
            return [part.pin_memory() if cuda else part for part in parts], progress

        for parts, progress in prefetch(read, ((index, self.progress) for index in self.indices())):
            self.progress = progress
            # Only CUDA keeps the source alive until it is copied (pytorch/pytorch#189690, of MPS).
            pixels, labels = (part.to(self.device, non_blocking=cuda) for part in parts)
            yield (pixels, labels) if on_host else self.convert(pixels, labels)

    def indices(self) -> Iterator[Tensor]:
        """Yield the indices of each batch, on the device of the images."""
        epoch, start = 0, 0
        order = torch.arange(len(self.images))
        if self.epoch:
            epoch = self.epoch()
            start = self.progress["batches"] if self.progress["epoch"] == epoch else 0
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch * self.reshuffle)
            order = torch.randperm(len(order), generator=generator)
        order = order[self.rank :: self.processes][: self.size].to(self.images.labels.device)
        for number in range(start, len(self)):
            self.progress = {"epoch": epoch, "batches": number + 1}
            yield order[number * self.batch_size : (number + 1) * self.batch_size]

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch of the images at `index`, (B,)."""
        return self.convert(*self.read(index))

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        # `index_select` takes a tenth of the time of `pixels[index]`.
        return self.images.pixels.index_select(0, index), self.images.labels.index_select(0, index)

    def convert(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.binarize == "none":
            return self.scaling.apply(pixels), labels
        return binarize_pixels(pixels, self.binarize, self.scaling).float(), labels

    def state_dict(self) -> dict[str, int]:
        return self.progress

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.progress = state


def prefetch(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Map `function` over `items` in a thread that is one item ahead."""
    with ThreadPoolExecutor(1) as thread:
        pending = deque[Future[Result]]()
        for item in items:
            pending.append(thread.submit(function, item))
            if len(pending) > 1:
                yield pending.popleft().result()
        if pending:
            yield pending.popleft().result()


def binarize_pixels(
    pixels: Tensor, mode: str, scaling: Scaling = BYTES, generator: torch.Generator | None = None
) -> Tensor:
    """Convert stored pixels to bool: x > 1/2 ("threshold"), or a draw of probability x ("dynamic")."""
    if mode == "threshold":
        return scaling.apply(pixels) > 0.5
    if scaling.is_bytes:
        # P(random byte in 0..254 < pixel) = pixel / 255, exactly.
        return torch.randint(255, pixels.shape, dtype=torch.uint8, device=pixels.device, generator=generator) < pixels
    return torch.rand(pixels.shape, device=pixels.device, generator=generator) < scaling.apply(pixels)


def binarize_images(images: ImageSet, mode: str, scaling: Scaling = BYTES) -> ImageSet:
    """Binarize a set in memory to the stored values of 0 and 1, with one draw from a fixed seed."""
    pixels = binarize_pixels(images.tensor(), mode, scaling, torch.Generator().manual_seed(BINARIZE_SEED))
    return replace(images, pixels=scaling.to_stored(pixels))
