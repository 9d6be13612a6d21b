"""Data sets, and how their images become batches.

To add a data set, write a function `load_NAME(root, split, ...) -> ImageSet | None` in a file of `datasets/`, and
register it in `DATASETS`:

- `root` is the folder or file that `data.root` names.
- `split` is "train", "validation" or "test". The function returns None for a split that the data set does not have.
  Without validation images, some training images are held out for validation.
- Further parameters are settings of the group `data` with the same names. A function that writes into `root` has a
  parameter `download`, and only reads if it is False.

If the name does not identify the images, since users choose them, add it to `USER_DATASETS`: checkpoints then record
fingerprints of the splits.
"""

from collections.abc import Callable

from betavae.data.datasets.arrays import load_arrays
from betavae.data.datasets.dsprites import load_dsprites
from betavae.data.datasets.image_folder import load_image_folder
from betavae.data.datasets.mnist import load_mnist
from betavae.data.datasets.sprites import load_sprites
from betavae.data.datasets.table import load_table
from betavae.data.datasets.torchvision import load_cifar10, load_fashion_mnist, load_kmnist, load_svhn
from betavae.data.image_set import ImageSet

DATASETS: dict[str, Callable[..., ImageSet | None]] = {
    "mnist": load_mnist,
    "fashion_mnist": load_fashion_mnist,
    "kmnist": load_kmnist,
    "cifar10": load_cifar10,
    "svhn": load_svhn,
    "folder": load_image_folder,
    "arrays": load_arrays,
    "table": load_table,
    "sprites": load_sprites,
    "dsprites": load_dsprites,
}
USER_DATASETS = {"folder", "arrays", "table"}
