"""Files of compressed images: what `compress` gave, whole and unharmed or not at all.

    magic (18 bytes) | format, length of the header (uint32 each) | header (LZMA) | payload | SHA-256 of all this

The header is a line of JSON and, if there are names, a second line with them, separated by zero bytes. The payload is
the coder's stack: words of 32 bits, then its heads of 64, least significant byte first.
"""

import hashlib
import json
import lzma
import math
import os
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
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
START = len(COMPRESSED_MAGIC) + 8
MAX_LANES = 4096
# What a file may claim is bounded by its size: an image by a byte, and 4,000 pixels by another.
PIXELS_PER_BYTE = 4000


@dataclass(frozen=True)
class Compressed:
    """Compressed images, and what `decompress` checks."""

    payload: bytes
    image_shape: list[int]  # [C, H, W]
    batches: list[int]  # how many images were coded side by side, in their order
    initial_bits: int  # of the payload: borrowed bits, which came back as they went in
    model: str  # SHA-256 of weights and settings
    probabilities: str  # SHA-256 of some probabilities, as whole numbers
    images: str  # SHA-256 of the bytes
    near: list[list[int]]  # of encoder and decoder, outputs that both ends round up
    names: list[str] | None = None  # None: their numbers

    @property
    def count(self) -> int:
        return sum(self.batches)

    @property
    def heads(self) -> int:
        return max(self.batches)

    def bits_per_dimension(self) -> float:
        """Of the payload, per pixel and channel, initial bits included."""
        return 8 * len(self.payload) / (self.count * math.prod(self.image_shape))


def smallest_payload(count: int, image_shape: list[int]) -> int:
    """The least bytes for so many images, to which `compress` pads a payload and below which none is read."""
    return math.ceil(count * (1 + math.prod(image_shape) / PIXELS_PER_BYTE))


def largest_header(size: int) -> tuple[int, int]:
    """The most bytes of JSON, and of JSON and names, in a file of `size` bytes."""
    return 2**20 + 4 * size, 2**20 + 64 * size


def write_file(path: Path, compressed: Compressed) -> None:
    """Written beside and renamed. Raises UserError rather than replace a file that is not one of these."""
    fields = dict(vars(compressed))
    payload, names = fields.pop("payload"), fields.pop("names")
    unpacked = json.dumps(fields).encode()
    if names is not None:
        unpacked += b"\n" + "\0".join(names).encode("utf-8", "surrogateescape")
    # LZMA, since zlib makes 21,000 bytes of the numbers from 0000 to 9999, and this 2,000
    header = lzma.compress(unpacked, lzma.FORMAT_ALONE)
    content = COMPRESSED_MAGIC + struct.pack("<II", FORMAT, len(header)) + header + payload
    if len(unpacked) > largest_header(len(content))[1]:
        raise UserError(f"{path}: the names of the images are too long for images this small; shorten the names")
    try:
        require_own_file(path, "out")
        atomic_write_bytes(path, content + hashlib.sha256(content).digest())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): name one in a folder that can be written") from error


def read_file(path: Path) -> Compressed:
    """Raises UserError for a file that is not one of these, of another version, or not as it was written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): name a file of compressed images") from error
    if content[: len(COMPRESSED_MAGIC)] != COMPRESSED_MAGIC:
        raise UserError(f"{path} holds no images compressed by this project: name a file that it wrote")
    body, digest = content[:-32], content[-32:]
    if len(body) < START or hashlib.sha256(body).digest() != digest:
        raise UserError(f"{path} is damaged or not whole (its checksum is wrong): take another copy of it")
    version, size = struct.unpack_from("<II", body, len(COMPRESSED_MAGIC))
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, and this version reads {FORMAT}: use the one that wrote it")
    try:
        most, most_with_names = largest_header(len(body))
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=2**28)
        unpacked = decompressor.decompress(body[START : START + size], most_with_names)
        fields, second_line, names = unpacked.partition(b"\n")
        if len(fields) > most:
            raise ValueError
        compressed = Compressed(payload=body[START + size :], names=None, **json.loads(fields))
        possible = is_valid(compressed)
        if possible and second_line:
            possible = names.count(b"\0") == compressed.count - 1
            compressed = replace(compressed, names=names.decode("utf-8", "surrogateescape").split("\0"))
    except (lzma.LZMAError, ValueError, TypeError, RecursionError, MemoryError):
        possible = False
    if not possible:
        raise UserError(f"{path} has a header that this project does not write: take another copy of it")
    return compressed


def is_int_list(values: Any, least: int, most: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and least <= value <= most for value in values)


def is_valid(compressed: Compressed) -> bool:
    """Whether everything in it is of its kind, and there are bytes for as many heads and images as it speaks of."""
    it = compressed
    sums = (it.model, it.probabilities, it.images)
    return (
        is_int_list(it.image_shape, 1, 2**16)
        and len(it.image_shape) == 3
        and is_int_list(it.batches, 1, MAX_LANES)
        and len(it.batches) > 0
        and is_int_list([it.initial_bits], 0, 8 * len(it.payload))
        and len(it.payload) >= max(8 * it.heads, smallest_payload(it.count, it.image_shape))
        and len(it.payload) % 4 == 0
        and isinstance(it.near, list)
        and len(it.near) == 2
        and all(is_int_list(listed, 0, 2**62) for listed in it.near)
        and all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in sums)
    )


def output_paths(names: list[str] | None, count: int, out: Path) -> list[Path]:
    """Where `write_images` writes: FILE.npy, or PNGs in a folder, each by its name.

    Raises UserError for names that lead out of the folder, where something lies that is not of this project, and in a
    folder that cannot be written.
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
    """`images` `(N, C, H, W)` uint8 to their `image_files`, whose errors it raises before it writes one."""
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
