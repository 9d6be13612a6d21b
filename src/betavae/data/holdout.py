"""Choose the images that are held out for validation or test."""

import hashlib
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from betavae.errors import UserError

DEFAULT_HOLDOUT = 0.1  # the share that is held out if neither the user nor the data set chooses
SPLIT_SEED = 0  # one split for all runs, whatever their seed


def resolve_count(size: float, n: int, key: str) -> int:
    """Convert a size, a count or (below 1) a share, to a count of `n` images, at least 1.

    Raises:
        UserError: If no image would be held out, or none left. The message names the setting `key`.
    """
    count = max(1, round(size * n)) if 0 < size < 1 else int(size)
    if not 0 < count < n:
        raise UserError(
            f"{key}={size} is invalid: expected a share, such as 0.1, or a count that leaves at least 1 of {n} images"
        )
    return count


def holdout_indices(names: Sequence[str], size: float, key: str, salt: str = "") -> Tensor:
    """Choose the images to hold out by a hash of their names.

    A share takes each image whose hash is below it, so adding or removing images moves no other image between the
    splits. At least one image is held out, and one left. A count takes exactly that many, those with the lowest hashes.

    Args:
        names: The name of each image.
        size: A count, or a share if below 1.
        key: The setting that an error message names.
        salt: A text that is hashed with each name, so that two splits are independent.

    Raises:
        UserError: If no image would be held out, or none left.
    """
    count = resolve_count(size, len(names), key)
    hashes = [int.from_bytes(hashlib.sha256(os.fsencode(salt + name)).digest()[:8], "big") / 2**64 for name in names]
    if size < 1:
        count = min(max(1, sum(value < size for value in hashes)), len(names) - 1)
    return torch.tensor(sorted(range(len(names)), key=hashes.__getitem__)[:count])


def random_holdout_indices(n: int, size: float, key: str) -> Tensor:
    """Choose the images to hold out at random, from a fixed seed."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))[: resolve_count(size, n, key)]


def remaining_indices(n: int, held_out: Tensor) -> Tensor:
    """Return the indices of `n` images that are not held out, in order."""
    return torch.ones(n, dtype=torch.bool).index_fill(0, held_out, False).nonzero().squeeze(1)
