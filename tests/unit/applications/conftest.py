from pathlib import Path
from typing import Any

from betavae.models.vae import VAE
from betavae.runtime import checkpoint
from tests.conftest import DATA, MODEL, MODULE


def save_vae(path: Path, vae: VAE, model: dict[str, Any], data: dict[str, Any], **module: Any) -> Path:
    """Save a checkpoint of `vae`, whose settings differ from the tests' defaults by the given ones."""
    content = {
        "betavae_format": checkpoint.FORMAT,
        "hyper_parameters": MODULE | {"model": MODEL | model} | module,
        "datamodule_hyper_parameters": DATA | data,
        "state_dict": {f"vae.{key}": value for key, value in vae.state_dict().items()},
    }
    checkpoint.save_checkpoint(content, path)
    return path
