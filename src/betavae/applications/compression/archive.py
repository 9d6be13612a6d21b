"""Compress images into a file that is verified before it replaces another."""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from betavae.applications.compression import codec
from betavae.applications.compression.file_format import Compressed, read_file, write_file
from betavae.errors import UserError
from betavae.models.vae import VAE
from betavae.storage.files import atomic_path


def compress_file(vae: VAE, images: Tensor, names: list[str] | None, out: Path, lanes: int, verify: bool) -> Compressed:
    """Compress uint8 images `(N, C, H, W)` into the file `out`, with progress bars.

    Raises:
        UserError: With `verify`, if decompression of the new file does not return the same images.
    """
    with tqdm(total=len(images), desc="compressing", unit=" images", disable=None) as bar:
        compressed = codec.compress(vae, images, lanes, names, bar.update)
    with atomic_path(out) as path:
        write_file(path, compressed)
        if verify and not torch.equal(decompress_file(vae, read_file(path), "verifying"), images):
            raise UserError(f"{out} was not written, because decompression did not return the same images")
    return compressed


def decompress_file(vae: VAE, compressed: Compressed, description: str = "decompressing") -> Tensor:
    """Decompress the images of a file that was read, with a progress bar."""
    with tqdm(total=compressed.count, desc=description, unit=" images", disable=None) as bar:
        return codec.decompress(vae, compressed, bar.update)
