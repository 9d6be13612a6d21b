"""Pairs of images to interpolate between."""

from collections.abc import Sequence

import torch
from torch import Tensor

from betavae.errors import UserError


def draw_pairs(
    x: Tensor, labels: Tensor, ends: Sequence[int], rows: int, seed: int, names: Sequence[object]
) -> tuple[Tensor, Tensor]:
    """Draw images with the label of the start, and as many with the label of the end.

    Args:
        x: (N, C, H, W).
        labels: (N,).
        ends: The numbers of the two labels.
        rows: The number of images with each label.
        seed: The seed of the draws.
        names: The labels as the user typed them, for messages.

    Returns:
        (rows, C, H, W) for each label.

    Raises:
        UserError: If no image has one of the labels.
    """
    if labels.ndim != 1:
        raise UserError(
            f"labels={list(names)} is invalid: these data have several factors, not one label; pass images=[0,7]"
        )
    generator, found = torch.Generator().manual_seed(seed), []
    for label, name in zip(ends, names, strict=True):
        index = (labels == label).nonzero()[:, 0]
        if not len(index):
            raise UserError(f"labels={list(names)} is invalid: no test image has the label {name}")
        found.append(x[index[torch.randint(len(index), (rows,), generator=generator)]])
    return found[0], found[1]


def select_pair(x: Tensor, numbers: Sequence[object]) -> tuple[Tensor, Tensor]:
    """Select two of the test images by their numbers: `(1, C, H, W)` each."""
    valid = [number for number in numbers if isinstance(number, int) and number < len(x)]
    if len(numbers) != 2 or len(valid) != 2:
        expected = f"two image files, or two numbers of test images from 0 to {len(x) - 1}"
        raise UserError(f"images={list(numbers)} is invalid: expected {expected}")
    return x[[valid[0]]], x[[valid[1]]]
