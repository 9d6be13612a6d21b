"""Files that appear whole or not at all, and that are never somebody else's."""

import codecs
import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from betavae.errors import UserError

STAMP = "betavae"  # in every file that a script writes where its user says
COMPRESSED_MAGIC = (
    b"betavae images\r\n\x1a\n"  # starts compressed images; its line ends show a file transferred as text
)
TMP_SUFFIX = ".part"  # the end of the name of a file that is being written
TMP_PREFIX = "betavae-part-"  # its start, where its end must be that of the whole file


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Written beside under a name of its own and renamed: whoever reads `path` never finds half a file."""
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


def _umask() -> int:
    mask = os.umask(0)  # there is no way to ask without setting
    os.umask(mask)
    return mask


UMASK = _umask()


@contextlib.contextmanager
def atomic_path(out: str | Path, key: str = "out") -> Iterator[Path]:
    """A path to write to, with the ending of the path that a user named by the setting `key`, and beside it; it becomes
    that path when the block ends, so that a process that is killed leaves no half of a file there.

    Raises UserError where something lies there that this project did not make, and for a failure in the block.
    """
    path = Path(out).expanduser()
    require_own_file(path, key)
    # Of its name only the ending, since a name may be as long as a name can be.
    part = path.with_name(f"{TMP_PREFIX}{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, ValueError, KeyError) as error:  # KeyError: an ending that Pillow does not know
        raise UserError(f"{key}: cannot write {path} ({error})") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def require_own_file(path: Path, key: str) -> None:
    """Raises UserError where something lies that this project did not make."""
    if os.path.lexists(path) and not has_stamp(path):
        raise UserError(f"{key}: {path} is there already and was not made by betavae; delete it or name another")


def check_writable(out: str | Path, key: str = "out") -> None:
    """Raises UserError where `writing` would, before hours of work. Makes no folder."""
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
    """Yield a temporary folder to write into; its content becomes that of `out` when the block ends without an error.

    An empty folder is filled in place, since it may be the working folder, a mount point or linked to.

    Raises:
        UserError: If `out`, named by the setting `key`, exists and is not an empty folder, or is not writable.
    """
    path = Path(out).expanduser()
    taken = UserError(f"{key}: {path} is there already; delete it or name another folder")
    there, part = path.is_dir(), None
    try:
        if os.path.lexists(path) and (not there or any(path.iterdir())):
            raise taken
        part = (path if there else path.absolute().parent) / f"{TMP_PREFIX}{secrets.token_hex(4)}"
        part.mkdir(parents=True)
        yield part
        if there:
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


def has_stamp(path: Path) -> bool:
    """Tell whether a file bears the mark of this project.

    It is the software of a PNG, JPEG, WebP or TIFF, the creator of a PDF or SVG, a zip file's comment (tensors), a JSON
    file's key `made_by`, a Parquet file's metadata, a table's last column, the start of compressed images.
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
        if start.startswith(b"%PDF"):  # matplotlib's and Pillow's
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
        if start.startswith(b"PAR1"):  # what is said of a Parquet file is at its end
            end = path.read_bytes()[-(2**20) :]
            return b"made_by" in end and STAMP.encode() in end
        if path.suffix == ".csv":
            return f"made by {STAMP}".encode() in start.splitlines()[0]
        content = json.loads(path.read_text()) if path.suffix == ".json" else {}
        return content.get("made_by") == STAMP
    except Exception:  # a file that cannot be read as one of this project is not one
        return False
