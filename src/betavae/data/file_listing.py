"""List the image files below a folder, and name images."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from betavae.errors import UserError

# The names of first-level folders that are splits, and the split of each.
SPLIT_FOLDERS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".avif", ".jp2"),
)


class FileEntry(NamedTuple):
    """A file below a folder, and the state of its content."""

    name: str  # relative to the folder, with "/"
    size: int  # bytes
    modified: int  # ns


def png_filenames(names: Sequence[str], out: str | Path) -> list[str]:
    """Return the names of PNG files in the folder `out` for images of these names.

    Raises:
        UserError: If a name leads out of the folder, or two files would have the same name.
    """
    files: dict[str, str] = {}
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{name} is a name that leads out of {out}")
        # The former suffix stays, since 7.jpg and 7.png are two images.
        file = name if name.endswith(".png") else f"{name}.png"
        if file in files:
            raise UserError(f"{files[file]} and {name} would be one file, {file}, in {out}")
        files[file] = name
    return list(files)


def as_text(name: str) -> str:
    r"""Write each byte of a file name that is not UTF-8 as `\xNN`, since tables and JSON require UTF-8."""
    return re.sub(r"[\ud800-\udfff]", lambda match: f"\\x{ord(match[0]) & 0xFF:02x}", name)


def index_names(n: int) -> list[str]:
    """Number `n` images that have no names."""
    return [f"{i:0{len(str(n - 1))}d}" for i in range(n)]


def natural_sort_key(name: str) -> tuple[list[str | int], str]:
    """Return the key that sorts image 9 before image 10."""
    parts = enumerate(re.split(r"(\d+)", name))
    return [int(part) if i % 2 else part.casefold() for i, part in parts], name


def list_image_files(root: Path) -> tuple[list[FileEntry], Counter[str]]:
    """List all image files below `root` by their suffix, sorted; hidden files and folders are skipped.

    The other files are counted by their suffix. Symbolic links are followed. A file with several names is listed once,
    under its real name if that is below `root`: otherwise the same image could be in two splits.

    Raises:
        UserError: If a folder is not readable.
    """
    found: list[FileEntry] = []
    others: Counter[str] = Counter()
    seen: set[str] = set()  # the real paths of files and folders
    folders = [(os.path.realpath(root), "")]
    while folders:
        links: list[tuple[str, str]] = []  # followed after all real files are listed
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
                        elif not entry.name.lower().endswith(SUFFIXES):
                            others[Path(entry.name).suffix.lower()] += entry.path not in seen and entry.is_file()
                        elif entry.path not in seen:
                            seen.add(entry.path)
                            found.append(FileEntry(name, entry.stat().st_size, entry.stat().st_mtime_ns))
            except OSError as error:
                raise UserError(f"{folder} is not readable: {error.strerror}") from error
        for name, real in sorted(links, key=lambda link: natural_sort_key(link[0])):
            if real in seen:
                continue
            seen.add(real)
            if os.path.isdir(real):
                folders.append((real, name + "/"))
            elif name.lower().endswith(SUFFIXES):
                # A dangling link is listed, and reported as an unreadable image.
                status = os.stat(real) if os.path.exists(real) else None
                found.append(FileEntry(name, status.st_size, status.st_mtime_ns) if status else FileEntry(name, 0, 0))
            else:
                others[Path(name).suffix.lower()] += 1
    return sorted(found), +others


def describe_others(others: Counter[str]) -> str:
    """Count files that are not listed, for their suffix."""
    named = ", ".join(f"{count:,} {as_text(suffix) or 'without a suffix'}" for suffix, count in others.most_common(5))
    return f"{others.total():,} files were skipped for their suffix: {named}{', ...' if len(others) > 5 else ''}"


def label_from_path(name: str) -> str:
    """Return the first folder of a file name, or "." if there is none."""
    return name.split("/")[0] if "/" in name else "."


def split_folders(names: Iterable[str]) -> dict[str, str]:
    """Map each first-level folder of these files to its split.

    Returns:
        {} unless all folders have names of splits: `train` beside `bus` is a class.
    """
    folders = sorted({label_from_path(name) for name in names} - {"."})
    splits = {folder: SPLIT_FOLDERS[folder.lower()] for folder in folders if folder.lower() in SPLIT_FOLDERS}
    return splits if len(splits) == len(folders) else {}
