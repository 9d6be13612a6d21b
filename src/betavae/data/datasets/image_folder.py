"""A folder of pictures, decoded once into one file that is mapped into memory."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from betavae.data.datasets.arrays import tensor_from_mmap
from betavae.data.file_listing import (
    SPLIT_FOLDERS,
    SUFFIXES,
    as_text,
    label_from_path,
    natural_sort_key,
    picture_files,
    split_folders,
)
from betavae.data.holdout import DEFAULT_HOLDOUT, holdout_indices
from betavae.data.image_io import NOT_UTF8, UnreadablePicture, iter_images, skipped_message, validate_fit
from betavae.data.image_set import ImageSet
from betavae.errors import UserError
from betavae.storage.files import STAMP

CACHE_FORMAT = 2  # of what is kept, and of how pictures are read: with another number all are read anew
SPLITS = ("train", "validation", "test")
CACHE_MANIFEST = (
    "made_of.json"  # the mark of a folder that is kept: what it was made of, but for the pictures' own state
)
FILES = {"index.json", "pixels.npy", CACHE_MANIFEST}


def detect_splits(root: Path, names: Sequence[str], say: bool) -> dict[str, str]:
    """The first-level folders that are splits, and which; {} where there are none, or they are classes.

    A single one beside other folders is a class, which is said if asked to. Raises UserError if it is not clear."""
    splits = split_folders(names)
    if not splits:
        folders = sorted({label_from_path(name) for name in names} - {"."}, key=natural_sort_key)
        named = [folder for folder in folders if folder.lower() in SPLIT_FOLDERS]
        others = [folder for folder in folders if folder not in named]
        beside = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        if len(named) > 1:
            raise UserError(
                f"data.root={root} has pictures in {' and '.join(named)}, as a set that comes in splits, but also in "
                f"{beside}: are these classes? Move them into the splits or away, or call no two classes as splits are"
            )
        if named and say:
            print(
                f"{root}: {named[0]} is taken for a class, as {beside}; splits are folders train, val and test alone",
                file=sys.stderr,
            )
        return {}
    for folder in sorted(entry.name for entry in root.iterdir() if entry.is_dir()):
        if folder.lower() in SPLIT_FOLDERS and folder not in splits:
            raise UserError(
                f"data.root={root} has no pictures in {folder} ({', '.join(SUFFIXES)}), or only links to those of "
                "another split"
            )
    for split in SPLITS:
        same = [folder for folder in splits if splits[folder] == split]
        if len(same) > 1:
            raise UserError(f"data.root={root} has a folder {' and one '.join(same)}; it can have one of them")
    if "train" not in splits.values():
        raise UserError(f"data.root={root} has a folder {' and '.join(splits)}, but none that is called train")
    return splits


def assign_splits(folders: dict[str, str], names: Sequence[str], test_size: float | None) -> list[tuple[str, str, str]]:
    """`(split, name, label)` of all pictures, split by split and there in natural order.

    Where there is no folder `test`, `holdout_indices` says which of the training pictures are for testing.
    """
    listed = [("train", name, label_from_path(name)) for name in sorted(names, key=natural_sort_key)]
    if folders:  # pictures beside them are in none
        first = [(label_from_path(name), name) for _, name, _ in listed]
        listed = [
            (folders[folder], name, label_from_path(name.partition("/")[2]))
            for folder, name in first
            if folder in folders
        ]
    if test_size is not None:
        train = [name for split, name, _ in listed if split == "train"]
        test = {train[i] for i in holdout_indices(train, test_size, "data.test_size")}
        listed = [("test" if name in test else split, name, label) for split, name, label in listed]
    return sorted(listed, key=lambda picture: SPLITS.index(picture[0]))


def decode_to_cache(
    root: Path, listed: list[tuple[str, str, str]], shape: Sequence[int], fit: str, background: str, to: Path
) -> None:
    """Write `to/pixels.npy`, the pictures that can be read in the order they are `listed` in, and `to/index.json`, all
    else that is known of them, and say what was done to them. Raises UserError if a split would be empty."""
    header = {"descr": "|u1", "fortran_order": False}
    kept, skipped = [], []
    counts: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    with open(to / "pixels.npy", "wb") as out:
        np.lib.format.write_array_header_1_0(out, header | {"shape": (len(listed), *shape)})
        results = iter_images([root / name for _, name, _ in listed], shape, fit, background)
        for (split, name, label), result in zip(listed, results, strict=True):
            text = as_text(name)
            if isinstance(result, UnreadablePicture):
                skipped.append((text, str(result)))
            else:
                out.write(result[0].numpy().tobytes())
                kept.append((text, as_text(label)))
                counts[split] += 1
                notes.update(result[1] + [NOT_UTF8] * (text != name))
        # NumPy leaves room in a header for any number of rows.
        out.seek(0)
        np.lib.format.write_array_header_1_0(out, header | {"shape": (len(kept), *shape)})
        out.flush()
        os.fsync(out.fileno())
    for split in {split for split, _, _ in listed}:
        if not counts[split]:
            raise UserError(f"data.root={root} has no picture for {split} that can be read: {skipped_message(skipped)}")
    for note, count in notes.items():
        print(f"{count:,} of {len(kept):,} pictures in {root}: {note}", file=sys.stderr)
    classes = sorted({label for _, label in kept}, key=natural_sort_key)
    number = {label: i for i, label in enumerate(classes)}
    index = {
        "counts": counts,
        "names": [name for name, _ in kept],
        "labels": [number[label] for _, label in kept],
        "classes": None if classes == ["."] else classes,
        "skipped": skipped,
    }
    (to / "index.json").write_text(json.dumps(index))


def build_cache(
    kept: Path,
    root: Path,
    listed: list[tuple[str, str, str]],
    shape: Sequence[int],
    fit: str,
    background: str,
    made_of: dict[str, Any],
) -> None:
    """Make the folder `kept`, whole or not at all, by one process at a time, and remove those it takes the place of."""
    part = kept.with_name(f"{kept.name}.part")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(kept.with_name(f"{cache_prefix(kept)}.lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            print(f"another process reads the pictures in {root}; waiting for it", file=sys.stderr)
            held = lock.acquire()
        with held:
            if kept.is_dir():
                return
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            part.mkdir()
            try:
                (part / CACHE_MANIFEST).write_text(json.dumps(made_of))
                decode_to_cache(root, listed, shape, fit, background, part)
                part.rename(kept)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            remove_stale_caches(kept, made_of)
    except OSError as error:
        raise UserError(f"data.cache={kept.parent}: {part} cannot be written ({error.strerror})") from error


def cache_prefix(kept: Path) -> str:
    """What the names of all folders begin with that are kept of one folder of pictures in one size."""
    return kept.name.rpartition("-")[0]


def remove_stale_caches(kept: Path, made_of: dict[str, Any]) -> None:
    """Remove what this function's callers kept, or left half made, of the same folder as it was, by the same settings.

    A process that has mapped such a file goes on reading it.
    """
    for old in list(kept.parent.iterdir()):
        if old == kept or cache_prefix(old) != cache_prefix(kept):
            continue
        with contextlib.suppress(OSError, ValueError):  # without our mark
            if json.loads((old / CACHE_MANIFEST).read_text()) != made_of or not set(os.listdir(old)) <= FILES:
                continue
            # Under a name that is never read, since it may be killed half-way.
            part = old if old.suffix == ".part" else old.rename(old.with_name(f"{old.name}.part"))
            for name in sorted(FILES, key=CACHE_MANIFEST.__eq__):  # the mark last
                (part / name).unlink(missing_ok=True)
            part.rmdir()
            print(f"removed {old}, of the pictures as they were before", file=sys.stderr)


def folder(
    root: Path,
    split: str,
    image_size: int | Sequence[int],
    channels: int = 3,
    fit: str = "crop",
    background: str = "white",
    test_size: float | None = None,
    cache: str = "data",
) -> ImageSet | None:
    """All pictures below `root`, as `read_picture` reads them, `image_size` pixels high and wide (or `[H, W]`).

    Labels are the first-level folders' numbers in natural order, "." being the pictures beside them; without folders
    all are 0. Where there are first-level folders `train`, `val` (or `valid`, `validation`), `test` and no others, they
    are the splits, the labels one level below; else `test_size` (a share or a count; None: a tenth) is for testing, as
    `holdout_indices` chooses.

    The pixels are kept in a folder in `cache`, which is named after all they were made from: settings, and names,
    sizes and times of the files. It may be deleted at any time, and is made anew; then those are removed that were made
    by the same settings when the pictures were others. Pictures that cannot be read are left out, with a warning.
    Raises UserError if there are none.
    """
    root, at = Path(root).expanduser(), Path(cache).expanduser()
    shape = [channels, image_size, image_size] if isinstance(image_size, int) else [channels, *image_size]
    validate_fit(shape, fit, background)
    if at.resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"data.cache={cache} cannot be: it lies in the pictures' own folder, data.root={root}; name another for "
            "one of them"
        )
    if not root.is_dir():
        raise UserError(f"data.root={root} cannot be: there is no such folder of pictures")
    files = picture_files(root)
    if not files:
        raise UserError(f"data.root={root} has no pictures ({', '.join(SUFFIXES)})")
    names = [file[0] for file in files]
    folders = detect_splits(root, names, split == "train")
    if "test" not in folders.values():
        test_size = DEFAULT_HOLDOUT if test_size is None else test_size
    elif test_size is not None:
        raise UserError(f"data.test_size={test_size} is invalid: expected null ({root} has its own test images)")
    made_of = {"made_by": STAMP, "settings": [str(root.resolve()), shape, fit, background, test_size]}
    recipe = json.dumps([CACHE_FORMAT, made_of["settings"], folders, files])
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    kept = at / f"{root.resolve().name}-{'x'.join(map(str, shape))}-{digest}"
    if not kept.is_dir():
        build_cache(kept, root, assign_splits(folders, names, test_size), shape, fit, background, made_of)
    try:
        index = json.loads((kept / "index.json").read_text())
        pixels = tensor_from_mmap(np.load(kept / "pixels.npy", mmap_mode="r"))
        labels = torch.tensor(index["labels"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{kept} is damaged; delete it, and it is made anew from {root}") from error
    if index["skipped"] and split == "train":
        print(f"of the pictures in {root}, {skipped_message(index['skipped'])}", file=sys.stderr)
    start = sum(index["counts"].get(before, 0) for before in SPLITS[: SPLITS.index(split)])
    rows = slice(start, start + index["counts"].get(split, 0))
    if rows.stop == start:
        return None
    return ImageSet(pixels[rows], labels[rows], index["classes"], index["names"][rows])
