"""Images: where they come from, one source a file, and how they become batches.

To add a source, write a function `(root, split) -> Images`, where split is "train", "validation" or "test" (None for a
split that it does not have: validation images are then taken from those for training), and name it in `SOURCES`; if its
images can change, also in `OWN`, and checkpoints hold their hashes. What else its signature names is a setting of the
`data` group by that name; a source that writes into `root` takes `download`, and with False only reads it.
"""

from collections.abc import Callable

from betavae.data.datasets.arrays import arrays
from betavae.data.datasets.dsprites import dsprites
from betavae.data.datasets.image_folder import folder
from betavae.data.datasets.mnist import mnist
from betavae.data.datasets.sprites import sprites
from betavae.data.datasets.torchvision import cifar10, fashion_mnist, kmnist, svhn
from betavae.data.image_set import ImageSet, LazySubset

DATASETS: dict[str, Callable[..., ImageSet | None]] = {
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "kmnist": kmnist,
    "cifar10": cifar10,
    "svhn": svhn,
    "folder": folder,
    "arrays": arrays,
    "sprites": sprites,
    "dsprites": dsprites,
}
USER_DATASETS = ("folder", "arrays")  # whose name does not say which images they are

__all__ = ["DATASETS", "USER_DATASETS", "ImageSet", "LazySubset", "mnist"]
