"""`Scaling`, the map from stored values to network inputs and back.

Nothing else scales images.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from betavae.data.image_set import ImageSet
from betavae.errors import UserError

MODES = ("unit", "minmax", "standardize", "none")
# The largest value that `unit` maps to 1, of each type that is read.
FULL_SCALE = {"bool": 1.0, "uint8": 255.0, "uint16": 65535.0, "float16": 1.0, "float32": 1.0, "float64": 1.0}
BLOCK_VALUES = 2**22  # values that are measured at once
MAX_SAMPLED_VALUES = 2**22  # of integers, whose type bounds them: evenly spaced images of larger sets are measured
DARK_SHARE = 1 / 4  # of the type's range: a largest value below it is probably that of another type


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type without its module, such as "uint8"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Scaling:
    """x = (value - shift) / factor, in float32.

    Attributes:
        mode: "unit" maps the type's range to [0, 1]; "minmax" and "standardize" use the minimum and maximum, or the
            mean and standard deviation, of each channel (of each column of a table) of the training data; "none" keeps
            the values.
        dtype: The type of the stored values, a key of `FULL_SCALE`.
        shift: One value for each channel, or one for all.
        factor: Likewise.
        low: The stored value that figures draw black: the smallest of the type with "unit", else of the training data.
        high: The stored value that figures draw white.
    """

    mode: str
    dtype: str
    shift: list[float]
    factor: list[float]
    low: float
    high: float

    @classmethod
    def unit(cls, dtype: str = "uint8") -> "Scaling":
        """Return the scaling of a type's range to [0, 1]."""
        return cls("unit", dtype, [0.0], [FULL_SCALE[dtype]], 0.0, FULL_SCALE[dtype])

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], channels: int) -> "Scaling":
        """Restore the scaling that a checkpoint stores, of images with this number of channels.

        Raises:
            ValueError: If the values are not those of a scaling.
        """
        try:
            found = cls(**content)
            numbers = [*found.shift, *found.factor, found.low, found.high]
            valid = found.mode in MODES and found.dtype in FULL_SCALE
            valid &= len(found.shift) == len(found.factor) and len(found.shift) in (1, channels)
            valid &= all(isinstance(n, float) and math.isfinite(n) for n in numbers) and min(found.factor) > 0
            valid = valid and found.low <= found.high and (found.mode != "unit" or found == cls.unit(found.dtype))
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise ValueError("its scaling is not valid")
        return found

    @property
    def stored_dtype(self) -> torch.dtype:
        """The type of the stored values."""
        return getattr(torch, self.dtype)

    @property
    def is_bytes(self) -> bool:
        """Whether each x is a byte / 255."""
        return (self.mode, self.dtype) == ("unit", "uint8")

    @property
    def is_unit_interval(self) -> bool:
        """Whether the training data are in [0, 1] after scaling."""
        return self.mode in ("unit", "minmax") or (self.mode == "none" and self.low >= 0 and self.high <= 1)

    def describe(self, image_shape: tuple[int, ...]) -> str:
        """Name the values of images of this shape that a network sees, with the difference to data units."""
        if self.mode == "unit":
            return "pixels in [0, 1]"
        more = f"in data units, neg. ELBO and recon are {self.log_volume(image_shape):+.2f} nats"
        return f"values scaled by data.scaling={self.mode} ({more})"

    def apply(self, values: Tensor) -> Tensor:
        """Scale stored values `(..., C, H, W)` to float32."""
        # A copy, which the operations below may change. Large float64 values lose digits before they are shifted.
        x = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32, copy=True)
        if any(self.shift):
            x = x.sub_(self.per_channel(self.shift, x))
        if set(self.factor) != {1.0}:
            x = x.div_(self.per_channel(self.factor, x))
        return x.float()

    def invert(self, x: Tensor) -> Tensor:
        """Return x in the units of the stored values, as float32, or float64 if these are."""
        x = x.cpu().double() if self.dtype == "float64" else x.float()  # MPS has no float64
        return x * self.per_channel(self.factor, x) + self.per_channel(self.shift, x)

    def to_data_units(self, x: Tensor) -> Tensor:
        """Return x in the units of outputs.

        These are the units of the stored values, or with "unit" shares of the type's range.
        """
        return x if self.mode == "unit" else self.invert(x)

    def from_data_units(self, values: Tensor) -> Tensor:
        """Invert `to_data_units`."""
        return values if self.mode == "unit" else self.apply(values)

    def to_stored(self, x: Tensor) -> Tensor:
        """Return x as values of the stored type, integers rounded and limited to the type's range."""
        values = self.invert(x)
        if not self.stored_dtype.is_floating_point:
            values = values.round().clamp(0, FULL_SCALE[self.dtype])
        return values.to(self.stored_dtype)

    def to_picture(self, x: Tensor) -> Tensor:
        """Return x as gray values or colors in [0, 1] for a figure."""
        if self.mode == "unit":
            return x
        return ((self.invert(x) - self.low) / ((self.high - self.low) or 1.0)).float()  # constant data are black

    def from_picture(self, picture: Tensor) -> Tensor:
        """Invert `to_picture`."""
        return picture if self.mode == "unit" else self.apply(picture * (self.high - self.low) + self.low)

    def log_volume(self, image_shape: tuple[int, ...]) -> float:
        """Return what the negative log-density of an image of this shape has more in data units, in nats."""
        if self.mode == "unit":
            return 0.0
        channels, *size = image_shape
        logs = sum(map(math.log, self.factor)) * (channels if len(self.factor) == 1 else 1)
        return logs * math.prod(size)

    def per_channel(self, numbers: list[float], like: Tensor) -> Tensor | float:
        """Return one number, or a tensor of numbers that broadcasts over `(..., C, H, W)`."""
        if len(numbers) == 1:
            return numbers[0]
        values = torch.tensor(numbers, dtype=like.dtype).view(-1, 1, 1)
        return values.to(like.device, non_blocking=like.is_cuda)  # or a GPU would be waited for in each batch


class Measured(NamedTuple):
    """Statistics of images, of the finite values of each channel in float64."""

    low: Tensor  # (C,)
    high: Tensor  # (C,)
    mean: Tensor  # (C,)
    std: Tensor  # (C,)
    values: int  # of all channels, as are the next three
    nan: int
    infinite: int
    outside: int  # of [0, 1]
    damaged_images: int  # with values that are not finite


def measure(images: ImageSet, max_values: int | None = None) -> Measured:
    """Measure images block by block.

    Args:
        images: At least one image.
        max_values: The number of values of evenly spaced images to measure; None measures all.
    """
    n, size = len(images), math.prod(images.pixels.shape[1:])
    index = torch.arange(n)
    if max_values is not None and n * size > max_values:
        index = torch.linspace(0, n - 1, max(1, max_values // size), dtype=torch.float64).long()
    channels = images.pixels.shape[1]
    low, high = torch.full((channels,), math.inf).double(), torch.full((channels,), -math.inf).double()
    mean, squares, count = torch.zeros(3, channels, dtype=torch.float64)
    nan = infinite = outside = damaged = 0
    for rows in index.split(max(1, BLOCK_VALUES // size)):
        block = images.pixels.index_select(0, rows).double().flatten(2)
        finite = block.isfinite()
        if not finite.all():
            nan += int(block.isnan().sum())
            infinite += int(block.isinf().sum())
            damaged += int((~finite).flatten(1).any(1).sum())
        low = low.minimum(block.where(finite, math.inf).amin((0, 2)))
        high = high.maximum(block.where(finite, -math.inf).amax((0, 2)))
        outside += int(((block < 0) | (block > 1)).sum())
        # Chan, Golub & LeVeque 1983: merge the moments of two parts.
        added = finite.sum((0, 2)).double()
        block = block.where(finite, 0.0)
        part_mean = block.sum((0, 2)) / added.clamp(min=1)
        centered = (block - part_mean.view(-1, 1)).where(finite, 0.0)
        total, difference = (count + added).clamp(min=1), part_mean - mean
        squares += centered.square().sum((0, 2)) + difference.square() * count * added / total
        mean, count = mean + difference * added / total, count + added
    std = (squares / count.clamp(min=1)).sqrt()
    return Measured(low, high, mean, std, len(index) * size, nan, infinite, outside, damaged)


def find_outside(scaling: Scaling, low: Tensor, high: Tensor) -> list[int]:
    """Find the channels whose lowest or highest value is outside of [0, 1] after scaling.

    `low` and `high` are stored values, (C,) each.
    """
    x = scaling.apply(torch.stack((low, high))[..., None, None]).flatten(1)
    return ((x[0] < -1e-6) | (x[1] > 1 + 1e-6)).nonzero().flatten().tolist()  # beyond rounding


def describe_values_outside(scaling: Scaling, splits: Mapping[str, ImageSet]) -> Iterator[str]:
    """Describe the validation and test values that "minmax" maps outside of [0, 1]."""
    for split in ("validation", "test"):
        images = splits[split]
        if not len(images):
            continue
        found = measure(images)
        if outside := find_outside(scaling, found.low, found.high):
            kind, where = f"{images.item}s", f"{len(outside)} of {len(found.low)} channels"
            if images.columns is not None:
                where = ", ".join(images.columns[number] for number in outside[:5]) + ", ..." * (len(outside) > 5)
            yield (
                f"the {split} {kind} have values outside of the range of the training {kind}, which "
                f"data.scaling={scaling.mode} maps to [0, 1], in {where}"
            )


def check_values(images: ImageSet, mode: str, where: str) -> Measured:
    """Measure images, and reject values that are not finite or that "unit" does not scale.

    Args:
        images: The images.
        mode: One of `MODES`.
        where: The start of the error message, which names the file and the images.

    Raises:
        UserError: For such values, with their number, the range of the others and a remedy.
    """
    found = measure(images, None if images.dtype.is_floating_point or mode != "unit" else MAX_SAMPLED_VALUES)
    low, high = float(found.low.min()), float(found.high.max())
    if found.damaged_images:
        n = len(images)
        remedy = "images = images[np.isfinite(images).reshape(len(images), -1).all(1)]"
        if found.damaged_images == n:
            if not low <= high:
                low = high = 0.0
            remedy = f"images = np.nan_to_num(images, nan={low:.9g}, posinf={high:.9g}, neginf={low:.9g})"
        raise UserError(
            f"{where} hold {found.nan:,} NaN and {found.infinite:,} infinite values, in {found.damaged_images:,} of "
            f"{n:,} images (the other values are from {low:.6g} to {high:.6g}); remove them by `{remedy}`"
        )
    if max(-low, high) > torch.finfo(torch.float32).max:
        raise UserError(f"{where} have values from {low:.6g} to {high:.6g}: expected at most 3.4e38, as float32 has")
    if mode == "unit" and images.dtype.is_floating_point and found.outside:
        raise UserError(
            f"{where} have {found.outside:,} of {found.values:,} values outside of [0, 1] (they are from {low:.6g} to "
            f"{high:.6g}), which data.scaling=unit requires of floats; pass data.scaling=minmax, or "
            "data.scaling=standardize with model.likelihood=gaussian"
        )
    return found


def fit_scaling(mode: str, splits: Mapping[str, ImageSet], where: str) -> Scaling:
    """Fit a scaling to the training images, and check the values of all splits.

    Args:
        mode: One of `MODES`.
        splits: The images by split, with "train".
        where: The start of messages, which names the file.

    Raises:
        UserError: As `check_values`, and if the splits have different types or shapes.
    """
    name = dtype_name(splits["train"].dtype)
    kinds = {
        split: f"{dtype_name(images.dtype)} {tuple(images.pixels.shape[1:])}"
        for split, images in splits.items()
        if len(images)
    }
    for split, kind in kinds.items():
        if kind != kinds["train"]:
            raise UserError(
                f"{where}: the {split} images are {kind} and the train images {kinds['train']}; save both in one type "
                "and shape"
            )
    found = {
        split: check_values(images, mode, f"{where}: the {split} images")
        for split, images in splits.items()
        if len(images) and (split == "train" or images.dtype.is_floating_point)
    }["train"]
    low, high = float(found.low.min()), float(found.high.max())
    if mode == "unit":
        if not splits["train"].dtype.is_floating_point and 0 < high <= DARK_SHARE * FULL_SCALE[name]:
            print(
                f"{where}: the largest value is {high:g}, far below {FULL_SCALE[name]:g}, which data.scaling=unit maps "
                "to 1, so the model sees dark images; pass data.scaling=minmax to map it to 1",
                file=sys.stderr,
            )
        return Scaling.unit(name)
    shift, factor = torch.zeros_like(found.mean), torch.ones_like(found.mean)
    if mode == "minmax":
        shift, factor = found.low, found.high - found.low
    elif mode == "standardize":
        shift, factor = found.mean, found.std
    # A constant channel is shifted only. Its standard deviation may be a rounding error.
    factor = factor.where((found.high > found.low) & (factor > 0), 1.0)
    return Scaling(mode, name, shift.tolist(), factor.tolist(), low, high)
