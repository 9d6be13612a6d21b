"""Which pictures a folder holds, under which names."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from betavae.errors import UserError

# What the first-level folders of a set that comes in splits are called, and which split each is.
SPLIT_FOLDERS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


FileEntry = tuple[str, int, int]  # the name relative to the folder, with "/"; bytes; time of the last change in ns


def png_filenames(names: Sequence[str], out: str | Path) -> list[str]:
    """The names of PNG files, below the folder `out`, of pictures of these names. Raises UserError, before anything is
    written, for one that leads out of it, and for two that are the same."""
    files: dict[str, str] = {}
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{name} is a name that leads out of {out}")
        # Whatever it was: 7.jpg and 7.png are two.
        file = name if name.endswith(".png") else f"{name}.png"
        if file in files:
            raise UserError(f"{files[file]} and {name} would be one file, {file}, in {out}")
        files[file] = name
    return list(files)


def as_text(name: str) -> str:
    """Write each byte of a file name that is not UTF-8 as `\\xNN`, since tables and JSON cannot hold it."""
    return re.sub(r"[\ud800-\udfff]", lambda match: f"\\x{ord(match[0]) & 0xFF:02x}", name)


def index_names(n: int) -> list[str]:
    """Names of `n` images that have none."""
    return [f"{i:0{len(str(n - 1))}d}" for i in range(n)]


def natural_sort_key(name: str) -> tuple[list[str | int], str]:
    """The key that sorts picture 9 before picture 10, for people."""
    parts = enumerate(re.split(r"(\d+)", name))
    return [int(part) if i % 2 else part.casefold() for i, part in parts], name


def picture_files(root: Path) -> list[FileEntry]:
    """All pictures below `root`, told by their suffix, sorted; not those below a name with a leading dot.

    Symbolic links are followed, but each picture is listed once, by its own name where it lies below `root`: aliases
    would come to lie on both sides of a split. Raises UserError if a folder cannot be listed.
    """
    found: list[FileEntry] = []
    seen: set[str] = set()  # real paths of pictures and folders
    folders = [(os.path.realpath(root), "")]
    while folders:
        links: list[tuple[str, str]] = []  # looked at when all that is really there is known
        while folders:
            folder, prefix = folders.pop()
            seen.add(folder)
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        name = prefix + entry.name
                        if entry.name.startswith("."):
                            continue
                        if entry.is_symlink():
                            links.append((name, os.path.realpath(entry.path)))
                        elif entry.path not in seen and entry.is_dir():
                            folders.append((entry.path, name + "/"))
                        elif entry.path not in seen and entry.name.lower().endswith(SUFFIXES):
                            seen.add(entry.path)
                            status = entry.stat()
                            found.append((name, status.st_size, status.st_mtime_ns))
            except OSError as error:
                raise UserError(f"{folder} cannot be listed ({error.strerror})") from error
        for name, real in sorted(links, key=lambda link: natural_sort_key(link[0])):
            if real in seen:
                continue
            if os.path.isdir(real):
                folders.append((real, name + "/"))
            elif name.lower().endswith(SUFFIXES):
                # A link to nothing is a picture that cannot be read.
                there = os.path.exists(real)
                found.append((name, os.path.getsize(real) if there else 0, os.stat(real).st_mtime_ns if there else 0))
            seen.add(real)
    return sorted(found)


def label_from_path(name: str) -> str:
    """The first folder of a picture's name, "." where there is none."""
    return name.split("/")[0] if "/" in name else "."


def split_folders(names: Iterable[str]) -> dict[str, str]:
    """Each first-level folder of pictures of these `names` and the split it is; {} unless all are called as splits are,
    in capitals or not: one that is called `train` beside `bus` is a class."""
    folders = sorted({label_from_path(name) for name in names} - {"."})
    splits = {folder: SPLIT_FOLDERS[folder.lower()] for folder in folders if folder.lower() in SPLIT_FOLDERS}
    return splits if len(splits) == len(folders) else {}
