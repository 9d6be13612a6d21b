"""A path in, a ready model out, safely: nothing that a checkpoint names is ever run."""

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from betavae.data.batches import binarized
from betavae.data.datamodule import BINARIZE_SEED, SPLIT_SEED, ImageDataModule
from betavae.data.images import Images
from betavae.errors import UserError
from betavae.fast import accelerate
from betavae.files import write_whole
from betavae.running.run_folder import read_json
from betavae.running.settings import check_group
from betavae.torch_file import load_torch_file
from betavae.vae import VAE

# Of the checkpoints that VAEModule makes. One more when an older version could not make sense of them.
FORMAT = 2
MAX_PARTS = 20  # modules and parameters of a network, per weight that its checkpoint holds


class Run(NamedTuple):
    """A trained VAE in evaluation mode, and what its checkpoint says about it."""

    vae: VAE
    path: Path
    settings: dict[str, Any]  # the arguments of VAEModule
    data: dict[str, Any]  # the arguments of ImageDataModule
    set_aside: str | None = None  # the `fingerprint` of the validation images, if they could become others

    @property
    def folder(self) -> Path:
        """The run folder; of a checkpoint that lies alone, the folder it lies in."""
        return self.path.parent.parent if self.path.parent.name == "checkpoints" else self.path.parent

    def datamodule(self, root: str | None = None) -> ImageDataModule:
        """The data it was trained on, in `root` (None: where they were then).

        Raises UserError if the checkpoint does not say which, or they are no longer there.
        """
        if not self.data:
            raise UserError(f"{self.path} does not say which data it was trained on, so it has no images")
        # A checkpoint may say where data are, but not where to put them.
        known = self.data["root"]
        if not root and not Path(known).expanduser().exists():
            if self.data["name"] not in ("mnist", "sprites"):  # which come with the package
                raise UserError(
                    f"{self.path} was trained on data={self.data['name']} in {known}, and there is nothing there now "
                    f"(seen from {Path.cwd()}): say where it is, by data_root=PATH"
                )
            known = os.devnull
        cache = {"cache": "data"} if "cache" in self.data else {}
        return ImageDataModule(**(self.data | cache | {"root": root or known}))

    def images(self, split: str = "test", root: str | None = None, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Images `(N, C, H, W)` in [0, 1] of "train", "validation" or "test", as the model sees them, and their labels;
        of dynamically binarised training images one draw, and of more than `most` that many, from a fixed seed."""
        images = self.subset(split, root, most)
        return images.pixels.float() / 255, images.labels

    def subset(self, split: str, root: str | None = None, most: int | None = None) -> Images:
        """The same as uint8, in memory, with what else is known of them."""
        datamodule = self.datamodule(root)
        if split == "test":
            images: Images = datamodule.test_set()
        else:
            datamodule.setup()
            images = datamodule.sets[split]
        if most is not None and len(images) > most:
            chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))[:most]
            images = images.take(chosen.sort().values)
        pixels = images.tensor()
        if split == "train" and datamodule.binarize != "none":
            bits = binarized(pixels, datamodule.binarize, torch.Generator().manual_seed(BINARIZE_SEED))
            pixels = bits.to(torch.uint8) * 255
        return replace(images, pixels=pixels)


def newest(runs: Path) -> Path:
    """The run under `runs`, sweeps included, that finished last."""
    found = [path for path in runs.rglob("metrics.json") if read_json(path).get("status") == "finished"]
    for metrics in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        if any((metrics.parent / "checkpoints" / name).exists() for name in ("best.ckpt", "last.ckpt")):
            return metrics.parent
    raise UserError(f"no finished run under {runs}/: train one with `python train.py`, or name one with ckpt=PATH")


def load(ckpt: str | Path | None = None, runs: str = "runs") -> Run:
    """The run of the checkpoint file `ckpt` (a run folder will do too: its best, else its last; None: the newest
    finished run under `runs`), on the CPU.

    Raises UserError when the file is not a whole checkpoint of this project.
    """
    path = Path(ckpt).expanduser() if ckpt else newest(Path(runs).expanduser())
    if (path / "checkpoints").is_dir():
        path = next((p for n in ("best", "last") if (p := path / "checkpoints" / f"{n}.ckpt").exists()), path)
    content = read(path)
    settings, data = content["hyper_parameters"], content.get("datamodule_hyper_parameters", {})
    set_aside = content.get("set_aside")
    vae = VAE(**settings["model"])
    vae.load_state_dict({key.removeprefix("vae."): value for key, value in content["state_dict"].items()})
    return Run(accelerate(vae.eval().requires_grad_(False)), path, settings, data, set_aside)


def check_stored_settings(group: str, values: dict[str, Any], path: Path) -> None:
    """Raises UserError for a setting in the checkpoint `path` that is not valid."""
    try:
        check_group(group, values)
    except UserError as error:
        raise UserError(f"{path} holds a setting that cannot be: {error}") from error


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint file of this project holds: tensors and plain values, unharmed, as of today's format, with the
    weights of the model that its settings describe."""
    if not path.exists():
        raise UserError(f"ckpt: {path} does not exist; name a .ckpt file or a run folder")
    if path.is_dir():
        raise UserError(f"ckpt: {path} is a folder without checkpoints/best.ckpt or checkpoints/last.ckpt")
    try:
        content = load_torch_file(path)
    except Exception as error:
        raise UserError(f"ckpt: {path} is damaged or not a checkpoint ({first_line(error)[:120]})") from error
    written = content.get("betavae_format") if isinstance(content, dict) else None
    if not isinstance(written, int) or not isinstance(content.get("hyper_parameters", {}).get("model"), dict):
        raise UserError(f"ckpt: {path} is a checkpoint, but not one of betavae")
    if written > FORMAT:
        raise UserError(
            f"ckpt: {path} is from a newer betavae (format {written}, this one reads up to {FORMAT}); update betavae"
        )
    model = content["hyper_parameters"]["model"]
    data = content.get("datamodule_hyper_parameters", {})
    check_stored_settings("model", {key: value for key, value in model.items() if key != "image_shape"}, path)
    check_stored_settings("data", data, path)
    try:
        weights = {key.removeprefix("vae."): value.shape for key, value in content["state_dict"].items()}
        if weights != model_shapes(model, MAX_PARTS * len(weights)):
            raise ValueError(
                "its weights do not fit its settings" if "image_shape" in model else "it has no image_shape"
            )
        if data.get("name") == "folder":  # whose pictures are made that large
            size = data["image_size"]
            if list(model["image_shape"][1:]) != ([size, size] if isinstance(size, int) else list(size)):
                raise ValueError(f"data.image_size={size} is not the size of the model's images")
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{path} is not a betavae checkpoint that this version can read ({reason})") from error
    return upgraded(content)


def model_shapes(settings: dict[str, Any], limit: int) -> dict[str, torch.Size]:
    """The shapes of the weights of a VAE, for which no memory is allocated. Raises ValueError above `limit` parts."""
    parts = 0

    def count(*registered: Any) -> None:
        nonlocal parts
        parts += 1
        if parts > limit:
            raise ValueError("its weights are fewer than its settings ask for")

    with (
        torch.device("meta"),
        register_module_parameter_registration_hook(count),
        register_module_module_registration_hook(count),
    ):
        return {key: value.shape for key, value in VAE(**settings).state_dict().items()}


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of an older format as today's code would have saved it."""
    if content["betavae_format"] == 1:
        # The sums of an epoch under way were the module's.
        interval, images, epoch, epoch_images = content.pop("running_sums")

        def named(sums: Tensor) -> dict[str, Tensor]:
            loss, recon, kl = sums
            return {"loss": loss, "recon": recon, "kl": kl, "neg_elbo": recon + kl}

        content["callbacks"]["Curves"] = {
            "interval": [[named(sums) for sums in interval], images],
            "epoch": named(epoch) if epoch_images else {},
            "epoch_images": epoch_images,
        }
    return content


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class SafeCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, and are read as `read` does."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read(Path(path))


def save(content: dict[str, Any], path: str | Path) -> None:
    """As one whole file. Raises UserError if it cannot be written."""
    buffer = io.BytesIO()
    torch.save(content, buffer)  # in memory first, because torch hides what a disk says
    try:
        write_whole(Path(path), buffer.getvalue())
    except OSError as error:
        raise UserError(f"could not save {path} ({error.strerror}); the checkpoint before it is untouched") from error
