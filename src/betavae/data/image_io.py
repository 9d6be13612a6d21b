"""Read image files in the size, channels and range of a model. All of them go through `read_image`."""

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from betavae.data.array_io import ArrayFile
from betavae.data.file_listing import (
    SUFFIXES,
    as_text,
    describe_others,
    label_from_path,
    list_image_files,
    natural_sort_key,
    split_folders,
)
from betavae.data.scaling import FULL_SCALE, dtype_name
from betavae.errors import UserError

AVIF = ("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()  # of Pillow 11.3
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", *AVIF)
FIT_MODES = ("crop", "pad")
GRAY_MODES = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes
NOT_UTF8 = "name that is not UTF-8, its other bytes written as \\xNN"

# `read_image` rejects what Pillow would only warn of.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImage(Exception):
    """An image file that was not read. The message is the reason, in a few words."""


class ConvertedImage(NamedTuple):
    """The pixels of an image as a model sees them, and notes on the conversions."""

    pixels: Tensor  # (C, H, W)
    notes: list[str]


def validate_fit(image_shape: Sequence[int], fit: str, background: str) -> None:
    """Raise UserError for invalid settings of `read_image`."""
    if len(image_shape) != 3 or image_shape[0] not in (1, 3) or min(image_shape) < 1:
        raise UserError(f"image shape {tuple(image_shape)} is invalid: expected (C, H, W) with C 1 or 3")
    if fit not in FIT_MODES:
        raise UserError(f"data.fit={fit} is invalid: expected one of {', '.join(FIT_MODES)}")
    try:
        ImageColor.getrgb(background)
    except (ValueError, AttributeError) as error:
        raise UserError(f"data.background={background} is invalid: expected a color, white or '#ff8800'") from error


def fit_image(
    image: Image.Image, image_shape: Sequence[int], fit: str, background: str, dtype: torch.dtype = torch.uint8
) -> ConvertedImage:
    """Convert an image of any size and mode, as `read_image` does."""
    if dtype not in (torch.uint8, torch.bool):
        return fit_deep_image(image, image_shape, fit, background, dtype)
    channels, height, width = image_shape
    mode, notes = ("L" if channels == 1 else "RGB"), []
    gray = image.mode in GRAY_MODES
    if image.mode.startswith("I;16"):
        # Round to the nearest of 256 values, which are 65535 / 255 = 257 apart.
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
        notes.append("converted from 16 to 8 bits")
    elif image.mode in ("I", "F"):
        raise UnreadableImage("its pixels have 32 bits; save it with 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            color = ImageColor.getcolor(background, "RGB")
            image = Image.alpha_composite(Image.new("RGBA", image.size, color), image)
            notes.append(f"transparent parts filled with {background}")
    if gray != (mode == "L"):
        notes.append("gray converted to color" if gray else "color converted to gray")
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (width, height):
        image = resize(image, width, height, fit, background, notes)
    pixels = torch.from_numpy(np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1).copy())
    return ConvertedImage(pixels > 127 if dtype == torch.bool else pixels, notes)


def fit_deep_image(
    image: Image.Image, image_shape: Sequence[int], fit: str, background: str, dtype: torch.dtype
) -> ConvertedImage:
    """Convert an image to 16 bits or floats, as `read_image` does. Pillow has no such images in color."""
    channels, height, width = image_shape
    if dtype == torch.uint16 and not image.mode.startswith("I;16"):
        pixels, notes = fit_image(image, image_shape, fit, background)
        return ConvertedImage((pixels.int() * 257).to(dtype), [*notes, "converted from 8 to 16 bits"])
    if dtype != torch.uint16 and image.mode != "F":
        raise UnreadableImage("its pixels are integers, and the others or the model's are floats")
    values, notes = np.asarray(image).astype(np.float32), list[str]()
    if not np.isfinite(values).all():
        raise UnreadableImage("it has NaN or infinite values")
    low, high = (0, FULL_SCALE["uint16"]) if dtype == torch.uint16 else (values.min(), values.max())
    if image.size != (width, height):
        resized = resize(Image.fromarray(values), width, height, fit, background, notes)
        values = np.asarray(resized).clip(low, high)  # bicubic interpolation overshoots
    if channels == 3:
        notes.append("gray converted to color")
    pixels = torch.from_numpy(values.round() if dtype == torch.uint16 else values).to(dtype)
    return ConvertedImage(pixels.expand(channels, -1, -1).contiguous(), notes)


def find_common_dtype(paths: Iterable[str | Path]) -> torch.dtype:
    """Return uint16 or float32 if all readable images have 16 bits or floats, else uint8.

    Only headers are read.
    """
    found: torch.dtype | None = None
    for path in filter(os.path.isfile, paths):
        try:
            with Image.open(path, formats=FORMATS) as image:
                is_deep = image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I")
                dtype = torch.uint16 if is_deep else torch.float32 if image.mode == "F" else torch.uint8
        except Exception:  # unreadable; `read_image` reports it
            continue
        if dtype == torch.uint8 or found not in (None, dtype):
            return torch.uint8
        found = dtype
    return found or torch.uint8


def resize(image: Image.Image, width: int, height: int, fit: str, background: str, notes: list[str]) -> Image.Image:
    """Crop or pad an image to an aspect ratio, resize it, and add notes on what was done."""
    # Source pixels per pixel of the result: the larger scale makes the whole image fit, the smaller fills the result.
    scales = image.width / width, image.height / height
    scale = max(scales) if fit == "pad" else min(scales)
    if scale != 1:
        notes.append("downsized" if scale > 1 else "enlarged")
    if fit == "pad":
        size = max(1, round(image.width / scale)), max(1, round(image.height / scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
        if image.size == (width, height):
            return image
        notes.append(f"padded with {background}")
        color = ImageColor.getcolor(background, image.mode)
        return ImageOps.pad(image, (width, height), color=257 * color if image.mode == "F" else color)  # of 16 bits
    crop = min(image.width, width * scale), min(image.height, height * scale)
    left, top = (image.width - crop[0]) / 2, (image.height - crop[1]) / 2
    if scales[0] != scales[1]:
        notes.append("center-cropped")
    if scale == 1:
        left, top = left // 1, top // 1  # a shift by half a pixel would blur
    box = left, top, min(image.width, left + crop[0]), min(image.height, top + crop[1])
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def read_image(
    file: str | Path | IO[bytes],
    image_shape: Sequence[int],
    fit: str = "crop",
    background: str = "white",
    max_pixels: int | None = None,
    own_size: bool = False,
    dtype: torch.dtype = torch.uint8,
) -> ConvertedImage:
    """Read an image file of one of `FORMATS`; of a GIF its first frame.

    The EXIF orientation is applied, and 16 bits are rounded to 8 unless `dtype` has more (color images: truncated, by
    Pillow). Color profiles are ignored. Resizing is bicubic and antialiased; an image of the right size keeps its
    values.

    Args:
        file: A path, or a file that is open for reading.
        image_shape: (C, H, W) of the result, with C 1 (gray: ITU-R 601 luma) or 3.
        fit: "crop" keeps the middle of the image, "pad" keeps all of it, on `background`.
        background: The color, by name or as "#rrggbb", behind transparent parts and around padded images.
        max_pixels: The largest size to read, since a small file may unpack to a size that fills the memory. None takes
            Pillow's `Image.MAX_IMAGE_PIXELS`, 89,478,485.
        own_size: Keep the size of the image; only C of `image_shape` is used.
        dtype: The type of the result, one of `FULL_SCALE`. 8 bits are widened to 16; integers never become floats.

    Raises:
        UnreadableImage: If the file is damaged, too large or not such a file.
        UserError: If a setting is invalid.
    """
    validate_fit(image_shape, fit, background)
    if isinstance(file, str | Path) and os.path.exists(file) and not os.path.isfile(file):
        raise UnreadableImage("not a regular file")  # reading a pipe would block
    limit, side = max_pixels or Image.MAX_IMAGE_PIXELS, 2 * max(image_shape[1:])
    try:
        # Pillow maps a file that it opens by its path, and then reads some rotated TIFFs in the wrong order.
        source = open(file, "rb") if isinstance(file, str | Path) else contextlib.nullcontext(file)  # noqa: SIM115
        with source as stream, Image.open(stream, formats=FORMATS) as opened:
            if limit and opened.width * opened.height > limit:
                raise UnreadableImage(f"{opened.width} x {opened.height} pixels are above the limit of {limit:,}")
            notes = ["first of several frames"] if getattr(opened, "is_animated", False) else []
            # A JPEG can be decoded at 1/8, 1/4 or 1/2 of its size, in a quarter of the time. From twice the model's
            # size, this changes the result by about 1 of 255 (root mean square, on noisy detail).
            draft = None if own_size else opened.draft(None, (side, side))
            # The orientation is read before `load`, since Pillow applies that of a TIFF when it loads it.
            if opened.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
                notes.append("rotated by its EXIF orientation")
            opened.load()
            image: Image.Image = opened
            if (opened.format, opened.mode) == ("PPM", "I"):  # of more than 8 bits, scaled to 16
                image = Image.fromarray(np.asarray(opened).astype(np.uint16))
            if draft and draft[1][2:] != opened.size:  # the image ends within the last of the larger pixels
                image = opened.resize((round(draft[1][2]), round(draft[1][3])), Image.Resampling.BICUBIC, box=draft[1])
            image = ImageOps.exif_transpose(image)
            shape = (image_shape[0], image.height, image.width) if own_size else image_shape
            pixels, more = fit_image(image, shape, fit, background, dtype)
            return ConvertedImage(pixels, notes + more)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"not a {', '.join(FORMATS)}") from error
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
    except Exception as error:  # Pillow raises many types for damaged files, and its own for decompression bombs
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


class ReadLog:
    """Count the conversions of images, and collect the files that are skipped, `(name, reason)`."""

    def __init__(self) -> None:
        self.notes: Counter[str] = Counter()
        self.skipped: list[tuple[str, str]] = []

    def skip_unreadable(
        self, names: Sequence[str], results: Iterable[ConvertedImage | UnreadableImage]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the index and pixels of each image that was read."""
        for i, (name, result) in enumerate(zip(names, results, strict=True)):
            text = as_text(name)
            if isinstance(result, UnreadableImage):
                self.skipped.append((text, str(result)))
            else:
                self.notes.update(result.notes + [NOT_UTF8] * (text != name))
                yield i, result.pixels


def describe_skipped(skipped: Sequence[tuple[str, str]]) -> str:
    """Count skipped files, (name, reason), and name the first five."""
    named = ", ".join(f"{name} ({reason})" for name, reason in skipped[:5])
    more = f" and {len(skipped) - 5:,} more" if len(skipped) > 5 else ""
    return f"{len(skipped):,} could not be read: {named}{more}"


def iter_images(
    paths: Sequence[str | Path], image_shape: Sequence[int], fit: str, background: str, dtype: torch.dtype
) -> Iterator[ConvertedImage | UnreadableImage]:
    """Read images on all cores, with a progress bar. Yield the error of each image that is unreadable."""

    def read(path: str | Path) -> ConvertedImage | UnreadableImage:
        try:
            return read_image(path, image_shape, fit, background, dtype=dtype)
        except UnreadableImage as error:
            return error

    # Threads run in parallel, since Pillow releases the GIL while it decodes and resizes.
    with ThreadPool() as pool:
        results = pool.imap(read, paths, chunksize=16)
        yield from tqdm(results, total=len(paths), desc="reading images", unit="", leave=False, disable=None)


class LoadedImages(NamedTuple):
    """Images in memory.

    `notes` are sentences on conversions, `skipped` the name of each file that could not be read, and the reason.
    """

    pixels: Tensor  # (N, C, H, W)
    names: list[str]
    labels: list | None
    notes: list[str]
    skipped: Sequence[tuple[str, str]] = ()


def read_images(
    where: str | Path | Sequence[str | Path],
    image_shape: Sequence[int],
    fit: str = "crop",
    background: str = "white",
    dtype: torch.dtype = torch.uint8,
) -> LoadedImages:
    """Read images into memory, each as `read_image` does.

    Args:
        where: A folder (with its subfolders), an image file, a list of these, or FILE.npy or FILE.npz as `ArrayFile`
            reads it.
        image_shape: (C, H, W), as for `read_image`.
        fit: As for `read_image`.
        background: As for `read_image`.
        dtype: As for `read_image`. An array must have it, or be of other floats.

    Returns:
        The images. Those of an array are named by their numbers. Labels are the array `labels`, or the first-level
        folders below a folder; if these are splits, the folders below them.

    Raises:
        UserError: If there are no images, none is readable, or an array has another type.
    """
    validate_fit(image_shape, fit, background)
    paths = [Path(path).expanduser() for path in ([where] if isinstance(where, str | Path) else where)]
    results: Iterable[ConvertedImage | UnreadableImage]
    labels: list | None
    others: Counter[str] = Counter()
    if len(paths) == 1 and paths[0].suffix in (".npy", ".npz"):
        file = ArrayFile(paths[0])
        stored = file.read_pixels()
        names = [str(i) for i in range(len(stored))]
        labels = None
        if "labels" in file.arrays:
            numbers, classes = file.read_labels("labels", len(stored))
            stored_labels = file.read("labels")
            labels = stored_labels.reshape(-1).tolist() if classes else numbers.tolist()
            if classes and stored_labels.dtype.kind in "Sb":
                labels = [classes[number] for number in numbers.tolist()]
        if stored.dtype != dtype and not (stored.is_floating_point() and dtype.is_floating_point):
            raise UserError(
                f"{paths[0]} holds {dtype_name(stored.dtype)}, and the model was trained on {dtype_name(dtype)}; pass "
                "values of the same type and range"
            )
        if stored.shape[1:] == torch.Size(image_shape):
            return LoadedImages(stored, names, labels, [])
        if dtype != torch.uint8:
            found = tuple(stored.shape[1:])
            raise UserError(
                f"{paths[0]} has images of shape {found}: expected {tuple(image_shape)}, since only arrays of uint8 "
                "are resized"
            )
        unfit = (Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()) for image in stored)
        results = (fit_image(image, image_shape, fit, background) for image in unfit)
    else:
        files, names, labels, others = list_images(paths)
        results = iter_images(files, image_shape, fit, background, dtype)

    log = ReadLog()
    images = dict(log.skip_unreadable(names, results))
    if not images:
        reason = describe_skipped(log.skipped) if log.skipped else f"there are no images ({', '.join(SUFFIXES)})"
        raise UserError(f"{', '.join(map(str, paths))}: {reason}")
    notes = [f"{count:,} of {len(images):,} images: {note}" for note, count in log.notes.items()]
    return LoadedImages(
        torch.stack(list(images.values())),
        [as_text(names[i]) for i in images],
        [labels[i] for i in images] if labels is not None else None,
        notes + [describe_others(others)] * bool(others) + [describe_skipped(log.skipped)] * bool(log.skipped),
        log.skipped,
    )


def list_images(paths: Sequence[Path]) -> tuple[list[Path], list[str], list[str] | None, Counter[str]]:
    """List image files in natural order with names and labels, and count the other files.

    Only a single folder has labels.
    """
    files: list[Path] = []
    others: Counter[str] = Counter()
    names: list[str] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            names.append(path.name)
            continue
        found, skipped = list_image_files(path)
        others += skipped
        inside = sorted((file.name for file in found), key=natural_sort_key)
        files += [path / name for name in inside]
        names += [f"{path.name}/{name}" for name in inside] if len(paths) > 1 else inside
    if len(paths) > 1:
        return files, names, None, others
    splits = split_folders(names)
    below = [name.partition("/")[2] if label_from_path(name) in splits else name for name in names]
    labels = [as_text(label_from_path(name)) for name in below]
    return files, names, labels if set(labels) != {"."} else None, others
