"""Choose the images that are held out for validation or test."""

import hashlib
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from betavae.errors import UserError

DEFAULT_HOLDOUT = 0.1  # the share that is held out if neither the user nor the data set says how much
SPLIT_SEED = 0  # one split for all runs, whatever their seed


def resolve_count(size: float, n: int, key: str) -> int:
    """Convert a count or (below 1) a share of `n` images to a count of at least 1.

    Raises:
        UserError: If no image would be held out or left. The message names the setting `key`.
    """
    count = max(1, round(size * n)) if 0 < size < 1 else int(size)
    if not 0 < count < n:
        raise UserError(
            f"{key}={size} is invalid: expected a share, such as 0.1, or a count that leaves at least 1 of {n} images"
        )
    return count


def hold_out_at_random(n: int, size: float, key: str) -> Tensor:
    """Choose images from a fixed seed. The arguments are those of `resolve_count`."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))[: resolve_count(size, n, key)]


def hold_out_by_name(names: Sequence[str], size: float, key: str, salt: str = "") -> Tensor:
    """Choose images by a hash of `salt` and their name. `size` and `key` are those of `resolve_count`.

    A share takes each image whose hash is below it, so images that are added or removed do not move others between
    the splits; at least one image is taken and one left. A count takes exactly that many, the lowest hashes.
    """
    count = resolve_count(size, len(names), key)
    hashes = [int.from_bytes(hashlib.sha256(os.fsencode(salt + name)).digest()[:8], "big") / 2**64 for name in names]
    if size < 1:
        count = min(max(1, sum(value < size for value in hashes)), len(names) - 1)
    return torch.tensor(sorted(range(len(names)), key=hashes.__getitem__)[:count])


def exclude_indices(held_out: Tensor, n: int) -> Tensor:
    """Return the indices of `n` images that are not held out, in order."""
    return torch.ones(n, dtype=torch.bool).index_fill(0, held_out, False).nonzero().squeeze(1)
