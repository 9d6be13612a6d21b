"""`ImageDataModule`: a source's images as training, validation and test batches."""

import functools
import inspect
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from betavae.data import OWN, SOURCES
from betavae.data.batches import Batches, binarized
from betavae.data.fingerprint import fingerprint
from betavae.data.images import Images
from betavae.data.splits import DEFAULT_SIZE, count_of, set_aside
from betavae.errors import UserError

# One validation split and one binarised test set for everybody, whatever the seed of the run.
SPLIT_SEED = 0
BINARIZE_SEED = 0
LARGEST_ON_DEVICE = 2**32  # bytes; of more images than that, `Batches` sends one batch at a time


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
        if name not in SOURCES:
            raise UserError(f"data.name={name} cannot be: it must be one of {', '.join(SOURCES)}")
        for key in settings:
            if key not in inspect.signature(SOURCES[name]).parameters:
                raise UserError(f"data.{key} is not a setting of data.name={name}")
        self.source, self.name, self.settings, self.root = SOURCES[name], name, settings, Path(root).expanduser()
        self.validation_size, self.batch_size, self.eval_batch_size = validation_size, batch_size, eval_batch_size
        self.binarize, self.seed = binarize, seed
        self.originals: dict[str, Images] = {}  # the splits before they are binarised
        self.sets: dict[str, Images] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.sets:
            return
        self.originals = self.load_training() | {"test": self.load("test")}
        left = len(self.originals["train"])
        if self.batch_size > left:
            raise UserError(
                f"data.batch_size={self.batch_size} cannot be: {left} images are left to train on; lower it"
            )
        self.sets = {name: part if name == "train" else self.fixed(part) for name, part in self.originals.items()}

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """The hash of each split, known after `setup`; {} for a data set whose name says which images it holds."""
        return {name: fingerprint(part) for name, part in self.originals.items()} if self.name in OWN else {}

    def load_training(self) -> dict[str, Images]:
        """Load the training and validation images."""
        train, validation = self.load("train"), self.source(self.root, "validation", **self.settings)
        if validation is None or self.validation_size == 0:
            train, validation = self.split(train)
        elif self.validation_size is not None:
            raise UserError(
                f"data.validation_size={self.validation_size} is invalid: expected null or 0 (data.name={self.name} in "
                f"{self.root} has its own validation images)"
            )
        return {"train": train, "validation": validation}

    def load(self, split: str) -> Images:
        images = self.source(self.root, split, **self.settings)
        if images is None or not len(images):
            raise UserError(f"data: {self.name} in {self.root} has no {split} images")
        return images

    def split(self, images: Images) -> tuple[Images, Images]:
        n, size = len(images), DEFAULT_SIZE if self.validation_size is None else self.validation_size
        if images.names and size:
            held = set_aside(images.names, size, "data.validation_size", "validation/")
        else:
            count = count_of(size, n, "data.validation_size") if size else 0
            held = torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))[:count]
        left = torch.ones(n, dtype=torch.bool).index_fill(0, held, False)
        return images.take(left.nonzero().squeeze(1)), images.take(held.sort().values)

    def fixed(self, images: Images) -> Images:
        """Binarised once, for evaluation."""
        if self.binarize == "none":
            return images
        generator = torch.Generator().manual_seed(BINARIZE_SEED)
        pixels = binarized(images.tensor(), self.binarize, generator).to(torch.uint8) * 255
        return replace(images, pixels=pixels)

    @property
    def image_shape(self) -> list[int]:
        """`[C, H, W]`, known after `setup`."""
        return list(self.sets["train"].pixels.shape[1:])

    def train_dataloader(self) -> Batches:
        trainer: Any = self.trainer
        same = trainer is not None and bool(trainer.overfit_batches)  # the same batches in every epoch
        epoch = (lambda: trainer.current_epoch) if trainer is not None else (lambda: 0)
        return self.batches("train", self.batch_size, epoch, self.seed, not same, self.binarize)

    def val_dataloader(self) -> Batches | list:
        return self.batches("validation", self.eval_batch_size) if len(self.sets["validation"]) else []

    def test_dataloader(self) -> Batches:
        return self.batches("test", self.eval_batch_size)

    def batches(self, split: str, batch_size: int, *training: Any) -> Batches:
        images, trainer = self.sets[split], self.trainer
        if trainer is None:
            return Batches(images, batch_size, *training)
        device = trainer.strategy.root_device
        if math.prod(images.pixels.shape) <= LARGEST_ON_DEVICE:
            images = images.to(device)
        batches = Batches(images, batch_size, *training)
        batches.device = device
        batches.share(trainer.global_rank, trainer.world_size)
        return batches
