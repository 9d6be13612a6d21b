"""The interface of a trained run, so that applications do not depend on how checkpoints are read."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from betavae.data.image_set import ImageSet
from betavae.data.scaling import Scaling
from betavae.models.vae import VAE


class TrainedRun(Protocol):
    """A trained VAE with its checkpoint, settings and data, as `betavae.load` returns it."""

    @property
    def vae(self) -> VAE: ...

    @property
    def path(self) -> Path:
        """The checkpoint file."""

    @property
    def folder(self) -> Path:
        """The run folder, or the folder of a checkpoint outside a run folder."""

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `VAEModule`."""

    @property
    def data(self) -> dict[str, Any]:
        """The arguments of `ImageDataModule`."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each split of data that can change."""

    @property
    def columns(self) -> list[str] | None:
        """The columns of a model of a table."""

    @property
    def scaling(self) -> Scaling:
        """The map from stored values to those that the VAE sees."""

    def split(self, split: str, root: str | None = None, /) -> ImageSet:
        """Load a split ("train", "validation" or "test"), binarized for evaluation as in training."""

    def subset(self, split: str, root: str | None = None, max_images: int | None = None, /) -> ImageSet:
        """Load at most `max_images` images of a split into memory, binarized as in training."""

    def images(self, split: str, root: str | None = None, max_images: int | None = None, /) -> tuple[Tensor, Tensor]:
        """Load the same images scaled as in training, with their labels."""
