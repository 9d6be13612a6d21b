"""Identify a set of images by a hash, without reading all of a large set."""

import hashlib
import json
import math

import torch

from betavae.data.image_set import ImageSet

MAX_HASHED_BYTES = 2**28  # evenly spaced blocks of larger sets are hashed
BLOCK_BYTES = 2**20


def fingerprint(images: ImageSet, labels: bool = False) -> str:
    """Hash the shape, names and pixels, and if asked the labels, to 16 hexadecimal digits."""
    n, image_bytes = len(images), math.prod(images.pixels.shape[1:]) * images.dtype.itemsize
    block = max(1, BLOCK_BYTES // image_bytes)
    starts = torch.arange(0, n, block)
    if n * image_bytes > MAX_HASHED_BYTES:
        blocks = max(1, MAX_HASHED_BYTES // (block * image_bytes))
        starts = torch.linspace(0, max(0, n - block), blocks, dtype=torch.float64).long()
    dtype = [] if images.dtype == torch.uint8 else [str(images.dtype)]
    digest = hashlib.sha256(json.dumps([list(images.pixels.shape), images.names, *dtype]).encode())
    for start in starts.tolist():
        index = torch.arange(start, min(start + block, n))
        digest.update(images.pixels.index_select(0, index).contiguous().numpy().data)
    if labels:
        digest.update(images.labels.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def hash_labels(images: ImageSet) -> str:
    """Hash the labels and the names of the classes to 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(images.classes and list(images.classes)).encode())
    digest.update(images.labels.contiguous().numpy().data)
    return digest.hexdigest()[:16]
