"""A path in, a ready model out, safely: nothing that a checkpoint names is ever run."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from betavae.errors import UserError
from betavae.vae import VAE


class Loaded(NamedTuple):
    """A trained VAE in evaluation mode, and what its checkpoint says about it."""

    vae: VAE
    path: Path
    settings: dict[str, Any]  # the arguments of VAEModule
    data: dict[str, Any]  # the arguments of MNISTDataModule


def newest(runs: Path) -> Path:
    """The best (else last) checkpoint of the run under `runs`, sweeps included, that finished last."""
    finished = [path for path in runs.rglob("metrics.json") if '"status": "finished"' in path.read_text()]
    for metrics in sorted(finished, key=lambda path: path.stat().st_mtime, reverse=True):
        for name in ("best.ckpt", "last.ckpt"):
            if (path := metrics.parent / "checkpoints" / name).exists():
                return path
    raise UserError(f"no finished run under {runs}/: train one with `python train.py`, or name one with ckpt=PATH")


def load(ckpt: str | None, runs: str) -> Loaded:
    """The VAE in the file `ckpt` (a run folder will do too; None: the newest finished run under `runs`), on the CPU.

    Raises UserError when the file is not a whole checkpoint of this project.
    """
    path = Path(ckpt).expanduser() if ckpt else newest(Path(runs))
    if (path / "checkpoints").is_dir():
        path = next((p for n in ("best", "last") if (p := path / "checkpoints" / f"{n}.ckpt").exists()), path)
    content = read(path)
    try:
        settings = content["hyper_parameters"]
        vae = VAE(**settings["model"])
        vae.load_state_dict({key.removeprefix("vae."): value for key, value in content["state_dict"].items()})
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a betavae checkpoint that this version can read ({reason})") from error
    return Loaded(vae.eval().requires_grad_(False), path, settings, content.get("datamodule_hyper_parameters", {}))


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file: tensors and plain values only."""
    if not path.exists():
        raise UserError(f"ckpt: {path} does not exist; name a .ckpt file or a run folder")
    if path.is_dir():
        raise UserError(f"ckpt: {path} is a folder without checkpoints/best.ckpt or checkpoints/last.ckpt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"holds a {type(content).__name__}")
        return content
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"ckpt: {path} is damaged or not a checkpoint ({reason})") from error


def save(content: dict[str, Any], path: str | os.PathLike) -> None:
    """Written beside and renamed: whoever reads `path` never finds half a file."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"could not save {path} ({error.strerror}); the checkpoint before it is untouched") from error
