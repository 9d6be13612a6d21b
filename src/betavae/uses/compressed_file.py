"""Files of compressed images: what `compress` gave, whole and unharmed or not at all.

    magic (18 bytes) | format, length of the header (uint32 each) | header (JSON, zlib) | payload | SHA-256 of all this

The payload is the coder's stack: words of 32 bits, then its heads of 64, least significant byte first.
"""

import hashlib
import json
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from betavae.data.listing import png_names
from betavae.errors import UserError
from betavae.files import STAMP, write_whole, writing

MAGIC = b"betavae images\r\n\x1a\n"  # its line ends show a file that was transferred as text
FORMAT = 1
START = len(MAGIC) + 8


@dataclass(frozen=True)
class Compressed:
    """Compressed images, and what `decompress` checks."""

    payload: bytes
    count: int
    image_shape: list[int]  # [C, H, W]
    lanes: int
    heads: int
    initial_bits: int  # of the payload: borrowed bits, which came back as they went in
    model: str  # SHA-256 of weights and settings
    probabilities: str  # SHA-256 of some probabilities, as whole numbers
    images: str  # SHA-256 of the bytes
    names: list[str] | None = None

    def bits_per_dimension(self) -> float:
        """Of the payload, per pixel and channel, initial bits included."""
        return 8 * len(self.payload) / (self.count * math.prod(self.image_shape))


def write_file(path: Path, compressed: Compressed) -> None:
    """Written beside and renamed. Raises UserError rather than replace a file that is not one of these."""
    fields = dict(vars(compressed))
    payload = fields.pop("payload")
    header = zlib.compress(json.dumps(fields).encode(), 9)
    content = MAGIC + struct.pack("<II", FORMAT, len(header)) + header + payload
    try:
        if path.exists():
            with path.open("rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    raise UserError(f"{path} is there already and holds no compressed images: name another file")
        write_whole(path, content + hashlib.sha256(content).digest())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): name one in a folder that can be written") from error


def read_file(path: Path) -> Compressed:
    """Raises UserError for a file that is not one of these, of another version, or not as it was written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): name a file of compressed images") from error
    if content[: len(MAGIC)] != MAGIC:
        raise UserError(f"{path} holds no images compressed by this project: name a file that it wrote")
    body, digest = content[:-32], content[-32:]
    if len(body) < START or hashlib.sha256(body).digest() != digest:
        raise UserError(f"{path} is damaged or not whole (its checksum is wrong): take another copy of it")
    version, size = struct.unpack_from("<II", body, len(MAGIC))
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, and this version reads {FORMAT}: use the one that wrote it")
    header = json.loads(zlib.decompress(body[START : START + size]))
    return Compressed(payload=body[START + size :], **header)


def write_images(images: Tensor, names: list[str] | None, out: Path) -> None:
    """`images` `(N, C, H, W)` uint8 as FILE.npy, or as PNGs in a folder, each by its name.

    Raises UserError for names that lead out of the folder, and where something lies that is not of this project.
    """
    if out.suffix == ".npy":
        if out.exists():
            raise UserError(f"out: {out} is there already; delete it or name another")
        with writing(out) as path, open(path, "wb") as file:
            np.save(file, images.numpy())
        return
    files = png_names(names or [f"{i:0{len(str(len(images) - 1))}d}" for i in range(len(images))], out)
    stamp = PngInfo()
    stamp.add_text("Software", STAMP)
    for png, image in zip(files, images, strict=True):
        pixels = image.permute(1, 2, 0).numpy()
        with writing(out / png) as path:
            Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(path, pnginfo=stamp)
