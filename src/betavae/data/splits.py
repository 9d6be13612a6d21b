"""Which images of a set are held out for validation or test."""

import hashlib
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from betavae.errors import UserError

DEFAULT_SIZE = 0.1  # of what is held out, where neither the user nor the source says which images


def count_of(size: float, n: int, key: str) -> int:
    """How many of `n` images `size` means: a count, or, below 1, a share (of at least one image).

    Raises UserError, naming `key`, unless some are taken and some are left.
    """
    count = max(1, round(size * n)) if 0 < size < 1 else int(size)
    if not 0 < count < n:
        raise UserError(
            f"{key}={size} cannot be: it must be a share, such as 0.1, or a count of the {n} images there are"
        )
    return count


def set_aside(names: Sequence[str], size: float, key: str, salt: str = "") -> Tensor:
    """Which of the images of these `names` are set aside.

    Of a share, about so many, each by a hash of `salt` and its own name, so that images that come or go move no other
    (but where none or all would be taken); of a count, just so many, of the lowest hashes. Raises UserError as
    `count_of`.
    """
    count = count_of(size, len(names), key)
    hashes = [int.from_bytes(hashlib.sha256(os.fsencode(salt + name)).digest()[:8], "big") / 2**64 for name in names]
    if size < 1:
        count = min(max(1, sum(value < size for value in hashes)), len(names) - 1)
    return torch.tensor(sorted(range(len(names)), key=hashes.__getitem__)[:count])
