"""Pictures from files: whatever reads a picture reads it by `read_picture`, in the model's size, channels and range."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from betavae.data.datasets.arrays import open_arrays, read_labels, read_pixels
from betavae.data.file_listing import SUFFIXES, as_text, label_from_path, natural_sort_key, picture_files, split_folders
from betavae.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
FIT_MODES = ("crop", "pad")
NOT_UTF8 = "name that is not UTF-8, its other bytes written as \\xNN"
GRAY_MODES = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes

# `read_picture` refuses what Pillow would only warn of.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadablePicture(Exception):
    """Why a picture could not be read, in a few words."""


def validate_fit(image_shape: Sequence[int], fit: str, background: str) -> None:
    """Raises UserError if no picture could be read this way."""
    if len(image_shape) != 3 or image_shape[0] not in (1, 3) or min(image_shape) < 1:
        raise UserError(f"pictures cannot be read as {tuple(image_shape)}: it must be (C, H, W), with C 1 or 3")
    if fit not in FIT_MODES:
        raise UserError(f"fit={fit} cannot be: it must be one of {', '.join(FIT_MODES)}")
    try:
        ImageColor.getrgb(background)
    except (ValueError, AttributeError) as error:
        raise UserError(f"background={background} is no colour: name one, such as white, or '#ff8800'") from error


def fit_image(image: Image.Image, image_shape: Sequence[int], fit: str, background: str) -> tuple[Tensor, list[str]]:
    """A picture of any size and kind -> uint8 `(C, H, W)`, and what was done to it. See `read_picture`."""
    channels, height, width = image_shape
    mode, notes = ("L" if channels == 1 else "RGB"), []
    grey = image.mode in GRAY_MODES
    if image.mode.startswith("I;16"):
        # To the nearest of 256 values, 65535 / 255 = 257 apart.
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
        notes.append("16 bits made 8")
    elif image.mode in ("I", "F"):
        raise UnreadablePicture("its pixels have 32 bits; save it with 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            colour = ImageColor.getcolor(background, "RGB")
            image = Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
            notes.append(f"transparent parts laid on {background}")
    if grey != (mode == "L"):
        notes.append("grey made colour" if grey else "colour made grey")
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (width, height):
        # Source pixels per pixel of the model; the larger of both makes all of the picture fit, the smaller fills.
        scales = image.width / width, image.height / height
        scale = max(scales) if fit == "pad" else min(scales)
        if scale != 1:
            notes.append("made smaller" if scale > 1 else "made larger")
        if fit == "pad":
            within = max(1, round(image.width / scale)), max(1, round(image.height / scale))
            image = image.resize(within, Image.Resampling.BICUBIC)
            if image.size != (width, height):
                notes.append(f"padded with {background}")
                image = ImageOps.pad(image, (width, height), color=ImageColor.getcolor(background, mode))
        else:
            part = min(image.width, width * scale), min(image.height, height * scale)
            left, top = (image.width - part[0]) / 2, (image.height - part[1]) / 2
            if scales[0] != scales[1]:
                notes.append("centre-cropped")
            if scale == 1:
                left, top = left // 1, top // 1  # half a pixel's shift would blur
            box = left, top, min(image.width, left + part[0]), min(image.height, top + part[1])
            image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
    return torch.from_numpy(pixels.copy()), notes


def read_image(
    file: str | Path | IO[bytes],
    image_shape: Sequence[int],
    fit: str = "crop",
    background: str = "white",
    max_pixels: int | None = None,
    own_size: bool = False,
) -> tuple[Tensor, list[str]]:
    """A PNG, JPEG, WebP, BMP, GIF (its first frame) or TIFF -> uint8 `(C, H, W)`, and what was done to it.

    It is turned as its EXIF orientation says, its transparent parts are laid on `background` (a colour's name or
    "#rrggbb"), grey is made colour or colour grey (ITU-R 601 luma) as `image_shape` `(C, H, W)` asks for, and it is
    resized, antialiased, by a bicubic filter: with `fit="crop"` until it fills the model's frame, of which it keeps
    the middle, with "pad" until all of it is within, on `background`. A picture of that very size keeps its bytes. 16
    bits become 8 by rounding (colour: by Pillow, which keeps the upper 8). Colour profiles are not looked at. With
    `own_size`, of `image_shape` only C is looked at, and the picture keeps its size.

    Raises UnreadablePicture if it cannot be read, or has more pixels than `most` (None: Pillow's
    `Image.MAX_IMAGE_PIXELS`, 89,478,485), above which a small file may be meant to fill the memory; UserError if
    nothing could be read so.
    """
    validate_fit(image_shape, fit, background)
    if isinstance(file, str | Path) and os.path.exists(file) and not os.path.isfile(file):
        raise UnreadablePicture("not a regular file")  # one that is a pipe would be waited for
    limit, side = max_pixels or Image.MAX_IMAGE_PIXELS, 2 * max(image_shape[1:])
    try:
        with Image.open(file, formats=FORMATS) as image:
            if limit and image.width * image.height > limit:
                raise UnreadablePicture(f"{image.width} x {image.height} pixels are above the limit of {limit:,}")
            notes = ["first of several frames"] if getattr(image, "is_animated", False) else []
            # A JPEG can be decoded at 1/8, 1/4 or 1/2 of its size, in a quarter of the time; from twice the model's
            # size or more this changes the result by about 1 of 255 (root mean square, on noisy detail).
            drafted = None if own_size else image.draft(None, (side, side))
            # Asked for here, since Pillow turns a TIFF itself when it loads it.
            if image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
                notes.append("turned by its EXIF orientation")
            image.load()
            picture: Image.Image = image
            if drafted and drafted[1][2:] != image.size:  # it ends within the last of the larger pixels
                size = round(drafted[1][2]), round(drafted[1][3])
                picture = image.resize(size, Image.Resampling.BICUBIC, box=drafted[1])
            picture = ImageOps.exif_transpose(picture)
            shape = (image_shape[0], picture.height, picture.width) if own_size else image_shape
            pixels, more = fit_image(picture, shape, fit, background)
            return pixels, notes + more
    except UnreadablePicture:
        raise
    except UnidentifiedImageError as error:
        raise UnreadablePicture("not a PNG, JPEG, WebP, BMP, GIF or TIFF") from error
    except OSError as error:
        raise UnreadablePicture(error.strerror or str(error)) from error
    except Exception as error:  # Pillow raises nearly anything on a damaged file, and its own on a bomb
        raise UnreadablePicture(f"{type(error).__name__}: {error}") from error


def iter_images(
    paths: Sequence[str | Path], image_shape: Sequence[int], fit: str, background: str
) -> Iterator[tuple[Tensor, list[str]] | UnreadablePicture]:
    """For each path in turn what `read_picture` gives or raises; on all cores, with a progress bar."""
    validate_fit(image_shape, fit, background)

    def read(path: str | Path) -> tuple[Tensor, list[str]] | UnreadablePicture:
        try:
            return read_image(path, image_shape, fit, background)
        except UnreadablePicture as reason:
            return reason

    # Threads, since Pillow lets go of Python's lock while it decodes and resizes.
    with ThreadPool() as pool:
        done = pool.imap(read, paths, chunksize=16)
        yield from tqdm(done, total=len(paths), desc="reading pictures", unit="", leave=False, disable=None)


def skipped_message(skipped: Sequence[tuple[str, str]]) -> str:
    """Pictures that could not be read, `(name, reason)`, in a sentence that names the first five."""
    named = ", ".join(f"{name} ({reason})" for name, reason in skipped[:5])
    more = f" and {len(skipped) - 5:,} more" if len(skipped) > 5 else ""
    return f"{len(skipped):,} could not be read: {named}{more}"


class LoadedImages(NamedTuple):
    """Pictures in memory: `pixels` uint8 `(N, C, H, W)`, their names and labels, sentences on what was done, and those
    that could not be read, `(name, reason)`."""

    pixels: Tensor
    names: list[str]
    labels: list | None
    notes: list[str]
    unread: Sequence[tuple[str, str]] = ()


def read_images(
    where: str | Path | Sequence[str | Path],
    image_shape: Sequence[int],
    fit: str = "crop",
    background: str = "white",
) -> LoadedImages:
    """Pictures for a model of this `image_shape`, all in memory, each as `read_picture` reads it.

    `where` is a folder (with all its sub-folders), a file, a list of either, or FILE.npy or FILE.npz as `arrays` takes
    them, whose pictures are named by their numbers. Labels are what the .npz has as `labels`, or a folder's
    first-level sub-folders, where it has any, or the folders below them where they are splits. Raises UserError if
    there is nothing, or nothing that could be read.
    """
    validate_fit(image_shape, fit, background)
    entries = [Path(entry).expanduser() for entry in ([where] if isinstance(where, str | Path) else where)]
    results: Iterator[tuple[Tensor, list[str]] | UnreadablePicture]
    labels: list | None = None
    if len(entries) == 1 and entries[0].suffix in (".npy", ".npz"):
        held = open_arrays(entries[0])
        pixels = read_pixels(held, entries[0])
        names = [str(i) for i in range(len(pixels))]
        if "labels" in held:
            labels = read_labels(held, "labels", len(pixels), entries[0]).tolist()
        if pixels.shape[1:] == torch.Size(image_shape):
            return LoadedImages(pixels, names, labels, [])
        each = (Image.fromarray(picture.permute(1, 2, 0).squeeze(2).numpy()) for picture in pixels)
        results = (fit_image(image, image_shape, fit, background) for image in each)
    else:
        paths: list[Path] = []
        names = []
        for entry in entries:
            inside = (
                sorted((name for name, *_ in picture_files(entry)), key=natural_sort_key) if entry.is_dir() else [""]
            )
            paths += [entry / name for name in inside]
            within = f"{entry.name}/" if len(entries) > 1 and entry.is_dir() else ""
            names += [within + (name or entry.name) for name in inside]
        if len(entries) == 1:
            splits = split_folders(names)
            below = [name.partition("/")[2] if label_from_path(name) in splits else name for name in names]
            labels = [as_text(label_from_path(name)) for name in below]
            labels = labels if set(labels) != {"."} else None
        results = iter_images(paths, image_shape, fit, background)

    pictures, kept, skipped = [], [], []
    counts: Counter[str] = Counter()
    texts = list(map(as_text, names))
    for i, result in enumerate(results):
        if isinstance(result, UnreadablePicture):
            skipped.append((texts[i], str(result)))
        else:
            pictures.append(result[0])
            kept.append(i)
            counts.update(result[1] + [NOT_UTF8] * (texts[i] != names[i]))
    if not kept:
        why = skipped_message(skipped) if skipped else f"there are no pictures ({', '.join(SUFFIXES)})"
        raise UserError(f"{', '.join(map(str, entries))}: {why}")
    notes = [f"{count:,} of {len(kept):,} pictures: {note}" for note, count in counts.items()]
    return LoadedImages(
        torch.stack(pictures),
        [texts[i] for i in kept],
        [labels[i] for i in kept] if labels is not None else None,
        notes + ([skipped_message(skipped)] if skipped else []),
        skipped,
    )
