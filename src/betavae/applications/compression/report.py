"""What other compressors make of the same images, in bits per pixel and channel."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from betavae.models.vae import VAE
from betavae.objectives import elbo

PICTURES = 1000  # of how many images each is made a picture alone, which takes milliseconds


def baseline_sizes(images: Tensor) -> dict[str, tuple[float | None, float]]:
    """`name -> (each image alone, all in one)` for uint8 images `(N, C, H, W)`; pictures' formats stack them for the
    second. Of binarised images, eight pixels make a byte first. `zstd` only where the package zstandard is there.
    Pictures of each image alone are made of the first `PICTURES`, and counted for all."""
    binary = bool(((images == 0) | (images == 255)).all())
    data = images.numpy()
    flat = [np.packbits(image.ravel() > 0) if binary else image for image in data]
    coders: dict[str, Callable[[bytes], bytes]] = {
        "gzip": lambda raw: gzip.compress(raw, 9),
        "bz2": lambda raw: bz2.compress(raw, 9),
        "xz": lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
    }
    if find_spec("zstandard"):
        import zstandard

        coders["zstd"] = zstandard.ZstdCompressor(22).compress
    sizes: dict[str, tuple[float | None, int]] = {}
    for name, coder in coders.items():
        each = None if name == "xz" else sum(len(coder(raw.tobytes())) for raw in flat)  # xz: 60 ms an image
        sizes[name] = (each, len(coder(b"".join(raw.tobytes() for raw in flat))))
    for name, options in {
        "PNG": {"format": "PNG", "optimize": True},
        "WebP": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6},
    }.items():
        tall = 16_000 // data.shape[2]  # WebP takes 16,383 pixels
        rows = [np.concatenate(list(data[i : i + tall]), axis=1) for i in range(0, len(data), tall)]
        first = [picture_size(image, binary, options) for image in data[:PICTURES]]
        together = sum(picture_size(strip, binary, options) for strip in rows)
        sizes[name] = (sum(first) * len(data) / len(first), together)
    return {
        name: (None if alone is None else 8 * alone / images.numel(), 8 * together / images.numel())
        for name, (alone, together) in sizes.items()
    }


def picture_size(image: np.ndarray, binary: bool, options: dict) -> int:
    """Bytes of `(C, H, W)` as a picture."""
    from PIL import Image

    picture = Image.fromarray(image.transpose(1, 2, 0).squeeze(2) if len(image) == 1 else image.transpose(1, 2, 0))
    if binary and len(image) == 1 and options["format"] == "PNG":
        picture = picture.convert("1")
    file = io.BytesIO()
    picture.save(file, **options)
    return file.tell()


@torch.no_grad()
def neg_elbo_bits(vae: VAE, images: Tensor, draws: int = 4) -> float:
    """The model's neg. ELBO of uint8 images `(N, C, H, W)` in bits per pixel and channel."""
    generator, total = torch.Generator().manual_seed(0), 0.0
    for part in images.split(25):
        x = part.float() / 255
        terms = elbo(vae, x, torch.randn(draws, len(x), vae.latent_dim, generator=generator), 1.0)
        total += (terms.recon + terms.kl.sum(1)).double().sum().item()
    return total / np.log(2) / images.numel()
