"""`ImageDataModule`: the Lightning data module of a `DataSource`."""

import functools
from typing import Any

import lightning as L

from betavae.data.image_set import ImageSet
from betavae.data.loader import HOST_TYPES, BatchLoader
from betavae.data.source import DataSource
from betavae.errors import UserError

MAX_DEVICE_BYTES = 2**32  # larger sets stay on the host, which sends one batch at a time


class ImageDataModule(L.LightningDataModule):
    """Batches of a data set, whose images are stored on the training device if they fit.

    Args:
        name: A key of `DATASETS`.
        root: The folder or file of the data set.
        validation_size: The training images to hold out for validation, as for `DataSource`.
        batch_size: The images of a training batch.
        eval_batch_size: The images of a validation or test batch.
        binarize: "none" keeps gray values, "threshold" sets pixels above half of the range, "dynamic" draws Bernoulli
            pixels: a fresh draw for every training batch, and one draw from a fixed seed for validation and test.
        seed: The seed of the order of training images.
        scaling: One of `scaling.MODES`.
        settings: The arguments of the data set's function.

    Raises:
        UserError: If the data set has no such setting.
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
        scaling: str = "unit",
        **settings: Any,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.source = DataSource(name, root, validation_size, binarize, **settings)
        self.batch_size, self.eval_batch_size, self.binarize, self.seed = batch_size, eval_batch_size, binarize, seed
        self.scaling_mode = scaling
        if binarize != "none" and scaling not in ("unit", "minmax"):
            raise UserError(f"data.scaling={scaling} is invalid with data.binarize={binarize}: expected unit or minmax")
        self.originals: dict[str, ImageSet] = {}  # the splits before they are binarized
        self.splits: dict[str, ImageSet] = {}
        self.has_conditions = False  # True: a conditional model sees the labels, whose changes are noticed, too

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        self.originals = self.source.load_training() | {"test": self.source.load_split("test")}
        n = len(self.originals["train"])
        if self.batch_size > n:
            raise UserError(f"data.batch_size={self.batch_size} is invalid: expected at most {n}, the training images")
        self.scaling = self.source.fit_scaling(self.scaling_mode, self.originals)
        self.splits = {
            name: images if name == "train" else self.source.binarize_for_eval(images, self.scaling)
            for name, images in self.originals.items()
        }

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """`DataSource.fingerprints` of all splits, after `setup`."""
        found: dict[str, str] = {}
        for split, images in self.originals.items():
            found |= self.source.fingerprints(split, images, self.has_conditions)
        return found

    @property
    def image_shape(self) -> list[int]:
        """`[C, H, W]`, after `setup`."""
        return list(self.splits["train"].pixels.shape[1:])

    @property
    def classes(self) -> list[str]:
        """The names of the labels, after `setup`.

        Raises:
            UserError: If the training images have no labels, or others have none or further ones.
        """
        images, where = self.splits["train"], f"data.name={self.source.name} in {self.source.root}"
        if images.labels.ndim != 1:
            raise UserError(f"model.conditional=true needs one label per image, and {where} has several factors")
        if len(images.labels.unique()) < 2:
            found = "one class" if images.has_labels else "no labels"
            raise UserError(
                f"model.conditional=true needs at least two classes, and {where} has {found}; expected a folder for "
                "each class, FILE.npz with arrays images and labels, or data.label of a table"
            )
        lowest, highest = int(images.labels.min()), int(images.labels.max())
        if lowest < 0 or highest >= len(images):
            number = len(images.classes or images.labels.unique())
            found = f"{number} different labels for {len(images)} training {images.item}s"
            raise UserError(
                f"model.conditional=true needs several {images.item}s of each class, and {where} has {found}"
            )
        names = images.classes or [str(label) for label in range(highest + 1)]
        if "" in names:
            raise UserError(f"{where} has {images.item}s with an empty label, and model.conditional=true needs names")
        for split, others in self.splits.items():
            if len(others) and not others.has_labels:
                raise UserError(f"{where}: the {split} images have no labels, which model.conditional=true needs")
            if unseen := sorted(set(others.labels.tolist()) - set(images.labels.tolist())):
                label = names[unseen[0]] if unseen[0] < len(names) else unseen[0]
                raise UserError(
                    f"{where}: label {label} of the {split} images has no training image, which "
                    "model.conditional=true needs; add some, or remove the images with this label"
                )
        return names

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
        """Make the loader of a split, for this process and its device if there is a trainer."""
        images, trainer = self.splits[split], self.trainer
        if trainer is None:
            batches = BatchLoader(images, batch_size, *training)
            batches.scaling = self.scaling
            return batches
        device = trainer.strategy.root_device
        if images.nbytes <= MAX_DEVICE_BYTES and images.dtype not in HOST_TYPES:
            images = images.to(device)
        batches = BatchLoader(images, batch_size, *training)
        batches.device, batches.scaling = device, self.scaling
        batches.shard(trainer.global_rank, trainer.world_size)
        return batches
