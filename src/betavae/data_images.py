"""Stub of `betavae/data/images.py`."""

from typing import Any, NamedTuple

from torch import Tensor


class Images(NamedTuple):
    pixels: Any
    labels: Tensor
    classes: list[str] | None = None
