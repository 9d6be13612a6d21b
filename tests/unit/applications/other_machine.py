"""Decompress files like another machine: `python -m tests.unit.applications.other_machine FOLDER [faults]`.

With `faults`, elementary functions differ in their last bit, and network outputs by up to 1e-12.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from betavae.models.vae import VAE, Posterior

RANDOM = np.random.default_rng(0)
FUNCTIONS = [(np, "exp"), (np, "log"), (torch, "exp"), (torch, "log"), (torch.Tensor, "softmax")]
FUNCTIONS += [(torch.special, "ndtr"), (torch.special, "ndtri")]


def disturb_bits(module, name):
    function = getattr(module, name)

    def disturbed(*args):
        values = np.asarray(function(*args))
        directions = RANDOM.choice([-np.inf, 0, np.inf], values.shape)
        values = np.where(np.isfinite(values) & (directions != 0), np.nextafter(values, directions), values)
        return values if module is np else torch.from_numpy(values)

    setattr(module, name, disturbed)


def disturb_networks():
    encode, decode = VAE.encode, VAE.decode_params

    def disturbed(outputs):
        return outputs + 1e-12 * (2 * torch.rand_like(outputs) - 1)

    VAE.encode = lambda self, x: Posterior(*map(disturbed, encode(self, x)))
    VAE.decode_params = lambda self, z: disturbed(decode(self, z))


def main(folder, faults=""):
    if faults:
        for module, name in FUNCTIONS:
            disturb_bits(module, name)
        disturb_networks()
    from betavae.applications.compression.codec import decompress
    from betavae.applications.compression.file_format import read_file

    for path in sorted(Path(folder).glob("*.pt")):
        vae, images = torch.load(path, weights_only=False)
        assert torch.equal(decompress(vae, read_file(path.with_suffix(".bvae"))), images), path


if __name__ == "__main__":
    main(*sys.argv[1:])
