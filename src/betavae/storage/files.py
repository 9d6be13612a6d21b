"""Atomic writes that only replace files of this project."""

import codecs
import contextlib
import csv
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from betavae.errors import UserError

STAMP = "betavae"  # in every file that a script writes to a path from the user
STAMP_COLUMN = f"made by {STAMP}"  # the last and empty column of a CSV file
COMPRESSED_MAGIC = b"betavae images\r\n\x1a\n"  # its line ends reveal a file that was transferred as text
TMP_SUFFIX = ".part"  # of a file that is being written
TMP_PREFIX = "betavae-part-"  # of a file that is being written, where its suffix must be that of the whole file


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that no reader finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f"{path.name}.", suffix=TMP_SUFFIX, delete=False
        ) as file:
            part = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o666 & ~UMASK)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            if part:
                part.unlink(missing_ok=True)
        raise


def read_umask() -> int:
    """Return the permission bits that new files lack."""
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask


UMASK = read_umask()


@contextlib.contextmanager
def atomic_path(out: str | Path, key: str = "out") -> Iterator[Path]:
    """Yield a temporary path beside `out`, with its suffix, which is renamed to `out` when the block ends.

    A process that is killed leaves no half-written file at `out`.

    Raises:
        UserError: If `out`, named by the setting `key`, was not made by this project, or the block fails to write.
    """
    path = Path(out).expanduser()
    require_own_file(path, key)
    # The name is not part of it, since the name may have the greatest length that the file system allows.
    part = path.with_name(f"{TMP_PREFIX}{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, ValueError, KeyError) as error:  # KeyError: a suffix that Pillow does not know
        raise UserError(f"{key}: cannot write {path} ({error})") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def require_own_file(path: Path, key: str) -> None:
    """Raise UserError if `path`, named by the setting `key`, exists and was not made by this project."""
    if os.path.lexists(path) and not has_stamp(path):
        # A .npy file has no place for a stamp.
        reason = "" if path.suffix == ".npy" else " and was not made by betavae"
        raise UserError(f"{key}: {path} already exists{reason}; delete it or choose another path")


def check_writable(out: str | Path, key: str = "out") -> None:
    """Raise the UserError of `atomic_path` before hours of work, without making a folder."""
    path = Path(out).expanduser()
    require_own_file(path, key)
    folder = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{key}: cannot write {path} ({error})") from error


@contextlib.contextmanager
def atomic_dir(out: str | Path, key: str = "out") -> Iterator[Path]:
    """Yield a temporary folder whose content becomes that of `out` when the block ends without an error.

    An empty folder is filled in place, since it may be the working folder, a mount point or the target of a link.

    Raises:
        UserError: If `out`, named by the setting `key`, exists and is not an empty folder, or is not writable.
    """
    path = Path(out).expanduser()
    taken = UserError(f"{key}: {path} already exists; delete it or choose another folder")
    exists, part = path.is_dir(), None
    try:
        if os.path.lexists(path) and (not exists or any(path.iterdir())):
            raise taken
        part = (path if exists else path.absolute().parent) / f"{TMP_PREFIX}{secrets.token_hex(4)}"
        part.mkdir(parents=True)
        yield part
        if exists:
            if list(path.iterdir()) != [part]:
                raise taken
            for item in part.iterdir():
                item.rename(path / item.name)
        else:
            part.rename(path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # another process was first
            raise taken from error
        raise UserError(f"{key}: cannot make {out} ({error.strerror or error})") from error
    finally:
        if part:
            shutil.rmtree(part, ignore_errors=True)


def write_csv(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Write a table whose last column, which is empty, marks it as a file of this project."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, STAMP_COLUMN])
        writer.writerows([*row, ""] for row in zip(*columns.values(), strict=True))


def hash_file(path: Path) -> str:
    """Return 16 hex digits of the SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def has_stamp(path: Path) -> bool:
    """Return whether a file bears the stamp of this project.

    The stamp is the software of a PNG, JPEG, WebP or TIFF, the creator of a PDF or SVG, the comment of a zip file
    (tensors), the key `made_by` of a JSON or Parquet file, the last column of a CSV file, or the magic bytes of
    compressed images.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(2**16)
        if start.startswith(b"\x89PNG"):
            return b"Software\0" + STAMP.encode() in start
        if start.startswith((b"\xff\xd8", b"RIFF", b"II*\0", b"MM\0*")):
            from PIL import ExifTags, Image

            with Image.open(path, formats=("JPEG", "WEBP", "TIFF")) as image:
                return image.getexif().get(ExifTags.Base.Software) == STAMP
        if start.startswith(b"%PDF"):  # matplotlib and Pillow encode the name differently
            names = (STAMP.encode(), codecs.BOM_UTF16_BE + STAMP.encode("utf-16-be"))
            return any(b"/Creator (" + name + b")" in path.read_bytes() for name in names)
        if path.suffix.lower() == ".svg":
            agent = rf"<dc:creator>\s*<cc:Agent>\s*<dc:title>{STAMP}</dc:title>"
            return re.search(agent.encode(), start) is not None
        if start.startswith(COMPRESSED_MAGIC):
            return True
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                return archive.comment == STAMP.encode()
        if start.startswith(b"PAR1"):  # the metadata of a Parquet file are at its end
            end = path.read_bytes()[-(2**20) :]
            return b"made_by" in end and STAMP.encode() in end
        if path.suffix == ".csv":
            return STAMP_COLUMN.encode() in start.splitlines()[0]
        content = json.loads(path.read_text()) if path.suffix == ".json" else {}
        return content.get("made_by") == STAMP
    except Exception:  # an unreadable file is not one of this project
        return False
