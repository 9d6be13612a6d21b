"""Sizes of compressed images and of other codecs' files, in bits per dimension (pixel and channel)."""

import bz2
import gzip
import io
import lzma
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from betavae.models.vae import VAE
from betavae.objectives import elbo

MAX_SINGLE_IMAGES = 1000  # images encoded one by one as PNG or WebP, which takes milliseconds each
MAX_WEBP_SIDE = 16_000  # below WebP's limit of 16,383 pixels
PICTURE_FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {"format": "PNG", "optimize": True},
    "WebP": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6},
}

Bits = tuple[float | None, float]  # per dimension: each image in a file of its own (None: not measured), all in one


def compute_model_bits(vae: VAE, images: Tensor, file_bytes: int, initial_bits: int) -> dict[str, Bits]:
    """Compute the bits per dimension of a compressed file and of the model's negative ELBO.

    The file counts once with and once without its initial bits.
    """
    dimensions = images.numel()
    return {
        "this file": (None, 8 * file_bytes / dimensions),
        "without its initial bits": (None, (8 * file_bytes - initial_bits) / dimensions),
        "neg. ELBO": (None, compute_neg_elbo_bits(vae, images)),
    }


def compute_baseline_bits(images: Tensor) -> dict[str, Bits]:
    """Compress uint8 images `(N, C, H, W)` with other codecs.

    Binarized images are packed to eight pixels per byte first. For one file of all images, picture formats get the
    images stacked vertically. For files of single images, they encode up to `MAX_SINGLE_IMAGES` and extrapolate. zstd
    is included if the package zstandard is installed.
    """
    is_binary = bool(((images == 0) | (images == 255)).all())
    data = images.numpy()
    packed = [(np.packbits(image.ravel() > 0) if is_binary else image).tobytes() for image in data]
    codecs: dict[str, Callable[[bytes], bytes]] = {
        "gzip": lambda raw: gzip.compress(raw, 9),
        "bz2": lambda raw: bz2.compress(raw, 9),
        "xz": lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
    }
    if find_spec("zstandard"):
        import zstandard

        codecs["zstd"] = zstandard.ZstdCompressor(22).compress
    sizes: dict[str, Bits] = {}
    for name, codec in codecs.items():
        # xz takes 60 ms per image.
        single = None if name == "xz" else sum(len(codec(raw)) for raw in packed)
        sizes[name] = (single, len(codec(b"".join(packed))))
    height = MAX_WEBP_SIDE // data.shape[2]
    stacks = [np.concatenate(list(data[i : i + height]), axis=1) for i in range(0, len(data), height)]
    for name, options in PICTURE_FORMATS.items():
        first = [count_picture_bytes(image, is_binary, options) for image in data[:MAX_SINGLE_IMAGES]]
        together = sum(count_picture_bytes(stack, is_binary, options) for stack in stacks)
        sizes[name] = (sum(first) * len(data) / len(first), together)
    return {
        name: (None if single is None else 8 * single / images.numel(), 8 * together / images.numel())
        for name, (single, together) in sizes.items()
    }


def count_picture_bytes(image: NDArray[np.uint8], is_binary: bool, options: dict[str, Any]) -> int:
    """Count the bytes of `(C, H, W)` in a picture format."""
    picture = Image.fromarray(image.transpose(1, 2, 0).squeeze(2) if len(image) == 1 else image.transpose(1, 2, 0))
    if is_binary and len(image) == 1 and options["format"] == "PNG":
        picture = picture.convert("1")
    file = io.BytesIO()
    picture.save(file, **options)
    return file.tell()


@torch.no_grad()
def compute_neg_elbo_bits(vae: VAE, images: Tensor, draws: int = 4) -> float:
    """Compute the negative ELBO of uint8 images `(N, C, H, W)` in bits per dimension."""
    generator, total = torch.Generator().manual_seed(0), 0.0
    for batch in images.split(25):
        x = batch.float() / 255
        terms = elbo(vae, x, torch.randn(draws, len(x), vae.latent_dim, generator=generator), 1.0)
        total += (terms.recon + terms.kl.sum(1)).double().sum().item()
    return total / math.log(2) / images.numel()


def format_table(rows: dict[str, Bits], remark: str = "") -> str:
    """Format sizes as a table, followed by the remark if there is one."""
    lines = [f"{'bits per dimension':28}{'each alone':>12}{'all in one':>12}"]
    for name, (single, together) in rows.items():
        lines.append(f"{name:28}{'' if single is None else format(single, '.4f'):>12}{together:12.4f}")
    return "\n".join([*lines, remark] if remark else lines)
