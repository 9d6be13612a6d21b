"""What takes a while to make from a checkpoint or a data set is made once, and kept in a file of ours."""

import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from betavae.errors import UserError
from betavae.storage.files import STAMP, atomic_path, has_stamp
from betavae.storage.torch_file import load_torch_file


def load_or_compute(path: Path, asked: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make()` gives, tensors and plain values; if `path` holds what it once gave for the same `asked`, that.

    A file of ours that is harmed, or was made for something else, is made anew. Anybody else's is left alone, and where
    nothing can be kept that is said, and the answer is the same.
    """
    if path.is_file() and has_stamp(path):
        try:
            content = load_torch_file(path)
            if content["asked"] == asked:
                return content["made"]
        except Exception:  # harmed
            pass
    made = make()
    try:
        with atomic_path(path, "not kept") as part:
            part.write_bytes(to_bytes({"asked": asked, "made": made}))
    except UserError as error:
        print(error)
    return made


def to_bytes(content: dict[str, Any]) -> bytes:
    """As `torch.save` has it, with our stamp."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = STAMP.encode()
    return buffer.getvalue()


def file_hash(path: Path) -> str:
    """Which file it is, whatever its name."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
