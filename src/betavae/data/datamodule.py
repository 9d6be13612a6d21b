"""`ImageDataModule`: a source's images as training, validation and test batches."""

import functools
import inspect
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from betavae.data import DATASETS, USER_DATASETS
from betavae.data.fingerprint import fingerprint
from betavae.data.image_set import ImageSet
from betavae.data.loader import BatchLoader, binarize_pixels
from betavae.data.splits import DEFAULT_SIZE, count_of, set_aside
from betavae.errors import UserError

# One validation split and one binarised test set for everybody, whatever the seed of the run.
SPLIT_SEED = 0
EVAL_BINARIZE_SEED = 0
MAX_DEVICE_BYTES = 2**32  # bytes; of more images than that, `Batches` sends one batch at a time


class ImageDataModule(L.LightningDataModule):
    """The images of one of `SOURCES`, on the training device where they are held in memory.

    `validation_size` of the training images, a number or (below 1) a share, are set aside (0: none), by their names
    where they have any, as `set_aside` says, else by a fixed seed; with None the source's own validation images are
    taken, or a tenth where it has none.
    `binarize`: "none" keeps grey values, "threshold" sets pixels above 127, "dynamic" draws Bernoulli pixels, afresh
    for every training batch and once, from a fixed seed, for validation and test. `settings` are the source's own.
    Raises UserError for what the images cannot fulfil.
    """

    def __init__(
        self,
        name: str,
        root: str,
        validation_size: float | None,
        batch_size: int,
        eval_batch_size: int,
        binarize: str,
        seed: int,
        **settings: Any,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        if name not in DATASETS:
            raise UserError(f"data.name={name} cannot be: it must be one of {', '.join(DATASETS)}")
        for key in settings:
            if key not in inspect.signature(DATASETS[name]).parameters:
                raise UserError(f"data.{key} is not a setting of data.name={name}")
        self.source, self.name, self.settings, self.root = DATASETS[name], name, settings, Path(root).expanduser()
        self.validation_size, self.batch_size, self.eval_batch_size = validation_size, batch_size, eval_batch_size
        self.binarize, self.seed = binarize, seed
        self.originals: dict[str, ImageSet] = {}  # the splits before they are binarised
        self.splits: dict[str, ImageSet] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        self.originals = self.load_training() | {"test": self.load_split("test")}
        left = len(self.originals["train"])
        if self.batch_size > left:
            raise UserError(
                f"data.batch_size={self.batch_size} cannot be: {left} images are left to train on; lower it"
            )
        self.splits = {
            name: part if name == "train" else self.binarize_for_eval(part) for name, part in self.originals.items()
        }

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """The hash of each split, known after `setup`; {} for a data set whose name says which images it holds."""
        return {name: fingerprint(part) for name, part in self.originals.items()} if self.name in USER_DATASETS else {}

    def load_training(self) -> dict[str, ImageSet]:
        """Load the training and validation images."""
        train, validation = self.load_split("train"), self.source(self.root, "validation", **self.settings)
        if validation is None or self.validation_size == 0:
            train, validation = self.split_validation(train)
        elif self.validation_size is not None:
            raise UserError(
                f"data.validation_size={self.validation_size} is invalid: expected null or 0 (data.name={self.name} in "
                f"{self.root} has its own validation images)"
            )
        return {"train": train, "validation": validation}

    def load_split(self, split: str) -> ImageSet:
        images = self.source(self.root, split, **self.settings)
        if images is None or not len(images):
            raise UserError(f"data: {self.name} in {self.root} has no {split} images")
        return images

    def split_validation(self, images: ImageSet) -> tuple[ImageSet, ImageSet]:
        n, size = len(images), DEFAULT_SIZE if self.validation_size is None else self.validation_size
        if images.names and size:
            held = set_aside(images.names, size, "data.validation_size", "validation/")
        else:
            count = count_of(size, n, "data.validation_size") if size else 0
            held = torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))[:count]
        left = torch.ones(n, dtype=torch.bool).index_fill(0, held, False)
        return images.select(left.nonzero().squeeze(1)), images.select(held.sort().values)

    def binarize_for_eval(self, images: ImageSet) -> ImageSet:
        """Binarised once, for evaluation."""
        if self.binarize == "none":
            return images
        generator = torch.Generator().manual_seed(EVAL_BINARIZE_SEED)
        pixels = binarize_pixels(images.tensor(), self.binarize, generator).to(torch.uint8) * 255
        return replace(images, pixels=pixels)

    @property
    def image_shape(self) -> list[int]:
        """`[C, H, W]`, known after `setup`."""
        return list(self.splits["train"].pixels.shape[1:])

    def train_dataloader(self) -> BatchLoader:
        trainer: Any = self.trainer
        same = trainer is not None and bool(trainer.overfit_batches)  # the same batches in every epoch
        epoch = (lambda: trainer.current_epoch) if trainer is not None else (lambda: 0)
        return self.make_loader("train", self.batch_size, epoch, self.seed, not same, self.binarize)

    def val_dataloader(self) -> BatchLoader | list:
        return self.make_loader("validation", self.eval_batch_size) if len(self.splits["validation"]) else []

    def test_dataloader(self) -> BatchLoader:
        return self.make_loader("test", self.eval_batch_size)

    def make_loader(self, split: str, batch_size: int, *training: Any) -> BatchLoader:
        images, trainer = self.splits[split], self.trainer
        if trainer is None:
            return BatchLoader(images, batch_size, *training)
        device = trainer.strategy.root_device
        if math.prod(images.pixels.shape) <= MAX_DEVICE_BYTES:
            images = images.to(device)
        batches = BatchLoader(images, batch_size, *training)
        batches.device = device
        batches.shard(trainer.global_rank, trainer.world_size)
        return batches
