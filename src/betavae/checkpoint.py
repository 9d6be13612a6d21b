"""A path in, a ready model out, safely: nothing that a checkpoint names is ever run."""

import contextlib
import io
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from betavae.errors import UserError
from betavae.settings import RULES
from betavae.vae import VAE

# Of the checkpoints that VAEModule makes. One more when an older `load` could not make sense of them.
FORMAT = 1


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
    settings, data = content["hyper_parameters"], content.get("datamodule_hyper_parameters", {})
    for group, values in (("model", settings["model"]), ("data", data)):
        for name, value in values.items():
            rule = RULES.get(f"{group}.{name}")
            if rule and not rule.holds(value):
                raise UserError(f"{path} holds {group}.{name}={value}, which must be {rule.words}")
    try:
        state = {key.removeprefix("vae."): value for key, value in content["state_dict"].items()}
        # First without memory: what the settings ask for must be what the file holds, before any of it is made.
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in VAE(**settings["model"]).state_dict().items()}
        if shapes != {key: value.shape for key, value in state.items()}:
            raise ValueError("its weights do not fit its settings")
        vae = VAE(**settings["model"])
        vae.load_state_dict(state)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a betavae checkpoint that this version can read ({reason})") from error
    return Loaded(vae.eval().requires_grad_(False), path, settings, data)


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file of this project: tensors and plain values only, unharmed."""
    if not path.exists():
        raise UserError(f"ckpt: {path} does not exist; name a .ckpt file or a run folder")
    if path.is_dir():
        raise UserError(f"ckpt: {path} is a folder without checkpoints/best.ckpt or checkpoints/last.ckpt")
    try:
        # torch reads past wrong checksums, and unpacks whatever it is given.
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if sum(part.file_size for part in parts) > path.stat().st_size:
                raise ValueError("it unpacks to more than its size")
            if harmed := archive.testzip():
                raise ValueError(f"the checksum of {harmed} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"ckpt: {path} is damaged or not a checkpoint ({reason})") from error
    written = content.get("betavae_format") if isinstance(content, dict) else None
    if not isinstance(written, int) or not isinstance(content.get("hyper_parameters", {}).get("model"), dict):
        raise UserError(f"ckpt: {path} is a checkpoint, but not one of betavae")
    if written > FORMAT:
        raise UserError(
            f"ckpt: {path} is from a newer betavae (format {written}, this one reads up to {FORMAT}); update betavae"
        )
    return content


def save(content: dict[str, Any], path: str | os.PathLike) -> None:
    """Written beside and renamed: whoever reads `path` never finds half a file."""
    part = Path(f"{path}.part")
    # In memory first, because torch hides what a disk says.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(f"could not save {path} ({error.strerror}); the checkpoint before it is untouched") from error
