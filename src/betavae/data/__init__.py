"""MNIST and its relatives in memory: `MNISTDataModule`, and the loader that hands out its batches.

To add a data set, write a function `(root, train) -> (images, labels)` and name it in `DATASETS`.
"""

import hashlib
import lzma
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchvision import datasets

from betavae.errors import UserError

# Of the unpacked files, as published with the database.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
LARGEST_FILE = 47_040_016  # bytes; nothing of MNIST unpacks to more
# One validation split and one binarised test set for everybody, whatever the seed of the run.
SPLIT_SEED = 0
BINARIZE_SEED = 0


def mnist(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST from the files inside this package, unpacked once into `root` and compared with their MD5 sums."""
    raw = root / "MNIST" / "raw"
    for name, md5 in MNIST_MD5.items():
        path = raw / name
        if not path.exists():
            packed = resources.files("betavae") / "mnist_files" / f"{name}.xz"
            content = lzma.LZMADecompressor().decompress(packed.read_bytes(), max_length=LARGEST_FILE)
            write_beside(path, content)
        if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            raise UserError(f"{path} is not MNIST's file (its MD5 sum is wrong); delete it and it is unpacked anew")
    data = datasets.MNIST(str(root), train=train)
    return data.data.unsqueeze(1), data.targets


def write_beside(path: Path, content: bytes) -> None:
    """Written beside and renamed, so that two first runs at once both find whole files."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            part = Path(file.name)
            file.write(content)
        os.replace(part, path)
    except OSError as error:
        if part:
            part.unlink(missing_ok=True)
        raise UserError(f"data.root: cannot write {path} ({error.strerror}); name another folder") from error


def download(cls: type[datasets.MNIST], root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """A data set that torchvision downloads in MNIST's format."""
    raw = root / cls.__name__ / "raw"
    try:
        data = cls(str(root), train=train, download=True)
    except (AssertionError, ValueError) as error:
        raise UserError(f"{raw} holds files that are not {cls.__name__}'s, or damaged; delete them") from error
    except Exception as error:
        files = ", ".join(MNIST_MD5)
        raise UserError(
            f"{cls.__name__} is not in {raw} and could not be downloaded ({type(error).__name__}); "
            f"with no network, put its unpacked files there: {files}"
        ) from error
    size = 60_000 if train else 10_000
    if data.data.shape != (size, 28, 28) or data.targets.shape != (size,) or data.targets.max() > 9:
        raise UserError(f"{raw} holds files that are not {cls.__name__}'s (the shape is wrong); delete them")
    return data.data.unsqueeze(1), data.targets


# (root, train) -> images (N, C, H, W) uint8, labels (N,) int64
DATASETS: dict[str, Callable[[Path, bool], tuple[Tensor, Tensor]]] = {
    "mnist": mnist,
    "fashion_mnist": lambda root, train: download(datasets.FashionMNIST, root, train),
    "kmnist": lambda root, train: download(datasets.KMNIST, root, train),
}


class Batches:
    """Batches `(x, label)`, x `(B, C, H, W)` float in [0, 1], from uint8 images held in one tensor.

    Each batch is one indexed read. The order is a pure function of (seed, epoch), and the position within an epoch is
    part of a checkpoint, so that a resumed run sees just the images that an uninterrupted one sees.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        epoch: Callable[[], int] | None = None,
        seed: int = 0,
        dynamic_binarization: bool = False,
        shard: tuple[int, int] = (0, 1),
        together: int = 1,
    ):
        """`epoch` tells which epoch it is and asks for shuffling; `shard` is (rank, number of processes). With
        `together` above 1 it hands out iterators over so many batches, each made when its turn comes."""
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.epoch, self.seed, self.dynamic_binarization = epoch, seed, dynamic_binarization
        self.rank, self.world_size = shard
        self.together = together
        self.position = {"epoch": -1, "batches": 0}
        # Training shards are of equal size, since every step waits for all processes; evaluation covers every image.
        self.size = len(images) // self.world_size if epoch else len(range(self.rank, len(images), self.world_size))

    def __len__(self) -> int:
        return -(-self.steps // self.together)

    @property
    def steps(self) -> int:
        """Batches in an epoch, those that come together counted one by one."""
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        epoch, start = 0, 0
        order = torch.arange(len(self.images))
        if self.epoch:
            epoch = self.epoch()
            start = self.position["batches"] if self.position["epoch"] == epoch else 0
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
            order = torch.randperm(len(order), generator=generator)
        chunks = order[self.rank :: self.world_size][: self.size].to(self.images.device).split(self.batch_size)
        for first in range(start, len(chunks), self.together):
            group = chunks[first : first + self.together]
            self.position = {"epoch": epoch, "batches": first + len(group)}
            yield self.batch(group[0]) if self.together == 1 else map(self.batch, group)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.images.index_select(0, index)  # a tenth of the time of images[index]
        if self.dynamic_binarization:
            # P(random byte in 0..254 < pixel) = pixel / 255, exactly.
            x = (torch.randint(255, pixels.shape, dtype=torch.uint8, device=pixels.device) < pixels).float()
        else:
            x = pixels.float().div_(255)
        return x, self.labels.index_select(0, index)

    def state_dict(self) -> dict[str, int]:
        return self.position

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state


class MNISTDataModule(L.LightningDataModule):
    """MNIST or another of `DATASETS` in memory, on the training device where there is one.

    `validation_size` images are taken from the training set by a fixed seed (0: none); the test set is the official
    one. `binarize`: "none" keeps grey values, "threshold" sets pixels above 127, "dynamic" draws Bernoulli pixels,
    afresh for every training batch and once, from a fixed seed, for validation and test.
    """

    def __init__(
        self,
        name: str,
        root: str,
        validation_size: int,
        batch_size: int,
        eval_batch_size: int,
        binarize: str,
        seed: int,
    ):
        super().__init__()
        if name not in DATASETS:
            raise UserError(f"data.name={name} cannot be: it must be one of {', '.join(DATASETS)}")
        self.save_hyperparameters(logger=False)
        self.dataset, self.root, self.binarize = name, Path(root).expanduser(), binarize
        self.validation_size, self.batch_size, self.eval_batch_size = validation_size, batch_size, eval_batch_size
        self.seed = seed
        self.steps_per_batch = 1  # of the training, see trainer.steps_per_batch
        self.sets: dict[str, tuple[Tensor, Tensor]] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.sets:
            return
        images, labels = DATASETS[self.dataset](self.root, True)
        if self.batch_size > len(images) - self.validation_size > 0:
            raise UserError(
                f"data.batch_size={self.batch_size} cannot be: {len(images) - self.validation_size} images are left to "
                "train on"
            )
        if self.validation_size >= len(images):
            raise UserError(
                f"data.validation_size={self.validation_size} leaves nothing to train on: {self.dataset} has "
                f"{len(images)} training images"
            )
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
        validation, train = order[: self.validation_size].sort().values, order[self.validation_size :].sort().values
        self.sets = {
            "train": (images[train], labels[train]),
            "validation": (images[validation], labels[validation]),
            "test": DATASETS[self.dataset](self.root, False),
        }
        for split, (pixels, split_labels) in self.sets.items():
            if self.binarize == "threshold":
                self.sets[split] = ((pixels > 127).to(torch.uint8) * 255, split_labels)
            elif self.binarize == "dynamic" and split != "train":
                generator = torch.Generator().manual_seed(BINARIZE_SEED)
                draw = torch.randint(255, pixels.shape, dtype=torch.uint8, generator=generator) < pixels
                self.sets[split] = (draw.to(torch.uint8) * 255, split_labels)

    @property
    def image_shape(self) -> list[int]:
        """`[C, H, W]`, known after `setup`."""
        return list(self.sets["train"][0].shape[1:])

    def _batches(self, split: str, batch_size: int) -> Batches:
        images, labels = self.sets[split]
        trainer, shard, epoch = self.trainer, (0, 1), None
        if trainer is not None:
            images, labels = images.to(trainer.strategy.root_device), labels.to(trainer.strategy.root_device)
            shard = (trainer.global_rank, trainer.world_size)
        if split == "train":
            epoch = (lambda: trainer.current_epoch) if trainer is not None else (lambda: 0)
        dynamic = self.binarize == "dynamic" and split == "train"
        together = self.steps_per_batch if split == "train" else 1
        return Batches(images, labels, batch_size, epoch, self.seed, dynamic, shard, together)

    def train_dataloader(self) -> Batches:
        return self._batches("train", self.batch_size)

    def val_dataloader(self) -> Batches | list:
        return self._batches("validation", self.eval_batch_size) if self.validation_size else []

    def test_dataloader(self) -> Batches:
        return self._batches("test", self.eval_batch_size)


def test_set(settings: dict[str, Any], root: str | None = None, split: str = "test") -> tuple[Tensor, Tensor]:
    """Test images `(N, C, H, W)` in [0, 1] and labels, as a model trained with these data settings sees them.

    Or those of the split "train", where dynamic binarisation is drawn once, from a fixed seed.
    """
    if not settings:
        raise UserError("this checkpoint does not say which data it was trained on, so it has no test images")
    # A checkpoint may say where data are, but not where to put them.
    if root is None:
        root = settings["root"] if Path(settings["root"]).expanduser().is_dir() else "data"
    datamodule = MNISTDataModule(**(settings | {"root": root}))
    datamodule.setup()
    images, labels = datamodule.sets[split]
    if split == "train" and datamodule.binarize == "dynamic":
        generator = torch.Generator().manual_seed(BINARIZE_SEED)
        return (torch.randint(255, images.shape, dtype=torch.uint8, generator=generator) < images).float(), labels
    return images.float() / 255, labels
