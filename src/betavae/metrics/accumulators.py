"""Sums over images that become means, on one or several processes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from betavae.models.precision import to_float64


class BatchSums:
    """Named sums over the images of each training batch, kept on the device until they are read.

    Reading them at every step, as `self.log` does, would add a third to the time of an epoch.
    """

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.images: list[int] = []

    def __len__(self) -> int:
        return len(self.batches)

    def add(self, sums: dict[str, Tensor], images: int) -> None:
        """Append the sums over the images of one batch."""
        self.batches.append(sums)
        self.images.append(images)

    def rows(self, reduce: Callable[[Tensor], Tensor]) -> tuple[list[str], Tensor]:
        """Add up each batch over all processes, which have equally many batches, in one reduction.

        Args:
            reduce: Returns the sum of a tensor over all processes.

        Returns:
            The names, and float64 `(batches, 1 + names)` on the CPU with the number of images in the first column.
        """
        flat = torch.stack([value for batch in self.batches for value in batch.values()]).view(len(self), -1)
        images = torch.tensor(self.images, dtype=flat.dtype, device=flat.device)
        return list(self.batches[0]), reduce(torch.cat((images[:, None], flat), 1)).cpu().double()

    def mean(self, name: str, start: int) -> Tensor:
        """Return the mean over the images of the batches from `start` on, on the device."""
        return torch.stack([sums[name] for sums in self.batches[start:]]).sum() / sum(self.images[start:])

    def state_dict(self) -> dict[str, Any]:
        """Return the batches and their numbers of images."""
        return {"batches": self.batches, "images": self.images}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore `state_dict` on `device`."""
        self.batches = [{name: value.to(device) for name, value in sums.items()} for sums in state["batches"]]
        self.images = list(state["images"])


class Totals:
    """Named sums of any shape over images, in double precision."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.images = 0

    def add(self, sums: dict[str, Tensor], images: int) -> None:
        """Add sums over a number of images."""
        self.sums |= {name: self.sums.get(name, 0) + to_float64(value) for name, value in sums.items()}
        self.images += images

    def means(self) -> dict[str, Tensor]:
        """Return the means over all images so far."""
        return {name: value / self.images for name, value in self.sums.items()}

    def gather(self, world_size: int) -> "Totals":
        """Return the totals over all processes; a process without an image has no names."""
        own: Any = ({name: value.cpu() for name, value in self.sums.items()}, self.images)
        parts = [own] * world_size
        if world_size > 1:
            torch.distributed.all_gather_object(parts, own)
        total = Totals()
        for sums, images in parts:
            total.add(sums, images)
        return total
