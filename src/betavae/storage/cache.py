"""On-disk cache for slow computations on a checkpoint or a data set."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from betavae.errors import UserError
from betavae.storage.files import STAMP, atomic_path, has_stamp
from betavae.storage.torch_file import load_torch_file


def load_or_compute(path: Path, key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Load the result of `compute` from the cache file `path`, or compute and save it.

    A file of this project that is damaged or has another key is replaced. Any other file is left alone. If the result
    is not saved, the reason is printed.

    Args:
        path: The cache file.
        key: All that the result depends on.
        compute: Returns tensors and plain values.
    """
    if path.is_file() and has_stamp(path):
        try:
            content = load_torch_file(path)
            if content["key"] == key:
                return content["value"]
        except Exception:  # the file is damaged
            pass
    value = compute()
    try:
        with atomic_path(path, "not cached") as part:
            part.write_bytes(to_bytes({"key": key, "value": value}))
    except UserError as error:
        print(error)
    return value


def to_bytes(content: Any) -> bytes:
    """Serialize as `torch.save` does, with the stamp of this project."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = STAMP.encode()
    return buffer.getvalue()
