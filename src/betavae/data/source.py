"""`DataSource`: the training, validation and test images of a data set."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from betavae.data import DATASETS, USER_DATASETS
from betavae.data.fingerprint import fingerprint, hash_labels
from betavae.data.holdout import DEFAULT_HOLDOUT, exclude_indices, hold_out_at_random, hold_out_by_name
from betavae.data.image_set import ImageSet
from betavae.data.loader import binarize_images
from betavae.data.scaling import FULL_SCALE, Scaling, dtype_name, fit_scaling
from betavae.errors import UserError

# Settings of the group `data` that only batches need.
LOADER_SETTINGS = ("batch_size", "eval_batch_size", "seed", "scaling")


class DataSource:
    """Load the training, validation and test images of a data set.

    Args:
        name: A key of `DATASETS`.
        root: The folder or file of the data set.
        validation_size: The training images to hold out for validation, a count or (below 1) a share. Named images are
            chosen by a hash of their names, others from a fixed seed. None takes the data set's own validation
            images, or a tenth of the training images if it has none.
        binarize: "none", "threshold" or "dynamic", as for `binarize_pixels`.
        settings: The arguments of the data set's function.

    Raises:
        UserError: If the data set is unknown or has no such setting.
    """

    def __init__(self, name: str, root: str, validation_size: float | None, binarize: str, **settings: Any):
        if name not in DATASETS:
            raise UserError(f"data.name={name} is invalid: expected one of {', '.join(DATASETS)}")
        self.dataset = DATASETS[name]
        for key in settings:
            if key not in inspect.signature(self.dataset).parameters:
                raise UserError(f"data.{key} is not a setting of data.name={name}")
        self.name, self.root, self.settings = name, Path(root).expanduser(), settings
        self.validation_size, self.binarize = validation_size, binarize

    @classmethod
    def from_checkpoint(cls, settings: Mapping[str, Any], root: str | None = None) -> "DataSource":
        """Restore the source from the settings `data` of a checkpoint, or with the images in `root`.

        Paths that a checkpoint names are only read, since its author must not choose where files are written.
        """
        safe = {"cache": "data", "download": bool(root)}
        parameters = inspect.signature(DATASETS[settings["name"]]).parameters
        kept = {key: value for key, value in settings.items() if key not in LOADER_SETTINGS}
        kept |= {key: value for key, value in safe.items() if key in parameters}
        return cls(**(kept | {"root": root or settings["root"]}))

    def load_split(self, split: str) -> ImageSet:
        """Load a split as the data set has it, so "train" includes images that are held out for validation.

        Raises:
            UserError: If there are none.
        """
        images = self.dataset(self.root, split, **self.settings)
        if images is None or not len(images):
            raise UserError(f"data: {self.name} in {self.root} has no {split} images")
        return images

    def load_training(self) -> dict[str, ImageSet]:
        """Load the splits "train" and "validation"; the latter may be empty.

        Raises:
            UserError: If `validation_size` is invalid for this data set.
        """
        train, validation = self.load_split("train"), self.dataset(self.root, "validation", **self.settings)
        if validation is None or self.validation_size == 0:
            train, validation = self.split_validation(train)
        elif self.validation_size is not None:
            raise UserError(
                f"data.validation_size={self.validation_size} is invalid: expected null or 0 (data.name={self.name} in "
                f"{self.root} has its own validation images)"
            )
        return {"train": train, "validation": validation}

    def split_validation(self, images: ImageSet) -> tuple[ImageSet, ImageSet]:
        """Split training images into those for training and those for validation."""
        size, key = DEFAULT_HOLDOUT if self.validation_size is None else self.validation_size, "data.validation_size"
        if not size:
            index = torch.arange(0)
        elif images.names:
            index = hold_out_by_name(images.names, size, key, "validation/")
        else:
            index = hold_out_at_random(len(images), size, key)
        return images.select(exclude_indices(index, len(images))), images.select(index.sort().values)

    def fit_scaling(self, mode: str, splits: Mapping[str, ImageSet]) -> Scaling:
        """Fit a scaling to the training images; see `betavae.data.scaling.fit_scaling`."""
        dtype = dtype_name(splits["train"].dtype)
        if dtype not in FULL_SCALE:
            raise UserError(f"data.name={self.name} has images of type {dtype}: expected {', '.join(FULL_SCALE)}")
        # Neither statistics nor a check are needed for the bytes of a known data set.
        if mode == "unit" and dtype == "uint8" and self.name not in USER_DATASETS:
            return Scaling.unit()
        return fit_scaling(mode, splits, f"data.root={self.root}")

    def binarize_for_eval(self, images: ImageSet, scaling: Scaling) -> ImageSet:
        """Binarize images once, the same way in every run."""
        return images if self.binarize == "none" else binarize_images(images, self.binarize, scaling)

    def fingerprints(self, split: str, images: ImageSet, labels: bool) -> dict[str, str]:
        """Hash the images of a split, and their labels if `labels` is true.

        The result is empty for a data set whose name determines its content.
        """
        if self.name not in USER_DATASETS:
            return {}
        return {split: fingerprint(images)} | ({f"{split} labels": hash_labels(images)} if labels else {})
