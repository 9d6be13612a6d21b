"""Train and use (β-)VAEs. In a notebook: `run = betavae.load("runs/...")`, then `run.vae`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from betavae.data.datamodule import ImageDataModule
    from betavae.models.vae import VAE
    from betavae.module import VAEModule
    from betavae.runtime.checkpoint import TrainedRun, load

__version__ = "0.1.0"

# Imported on first use, so that `python train.py --help` does not wait for torch.
_MODULES = {
    "VAE": "betavae.models.vae",
    "VAEModule": "betavae.module",
    "ImageDataModule": "betavae.data.datamodule",
    "TrainedRun": "betavae.runtime.checkpoint",
    "load": "betavae.runtime.checkpoint",
}
__all__ = ["VAE", "ImageDataModule", "TrainedRun", "VAEModule", "load"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'betavae' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
