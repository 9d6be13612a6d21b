"""Pairs of images to interpolate between."""

from collections.abc import Sequence

import torch
from torch import Tensor

from betavae.errors import UserError


def draw_pairs(x: Tensor, labels: Tensor, ends: Sequence[int], rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw images with the label of the start, and as many with the label of the end.

    Both are `(rows, C, H, W)`.
    """
    if labels.ndim != 1:
        raise UserError(
            f"labels={list(ends)} is invalid: these data have several factors, not one label; pass images=[0,7]"
        )
    generator, found = torch.Generator().manual_seed(seed), []
    for label in ends:
        index = (labels == label).nonzero()[:, 0]
        if not len(index):
            span = f"from {int(labels.min())} to {int(labels.max())}"
            raise UserError(f"labels={list(ends)} is invalid: expected labels of test images, {span}")
        found.append(x[index[torch.randint(len(index), (rows,), generator=generator)]])
    return found[0], found[1]


def select_pair(x: Tensor, numbers: Sequence[object]) -> tuple[Tensor, Tensor]:
    """Select two of the test images by their numbers: `(1, C, H, W)` each."""
    valid = [number for number in numbers if isinstance(number, int) and number < len(x)]
    if len(numbers) != 2 or len(valid) != 2:
        expected = f"two image files, or two numbers of test images from 0 to {len(x) - 1}"
        raise UserError(f"images={list(numbers)} is invalid: expected {expected}")
    return x[[valid[0]]], x[[valid[1]]]
