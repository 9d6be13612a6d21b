"""What takes a while to make from a checkpoint or a data set is made once, and kept in a file of ours."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from betavae.data import OWN
from betavae.data.listing import picture_files
from betavae.errors import UserError
from betavae.files import STAMP, made_here, writing
from betavae.torch_file import load_torch_file

if TYPE_CHECKING:
    from betavae.data.datamodule import ImageDataModule
    from betavae.data.images import Images

# Settings of data that say nothing of which images there are.
INCIDENTAL = ("root", "cache", "batch_size", "eval_batch_size", "seed")


def kept(path: Path, asked: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make()` gives, tensors and plain values; if `path` holds what it once gave for the same `asked`, that.

    A file of ours that is harmed, or was made for something else, is made anew. Anybody else's is left alone, and where
    nothing can be kept that is said, and the answer is the same.
    """
    if path.is_file() and made_here(path):
        try:
            content = load_torch_file(path)
            if content["asked"] == asked:
                return content["made"]
        except Exception:  # harmed
            pass
    made = make()
    try:
        with writing(path, "not kept") as part:
            part.write_bytes(stamped({"asked": asked, "made": made}))
    except UserError as error:
        print(error)
    return made


def stamped(content: dict[str, Any]) -> bytes:
    """As `torch.save` has it, with our stamp."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = STAMP.encode()
    return buffer.getvalue()


def digest(path: Path) -> str:
    """Which file it is, whatever its name."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def fingerprint(validation: "Images") -> str | None:
    """A hash of at most 64 of the images that were set aside, evenly spaced, where that goes by their numbers: of one
    image more or less, others would be. None where it goes by names, or none were."""
    if validation.names or not len(validation):
        return None
    index = torch.arange(0, len(validation), max(1, -(-len(validation) // 64)))
    return hashlib.sha256(validation.pixels.index_select(0, index).cpu().numpy().tobytes()).hexdigest()[:16]


def provenance(data: "ImageDataModule") -> dict[str, Any]:
    """Plain values that are the same for the same images, split and seen in the same way: settings, and of a user's own
    files a hash of their names, sizes and times. No image is read."""
    said = {key: value for key, value in data.hparams.items() if key not in INCIDENTAL}
    if data.name in OWN and data.root.exists():
        stat = data.root.stat()
        files = picture_files(data.root) if data.root.is_dir() else [(stat.st_size, stat.st_mtime_ns)]
        said["files"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    return said
