"""Files of compressed images, read only if intact.

    magic (18 bytes) | format, length of the header (uint32 each) | header (LZMA) | payload | SHA-256 of all before it

The header is a line of JSON and, if there are names, a second line with the names separated by zero bytes. The payload
is the coder's stack: its words of 32 bits, then its heads of 64 bits, little-endian.
"""

import hashlib
import json
import lzma
import math
import os
import struct
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, SkipValidation, model_validator
from torch import Tensor

from betavae.data.file_listing import index_names, png_filenames
from betavae.errors import UserError
from betavae.storage.files import (
    COMPRESSED_MAGIC,
    STAMP,
    atomic_path,
    atomic_write_bytes,
    check_writable,
    require_own_file,
)

FORMAT = 3
HEADER_START = len(COMPRESSED_MAGIC) + 8
HASH_BYTES = 32
MAX_LANES = 4096
MAX_SIDE = 2**16
MAX_PIXELS_PER_BYTE = 4000
MAX_LZMA_MEMORY = 2**28  # bytes

Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
BatchSize = Annotated[int, Field(ge=1, le=MAX_LANES)]
Index = Annotated[int, Field(ge=0, le=2**62)]
SHA256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Compressed(BaseModel):
    """Compressed images, with what `decompress` checks."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    payload: SkipValidation[bytes]
    image_shape: Annotated[list[Side], Field(min_length=3, max_length=3)]  # [C, H, W]
    batches: Annotated[list[BatchSize], Field(min_length=1)]  # images coded side by side
    initial_bits: NonNegativeInt  # borrowed bits in the payload, which decompression returns
    model: SHA256  # of weights and settings
    probabilities: SHA256  # of some probabilities as integers
    images: SHA256  # of the images' bytes
    near: Annotated[list[list[Index]], Field(min_length=2, max_length=2)]  # encoder and decoder outputs to round up
    names: SkipValidation[list[str] | None] = None  # Names may have bytes that are not UTF-8. None means numbers.

    @model_validator(mode="after")
    def check_payload(self) -> "Compressed":
        """Check that the payload is long enough for the heads and images."""
        size = len(self.payload)
        min_bytes = max(8 * self.heads, min_payload_bytes(self.count, self.image_shape))
        if size % 4 or size < min_bytes or self.initial_bits > 8 * size:
            raise ValueError("the payload is too short")
        return self

    @property
    def count(self) -> int:
        """The number of images."""
        return sum(self.batches)

    @property
    def heads(self) -> int:
        """The number of the coder's heads."""
        return max(self.batches)

    def bits_per_dimension(self) -> float:
        """Compute the payload's bits per pixel and channel, including the initial bits."""
        return 8 * len(self.payload) / (self.count * math.prod(self.image_shape))


def min_payload_bytes(count: int, image_shape: list[int]) -> int:
    """Compute the bytes to which `compress` pads a payload: one per image, and one per 4,000 pixels.

    This bounds the images that a file can claim to have.
    """
    return math.ceil(count * (1 + math.prod(image_shape) / MAX_PIXELS_PER_BYTE))


def max_header_bytes(file_size: int) -> tuple[int, int]:
    """Compute the highest size of the JSON line, and of the whole unpacked header."""
    return 2**20 + 4 * file_size, 2**20 + 64 * file_size


def write_file(path: Path, compressed: Compressed) -> None:
    """Write a file of compressed images atomically.

    Raises:
        UserError: If `path` is a file that this project did not write, or not writable.
    """
    header = json.dumps(compressed.model_dump(exclude={"payload", "names"})).encode()
    if compressed.names is not None:
        header += b"\n" + "\0".join(compressed.names).encode("utf-8", "surrogateescape")
    # zlib would compress the numbers from 0000 to 9999 to 21,000 bytes; LZMA compresses them to 2,000.
    packed = lzma.compress(header, lzma.FORMAT_ALONE)
    content = COMPRESSED_MAGIC + struct.pack("<II", FORMAT, len(packed)) + packed + compressed.payload
    if len(header) > max_header_bytes(len(content))[1]:
        raise UserError(f"{path}: the names of the images are too long for images this small; shorten the names")
    try:
        require_own_file(path, "out")
        atomic_write_bytes(path, content + hashlib.sha256(content).digest())
    except OSError as error:
        raise UserError(f"{path} is not writable: {error.strerror}; name a file in a writable folder") from error


def read_file(path: Path) -> Compressed:
    """Read a file of compressed images.

    Raises:
        UserError: If it is another file, has another format version, or is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} is not readable: {error.strerror}; name a file of compress.py") from error
    if content[: len(COMPRESSED_MAGIC)] != COMPRESSED_MAGIC:
        raise UserError(f"{path} is not a file of compressed images; name a file of compress.py")
    body, checksum = content[:-HASH_BYTES], content[-HASH_BYTES:]
    if len(body) < HEADER_START or hashlib.sha256(body).digest() != checksum:
        raise UserError(f"{path} is damaged or incomplete: its checksum is wrong; use another copy")
    version, header_size = struct.unpack_from("<II", body, len(COMPRESSED_MAGIC))
    if version != FORMAT:
        raise UserError(
            f"{path} has format {version}, and this betavae reads format {FORMAT}; use the one that wrote it"
        )
    header_end = HEADER_START + header_size
    try:
        return parse_header(body[HEADER_START:header_end], body[header_end:], len(body))
    except (lzma.LZMAError, ValueError, TypeError, RecursionError, MemoryError):
        raise UserError(f"{path} is damaged: its header is invalid; use another copy") from None


def parse_header(packed: bytes, payload: bytes, file_size: int) -> Compressed:
    """Unpack and validate a header; raise an exception if it is not one that `write_file` writes."""
    max_json, max_all = max_header_bytes(file_size)
    header = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=MAX_LZMA_MEMORY).decompress(packed, max_all)
    fields, newline, joined = header.partition(b"\n")
    if len(fields) > max_json:
        raise ValueError("the header is too long")
    names = joined.decode("utf-8", "surrogateescape").split("\0") if newline else None
    compressed = Compressed(payload=payload, names=names, **json.loads(fields))
    if names is not None and len(names) != compressed.count:
        raise ValueError("the number of names is not the number of images")
    return compressed


def output_paths(names: list[str] | None, count: int, out: Path) -> list[Path]:
    """Return the files that `write_images` writes: FILE.npy, or a PNG per image in a folder.

    Raises:
        UserError: If a name points outside the folder, or a file exists that this project did not write, or the folder
            is not writable.
    """
    if out.suffix == ".npy":
        if os.path.lexists(out):
            raise UserError(f"out: {out} already exists; delete it or choose another")
        files = [out]
    else:
        files = [out / name for name in png_filenames(names or index_names(count), out)]
    for file in files:
        require_own_file(file, "out")
    for file in {file.parent: file for file in files}.values():
        check_writable(file)
    return files


def write_images(images: Tensor, names: list[str] | None, out: Path) -> None:
    """Write images `(N, C, H, W)` uint8 to their `output_paths`, all of which are checked first."""
    files = output_paths(names, len(images), out)
    if out.suffix == ".npy":
        with atomic_path(out) as path, open(path, "wb") as file:
            np.save(file, images.numpy())
        return
    stamp = PngInfo()
    stamp.add_text("Software", STAMP)
    for png, image in zip(files, images, strict=True):
        pixels = image.permute(1, 2, 0).numpy()
        with atomic_path(png) as path:
            Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(path, pnginfo=stamp)
