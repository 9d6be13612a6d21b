"""A folder of image files, decoded once into a cache that is mapped into memory."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout

from betavae.data.array_io import tensor_from_mmap
from betavae.data.file_listing import (
    SPLIT_FOLDERS,
    SUFFIXES,
    as_text,
    describe_others,
    label_from_path,
    list_image_files,
    natural_sort_key,
    split_folders,
)
from betavae.data.holdout import DEFAULT_HOLDOUT, hold_out_by_name
from betavae.data.image_io import ReadLog, describe_skipped, find_common_dtype, iter_images, validate_fit
from betavae.data.image_set import ImageSet
from betavae.data.scaling import dtype_name
from betavae.errors import UserError
from betavae.storage.files import STAMP

CACHE_FORMAT = 5  # of the files, and of the conversion of images: increase it to decode all images again
CACHE_FILES = {"index.json", "pixels.npy"}  # the index has the stamp of betavae
SPLITS = ("train", "validation", "test")


class Source(NamedTuple):
    """An image file: its split, its name below the folder, and its label."""

    split: str
    name: str
    label: str


def load_image_folder(
    root: Path,
    split: str,
    image_size: int | Sequence[int],
    channels: int = 3,
    fit: str = "crop",
    background: str = "white",
    test_size: float | None = None,
    cache: str = "data",
) -> ImageSet | None:
    """Load a split of all images below a folder, each as `read_image` reads it.

    First-level folders are labels, numbered in natural order; "." is that of images beside them. If there are
    first-level folders `train`, `val` (or `valid`, `validation`) and `test` and no others, they are the splits, and the
    folders below them labels. Unreadable images are skipped with a warning.

    Args:
        root: The folder.
        split: "train", "validation" or "test".
        image_size: The height and width in pixels, or `[H, W]`.
        channels: 1 or 3.
        fit: "crop" or "pad".
        background: The color behind transparent parts and around padded images.
        test_size: The images to hold out for testing if there is no folder `test`, a count or (below 1) a share. None
            holds out a tenth.
        cache: The folder of the decoded images. They may be deleted, and are decoded again if the files have changed.

    Returns:
        The images, or None for a split without any.

    Raises:
        UserError: If a setting is invalid, or there are no images.
    """
    root, caches = Path(root).expanduser(), Path(cache).expanduser()
    shape = [channels, image_size, image_size] if isinstance(image_size, int) else [channels, *image_size]
    if channels not in (1, 3):
        raise UserError(f"data.channels={channels} is invalid: expected 1 or 3")
    validate_fit(shape, fit, background)
    if caches.resolve().is_relative_to(root.resolve()):
        raise UserError(f"data.cache={cache} is invalid: expected a folder outside data.root={root}")
    if not root.is_dir():
        raise UserError(f"data.root={root} is not a folder")
    files, others = list_image_files(root)
    if others and split == "train":
        print(f"{root}: {describe_others(others)}", file=sys.stderr)
    if not files:
        raise UserError(f"data.root={root} has no images ({', '.join(SUFFIXES)})")
    names = [file.name for file in files]
    folders = detect_splits(root, names, warn=split == "train")
    if "test" not in folders.values():
        test_size = DEFAULT_HOLDOUT if test_size is None else test_size
    elif test_size is not None:
        raise UserError(f"data.test_size={test_size} is invalid: expected null ({root} has its own test images)")
    settings = hash_json([str(root.resolve()), shape, fit, background, test_size])
    name = f"{root.resolve().name}-{'x'.join(map(str, shape))}-{settings}"
    path = caches / f"{name}-{hash_json([CACHE_FORMAT, folders, files])}"
    if not path.is_dir():
        build_cache(path, root, assign_splits(folders, names, test_size), shape, fit, background)
    return read_cache(path, root, split)


def hash_json(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def detect_splits(root: Path, names: Sequence[str], warn: bool) -> dict[str, str]:
    """Map each first-level folder to its split, or return {} if there are none, or they are classes.

    Raises:
        UserError: If folders could be either, or a split is empty, missing or there twice.
    """
    splits = split_folders(names)
    if not splits:
        warn_of_classes(root, names, warn)
        return {}
    for folder in sorted(entry.name for entry in root.iterdir() if entry.is_dir()):
        if folder.lower() in SPLIT_FOLDERS and folder not in splits:
            raise UserError(
                f"data.root={root} has no images in {folder} ({', '.join(SUFFIXES)}), or only links to those of "
                "another split"
            )
    for split in SPLITS:
        same = [folder for folder in splits if splits[folder] == split]
        if len(same) > 1:
            raise UserError(f"data.root={root} has the folders {' and '.join(same)} for one split; merge them")
    if "train" not in splits.values():
        raise UserError(f"data.root={root} has a folder {' and '.join(splits)}, but no folder train")
    return splits


def warn_of_classes(root: Path, names: Sequence[str], warn: bool) -> None:
    """Warn of a class that has the name of a split, and reject two of them."""
    folders = sorted({label_from_path(name) for name in names} - {"."}, key=natural_sort_key)
    named = [folder for folder in folders if folder.lower() in SPLIT_FOLDERS]
    others = [folder for folder in folders if folder not in named]
    beside = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
    if len(named) > 1:
        raise UserError(
            f"data.root={root} has images in {' and '.join(named)}, as splits, and in {beside}, as classes; move the "
            "classes into the splits, or rename the folders of splits"
        )
    if named and warn:
        print(
            f"{root}: {named[0]} is a class, like {beside}; splits have only the folders train, val and test",
            file=sys.stderr,
        )


def assign_splits(folders: dict[str, str], names: Sequence[str], test_size: float | None) -> list[Source]:
    """Assign each image to a split, and sort by split and in natural order."""
    sources = []
    for name in sorted(names, key=natural_sort_key):
        if not folders:
            sources.append(Source("train", name, label_from_path(name)))
        elif split := folders.get(label_from_path(name)):  # images beside the folders are in no split
            sources.append(Source(split, name, label_from_path(name.partition("/")[2])))
    if test_size is not None:
        train = [source.name for source in sources if source.split == "train"]
        test = {train[i] for i in hold_out_by_name(train, test_size, "data.test_size")}
        sources = [source._replace(split="test") if source.name in test else source for source in sources]
    return sorted(sources, key=lambda source: SPLITS.index(source.split))


def build_cache(
    path: Path, root: Path, sources: Sequence[Source], shape: Sequence[int], fit: str, background: str
) -> None:
    """Decode images into the folder `path`, in one process at a time, and remove stale caches."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f"{cache_prefix(path)}.lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that reads the images in {root}", file=sys.stderr)
            held = lock.acquire()
        with held:
            if path.is_dir():
                return
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            part.mkdir()
            try:
                decode_to_cache(part, root, sources, shape, fit, background)
                part.rename(path)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            remove_stale_caches(path)
    except OSError as error:
        raise UserError(f"data.cache={path.parent}: cannot write {part} ({error.strerror})") from error


def decode_to_cache(
    path: Path, root: Path, sources: Sequence[Source], shape: Sequence[int], fit: str, background: str
) -> None:
    """Write the readable images to `pixels.npy`, in order, and their names and labels to `index.json`.

    Raises:
        UserError: If a split would be empty.
    """
    paths = [root / source.name for source in sources]
    dtype = find_common_dtype(paths)
    if fit == "pad" and dtype == torch.float32:
        raise UserError("data.fit=pad is invalid: expected crop (images of floats have no background color)")
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype_name(dtype))), "fortran_order": False}
    log, kept = ReadLog(), []
    # Before the pixels, so that `remove_stale_caches` recognizes the folder of a process that was killed.
    (path / "index.json").write_text(json.dumps({"made_by": STAMP}))
    with open(path / "pixels.npy", "wb") as out:
        np.lib.format.write_array_header_1_0(out, header | {"shape": (len(sources), *shape)})
        names = [source.name for source in sources]
        results = iter_images(paths, shape, fit, background, dtype)
        for i, pixels in log.skip_unreadable(names, results):
            out.write(pixels.numpy().tobytes())
            kept.append(sources[i])
        # The header is written again with the number of readable images; NumPy pads it to the same length.
        out.seek(0)
        np.lib.format.write_array_header_1_0(out, header | {"shape": (len(kept), *shape)})
        out.flush()
        os.fsync(out.fileno())
    counts = Counter(source.split for source in kept)
    for split in {source.split for source in sources}:
        if not counts[split]:
            raise UserError(f"data.root={root} has no readable {split} images: {describe_skipped(log.skipped)}")
    for note, count in log.notes.items():
        print(f"{count:,} of {len(kept):,} images in {root}: {note}", file=sys.stderr)
    labels = [as_text(source.label) for source in kept]
    classes = sorted(set(labels), key=natural_sort_key)
    numbers = {label: number for number, label in enumerate(classes)}
    index = {
        "made_by": STAMP,
        "counts": counts,
        "names": [as_text(source.name) for source in kept],
        "labels": [numbers[label] for label in labels],
        "classes": None if classes == ["."] else classes,
        "skipped": log.skipped,
    }
    (path / "index.json").write_text(json.dumps(index))


def cache_prefix(path: Path) -> str:
    """Return the part of a cache's name that is the same for all states of its images."""
    return path.name.rpartition("-")[0]


def remove_stale_caches(path: Path) -> None:
    """Remove the caches of the same folder and settings from before the images changed, complete or not.

    A folder without the stamp of betavae, or with other files, is left alone. A process that has mapped a cache can
    still read it.
    """
    pattern = re.compile(re.escape(cache_prefix(path)) + r"-[0-9a-f]{16}(\.part)?")
    for stale in list(path.parent.iterdir()):
        if stale == path or not pattern.fullmatch(stale.name):
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not a cache of betavae
            stamp = json.loads((stale / "index.json").read_text())["made_by"]
            if stamp != STAMP or not set(os.listdir(stale)) <= CACHE_FILES:
                continue
            # A cache is renamed before it is removed, so that no process reads a half of it.
            part = stale if stale.suffix == ".part" else stale.rename(stale.with_name(f"{stale.name}.part"))
            for file in ("pixels.npy", "index.json"):  # the stamp last
                (part / file).unlink(missing_ok=True)
            part.rmdir()
            print(f"removed {stale}, the cache from before the images changed", file=sys.stderr)


def read_cache(path: Path, root: Path, split: str) -> ImageSet | None:
    """Map the images of a split; return None if there are none."""
    try:
        index = json.loads((path / "index.json").read_text())
        pixels = tensor_from_mmap(np.load(path / "pixels.npy", mmap_mode="r"))
        labels = torch.tensor(index["labels"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged; delete it, and it is made again from {root}") from error
    if index["skipped"] and split == "train":
        print(f"images in {root}: {describe_skipped(index['skipped'])}", file=sys.stderr)
    start = sum(index["counts"].get(before, 0) for before in SPLITS[: SPLITS.index(split)])
    rows = slice(start, start + index["counts"].get(split, 0))
    if rows.stop == start:
        return None
    classes, names = index["classes"], index["names"][rows]
    return ImageSet(pixels[rows], labels[rows], classes, names, has_labels=classes is not None)
