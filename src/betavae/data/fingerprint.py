"""A hash that identifies a set of images without reading all of a large one."""

import hashlib
import json
import math

import torch

from betavae.data.image_set import ImageSet

MAX_HASHED_BYTES = 2**28  # of larger sets, evenly spaced blocks are hashed
BLOCK_BYTES = 2**20


def fingerprint(images: ImageSet, labels: bool = False) -> str:
    """Hash shape, names and pixels, and if asked the labels.

    Of more than `MAX_HASHED_BYTES` of pixels, hash as many in evenly spaced blocks.
    """
    n, image_bytes = len(images), math.prod(images.pixels.shape[1:])
    block = max(1, BLOCK_BYTES // image_bytes)
    starts = torch.arange(0, n, block)
    if n * image_bytes > MAX_HASHED_BYTES:
        blocks = max(1, MAX_HASHED_BYTES // (block * image_bytes))
        starts = torch.linspace(0, max(0, n - block), blocks, dtype=torch.float64).long()
    digest = hashlib.sha256(json.dumps([list(images.pixels.shape), images.names]).encode())
    for start in starts.tolist():
        index = torch.arange(start, min(start + block, n))
        digest.update(images.pixels.index_select(0, index).contiguous().numpy().data)
    if labels:
        digest.update(images.labels.contiguous().numpy().data)
    return digest.hexdigest()[:16]
