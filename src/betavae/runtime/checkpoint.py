"""A path in, a ready model out, safely: nothing that a checkpoint names is ever run."""

import io
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

from betavae.data.holdout import SPLIT_SEED
from betavae.data.image_set import ImageSet
from betavae.data.loader import binarize_images
from betavae.data.source import DataSource
from betavae.errors import UserError
from betavae.models.vae import VAE
from betavae.runtime.run_folder import read_json
from betavae.runtime.settings import check_group
from betavae.storage.files import atomic_write_bytes
from betavae.storage.torch_file import load_torch_file

FORMAT = 4  # of a checkpoint; each format is read by the versions that write it
MAX_PARTS = 20  # modules and parameters of a network, per weight that its checkpoint holds


class TrainedRun(NamedTuple):
    """A trained VAE in evaluation mode, and what its checkpoint says about it."""

    vae: VAE
    path: Path
    settings: dict[str, Any]  # the arguments of VAEModule
    data: dict[str, Any]  # the arguments of ImageDataModule
    fingerprints: dict[str, str] = {}  # noqa: RUF012 - of each split, where its images can change

    @property
    def folder(self) -> Path:
        """The run folder; of a checkpoint that lies alone, the folder it lies in."""
        return self.path.parent.parent if self.path.parent.name == "checkpoints" else self.path.parent

    def data_source(self, root: str | None = None) -> DataSource:
        """The data it was trained on, in `root` (None: where they were then).

        Raises UserError if the checkpoint does not say which, or they are no longer there.
        """
        if not self.data:
            raise UserError(f"{self.path} does not say which data it was trained on, so it has no images")
        known, name = self.data["root"], self.data["name"]
        # MNIST and sprites come with the package.
        if not root and not Path(known).expanduser().exists() and name not in ("mnist", "sprites"):
            raise UserError(
                f"{self.path} was trained on data={name} in {known}, and there is nothing there now "
                f"(seen from {Path.cwd()}): say where it is, by data_root=PATH"
            )
        return DataSource.from_checkpoint(self.data, root)

    def images(
        self, split: str = "test", root: str | None = None, max_images: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images `(N, C, H, W)` in [0, 1] of "train", "validation" or "test", as the model sees them, and their labels;
        of dynamically binarised training images one draw, and of more than `most` that many, from a fixed seed."""
        images = self.subset(split, root, max_images)
        return images.pixels.float() / 255, images.labels

    def split(self, split: str, root: str | None = None) -> ImageSet:
        """The uint8 images of a split, those for evaluation binarised as in training.

        Raises UserError if they have changed since the training.
        """
        source = self.data_source(root)
        images = source.load_split("test") if split == "test" else source.load_training()[split]
        if source.fingerprint(images) != self.fingerprints.get(split):
            raise UserError(
                f"{source.root}: the {split} images have changed since {self.path} was trained, so images that it "
                "has seen could count as unseen; restore the data or pass a copy by data_root=PATH, or pass other "
                "images by images=PATH where the command takes it"
            )
        return images if split == "train" else source.binarize_for_eval(images)

    def subset(self, split: str, root: str | None = None, most: int | None = None) -> ImageSet:
        """The same in memory; of dynamically binarised training images one draw, and at most `most` images."""
        images = self.split(split, root)
        if most is not None and len(images) > most:
            chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))[:most]
            images = images.select(chosen.sort().values)
        if split == "train" and self.data["binarize"] != "none":
            return binarize_images(images, self.data["binarize"])
        return replace(images, pixels=images.tensor())


def latest_run(runs: Path) -> Path:
    """The run under `runs`, sweeps included, that finished last."""
    found = [path for path in runs.rglob("metrics.json") if read_json(path).get("status") == "finished"]
    for metrics in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        if any((metrics.parent / "checkpoints" / name).exists() for name in ("best.ckpt", "last.ckpt")):
            return metrics.parent
    raise UserError(f"no finished run under {runs}/: train one with `python train.py`, or name one with ckpt=PATH")


def load(ckpt: str | Path | None = None, runs: str = "runs") -> TrainedRun:
    """The run of the checkpoint file `ckpt` (a run folder will do too: its best, else its last; None: the newest
    finished run under `runs`), on the CPU.

    Raises UserError when the file is not a whole checkpoint of this project.
    """
    path = Path(ckpt).expanduser() if ckpt else latest_run(Path(runs).expanduser())
    if (path / "checkpoints").is_dir():
        path = next((p for n in ("best", "last") if (p := path / "checkpoints" / f"{n}.ckpt").exists()), path)
    content = read_checkpoint(path)
    settings, data = content["hyper_parameters"], content.get("datamodule_hyper_parameters", {})
    vae = VAE(**settings["model"])
    vae.load_state_dict({key.removeprefix("vae."): value for key, value in content["state_dict"].items()})
    vae = vae.eval().requires_grad_(False)
    return TrainedRun(vae, path, settings, data, content.get("fingerprints", {}))


def check_stored_settings(group: str, values: dict[str, Any], path: Path) -> None:
    """Raises UserError for a setting in the checkpoint `path` that is not valid."""
    try:
        check_group(group, values)
    except UserError as error:
        raise UserError(f"{path} holds a setting that cannot be: {error}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this project: tensors and plain values, with the weights that its settings describe."""
    if not path.exists():
        raise UserError(f"ckpt: {path} does not exist; name a .ckpt file or a run folder")
    if path.is_dir():
        raise UserError(f"ckpt: {path} is a folder without checkpoints/best.ckpt or checkpoints/last.ckpt")
    try:
        content = load_torch_file(path)
    except Exception as error:
        raise UserError(f"ckpt: {path} is damaged or not a checkpoint ({first_line(error)[:120]})") from error
    written = content.get("betavae_format") if isinstance(content, dict) else None
    if not isinstance(written, int):
        raise UserError(f"ckpt: {path} is a checkpoint, but not one of betavae")
    if written != FORMAT:
        remedy = "update betavae" if written > FORMAT else "train the model again"
        raise UserError(f"ckpt: {path} has format {written}, and this betavae reads format {FORMAT}; {remedy}")
    settings, data = content.get("hyper_parameters"), content.get("datamodule_hyper_parameters", {})
    model: Any = settings.get("model") if isinstance(settings, dict) else None
    if not all(isinstance(group, dict) for group in (model, data, content.get("fingerprints", {}))):
        raise UserError(f"ckpt: {path} is a checkpoint, but not one of betavae")
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
    return content


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


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class SafeCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, and are read as `read` does."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def save_checkpoint(content: dict[str, Any], path: str | Path) -> None:
    """As one whole file. Raises UserError if it cannot be written."""
    buffer = io.BytesIO()
    torch.save(content, buffer)  # in memory first, because torch hides what a disk says
    try:
        atomic_write_bytes(Path(path), buffer.getvalue())
    except OSError as error:
        raise UserError(f"could not save {path} ({error.strerror}); the checkpoint before it is untouched") from error
