"""A folder of pictures, decoded once into one file that is mapped into memory."""

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from betavae.data.arrays import as_tensor
from betavae.data.images import Images, count_of
from betavae.data.listing import SUFFIXES, File, label_of, natural, picture_files
from betavae.data.pictures import UnreadablePicture, check_fit, left_out, read_each
from betavae.errors import UserError

FORMAT = 1  # of what is kept, and of how pictures are read: with another number all are read anew
SPLITS = ("train", "validation", "test")


def split_folders(root: Path) -> dict[str, str]:
    """The splits that are folders of their own, and which; {"train": "."} where there is no folder `train`.

    Raises UserError if it is not clear which are."""
    if not root.is_dir():
        raise UserError(f"data.root={root} cannot be: there is no such folder of pictures")
    there = [name for name in ("train", "val", "validation", "test") if (root / name).is_dir()]
    if there and "train" not in there:
        raise UserError(f"data.root={root} has a folder {' and '.join(there)}, but none that is called train")
    if {"val", "validation"} <= set(there):
        raise UserError(f"data.root={root} has a folder val and one validation; it can have one of them")
    return {"validation" if name == "val" else name: name for name in there} or {"train": "."}


def in_splits(folders: dict[str, str], files: dict[str, list[File]], test_size: float) -> list[tuple[str, str, str]]:
    """`(split, name, label)` of all pictures, split by split and there in natural order.

    Where there is no folder `test`, those of the training pictures are for testing whose names have the lowest hashes:
    a fixed choice, which a few more pictures hardly change.
    """
    listed = []
    for split in folders:
        prefix = "" if folders[split] == "." else folders[split] + "/"
        listed += [
            (split, prefix + name, label_of(name)) for name in sorted((file[0] for file in files[split]), key=natural)
        ]
    if "test" not in folders:
        train = [name for split, name, _ in listed if split == "train"]
        train.sort(key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
        test = set(train[: count_of(test_size, len(train), "data.test_size")])
        listed = [("test" if name in test else split, name, label) for split, name, label in listed]
    return sorted(listed, key=lambda picture: SPLITS.index(picture[0]))


def decode(
    root: Path, listed: list[tuple[str, str, str]], shape: Sequence[int], fit: str, background: str, to: Path
) -> None:
    """Write `to/pixels.npy`, the pictures that can be read in the order they are `listed` in, and `to/index.json`, all
    else that is known of them. Raises UserError if a split would be empty."""
    header = {"descr": "|u1", "fortran_order": False}
    kept, skipped = [], []
    counts: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    with open(to / "pixels.npy", "wb") as out:
        np.lib.format.write_array_header_1_0(out, header | {"shape": (len(listed), *shape)})
        results = read_each([root / name for _, name, _ in listed], shape, fit, background)
        for (split, name, label), result in zip(listed, results, strict=True):
            if isinstance(result, UnreadablePicture):
                skipped.append((name, str(result)))
            else:
                out.write(result[0].numpy().tobytes())
                kept.append((name, label))
                counts[split] += 1
                notes.update(result[1])
        # NumPy leaves room in a header for any number of rows.
        out.seek(0)
        np.lib.format.write_array_header_1_0(out, header | {"shape": (len(kept), *shape)})
        out.flush()
        os.fsync(out.fileno())
    for split in {split for split, _, _ in listed}:
        if not counts[split]:
            raise UserError(f"data.root={root} has no picture for {split} that can be read: {left_out(skipped)}")
    classes = sorted({label for _, label in kept}, key=natural)
    number = {label: i for i, label in enumerate(classes)}
    index = {
        "counts": counts,
        "names": [name for name, _ in kept],
        "labels": [number[label] for _, label in kept],
        "classes": None if classes == ["."] else classes,
        "notes": notes,
        "skipped": skipped,
    }
    (to / "index.json").write_text(json.dumps(index))


def make(
    kept: Path, root: Path, listed: list[tuple[str, str, str]], shape: Sequence[int], fit: str, background: str
) -> None:
    """Make the folder `kept`, whole or not at all, by one process at a time."""
    part = kept.with_name(f"{kept.name}.part")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(kept.with_name(f"{kept.name}.lock"))
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
                decode(root, listed, shape, fit, background, part)
                part.rename(kept)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"data.cache={kept.parent}: {part} cannot be written ({error.strerror})") from error


def folder(
    root: Path,
    split: str,
    image_size: int | Sequence[int],
    channels: int = 3,
    fit: str = "crop",
    background: str = "white",
    test_size: float = 0.1,
    cache: str = "data",
) -> Images | None:
    """All pictures below `root`, as `read_picture` reads them, `image_size` pixels high and wide (or `[H, W]`).

    Labels are the first-level folders' numbers in natural order, "." being the pictures beside them; without folders
    all are 0. Where there is a folder `train`, it, `val` (or `validation`) and `test` are the splits, the labels one
    level below; else a fixed `test_size` (a share or a count) is for testing.

    The pixels are kept in a folder in `cache`, which is named after all they were made from: settings, and names,
    sizes and times of the files. It may be deleted at any time, and is made anew. Pictures that cannot be read are
    left out, with a warning. Raises UserError if there are none.
    """
    root, at = Path(root).expanduser(), Path(cache).expanduser()
    shape = [channels, image_size, image_size] if isinstance(image_size, int) else [channels, *image_size]
    check_fit(shape, fit, background)
    if at.resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"data.cache={cache} cannot be: it lies in the pictures' own folder, data.root={root}; name another for "
            "one of them"
        )
    folders = split_folders(root)
    files = {name: picture_files(root / place) for name, place in folders.items()}
    for name in folders:
        if not files[name]:
            raise UserError(f"data.root={root} has no pictures in {folders[name]} ({', '.join(SUFFIXES)})")
    recipe = json.dumps([FORMAT, str(root.resolve()), shape, fit, background, test_size, folders, files])
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    kept = at / f"{root.resolve().name}-{'x'.join(map(str, shape))}-{digest}"
    if not kept.is_dir():
        make(kept, root, in_splits(folders, files, test_size), shape, fit, background)
    try:
        index = json.loads((kept / "index.json").read_text())
        pixels = as_tensor(np.load(kept / "pixels.npy", mmap_mode="r"))
        labels = torch.tensor(index["labels"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{kept} is damaged; delete it, and it is made anew from {root}") from error
    if index["skipped"] and split == "train":
        print(f"of the pictures in {root}, {left_out(index['skipped'])}", file=sys.stderr)
    start = sum(index["counts"].get(before, 0) for before in SPLITS[: SPLITS.index(split)])
    rows = slice(start, start + index["counts"].get(split, 0))
    return Images(pixels[rows], labels[rows], index["classes"]) if rows.stop > start else None
