import pytest
import torch

from betavae.data.datamodule import ImageDataModule
from betavae.data.image_set import ImageSet
from tests.conftest import DATA


@pytest.fixture
def make_datamodule(data_root):
    """Set up the data module of MNIST, or of other settings."""

    def make(**changes):
        datamodule = ImageDataModule(**DATA | {"root": data_root} | changes)
        datamodule.setup()
        return datamodule

    return make


def numbered(n, pixels=None):
    """Images whose labels are their indices."""
    return ImageSet(torch.zeros(n, 1, 1, 1, dtype=torch.uint8) if pixels is None else pixels, torch.arange(n))
