"""Load a trained model from its checkpoint without Lightning.

This runs no code that the file names.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from betavae.data.file_listing import as_text
from betavae.data.holdout import SPLIT_SEED
from betavae.data.image_set import ImageSet
from betavae.data.loader import BYTES, binarize_images
from betavae.data.scaling import Scaling
from betavae.data.source import DataSource
from betavae.errors import UserError, first_line
from betavae.models.vae import VAE, Posterior
from betavae.runtime.plugins import describe_missing, load_plugins
from betavae.runtime.run_folder import read_json
from betavae.runtime.settings import Config, check_group
from betavae.storage.files import atomic_write_bytes
from betavae.storage.torch_file import load_torch_file

Checkpoint = dict[str, Any]  # tensors and plain values
FORMAT = 5  # checkpoints of another format are rejected
MAX_PARTS = 20  # modules and parameters of a network, per weight in its checkpoint


class TrainedRun(NamedTuple):
    """A trained VAE in evaluation mode, and the settings that its checkpoint stores."""

    vae: VAE
    path: Path
    settings: Config  # the arguments of VAEModule
    data: Config  # the arguments of ImageDataModule
    fingerprints: dict[str, str] = {}  # noqa: RUF012 - of each split whose images can change
    columns: list[str] | None = None  # of a model of a table
    scaling: Scaling = BYTES  # from stored values to those that the model sees; bytes if the checkpoint has none
    caption: str = ""  # for figures: the run, its epoch and its validation neg. ELBO

    @property
    def folder(self) -> Path:
        """The run folder, or the folder of a checkpoint outside of one."""
        return self.path.parent.parent if self.path.parent.name == "checkpoints" else self.path.parent

    @property
    def item(self) -> str:
        """The word for one input: "image", or "row" of a table."""
        return "image" if self.columns is None else "row"

    def data_source(self, root: str | None = None) -> DataSource:
        """Return the data that the model was trained on.

        Args:
            root: The folder of the data, if not that of the training.

        Raises:
            UserError: If that folder does not exist.
        """
        known, name = self.data["root"], self.data["name"]
        # The package contains MNIST and generates the sprites.
        if not root and not Path(known).expanduser().exists() and name not in ("mnist", "sprites"):
            raise UserError(
                f"{self.path} was trained on data={name} in {known}, which does not exist in {Path.cwd()}; pass "
                "data_root=PATH"
            )
        return DataSource.from_checkpoint(self.data, root)

    def images(
        self, split: str = "test", root: str | None = None, max_images: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the images of a split as the model sees them.

        Args:
            split: "train", "validation" or "test".
            root: The folder of the data, if not that of the training.
            max_images: The number of images to choose from a fixed seed, if there are more.

        Returns:
            Images `(N, C, H, W)` scaled as in training, of dynamically binarized ones one draw, and their labels.
        """
        images = self.subset(split, root, max_images)
        return self.scaling.apply(images.pixels), images.labels

    def require_images(self, what: str) -> None:
        """Raise UserError for a model of a table."""
        if self.columns is not None:
            raise UserError(f"{self.path} is a model of a table, and {what} needs a model of images")

    def encode(self, values: Tensor, labels: Tensor | None = None) -> Posterior:
        """Return the posterior of stored values `(B, C, H, W)`.

        A conditional model needs their `labels` `(B,)`.
        """
        return self.vae.given(labels).encode(self.scaling.apply(values))

    def decode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the means of p(x|z), `(..., C, H, W)`, in the units of the stored values.

        `labels` are as in `encode`.
        """
        return self.scaling.invert(self.vae.given(labels).decode(z))

    def split(self, split: str, root: str | None = None) -> ImageSet:
        """Return the stored images of a split, for evaluation binarized as in training.

        Raises:
            UserError: If they have changed since the training.
        """
        source = self.data_source(root)
        images = source.load_split("test") if split == "test" else source.load_training()[split]
        found = source.fingerprints(split, images, bool(self.vae.classes))
        if changed := [name for name in found if found[name] != self.fingerprints.get(name)]:
            what, so = f"{split} images", "images that it has seen could count as unseen"
            if split not in changed:
                what, so = changed[0], "they may be wrong for the images"
            raise UserError(
                f"{source.root}: the {what} have changed since {self.path} was trained, so {so}; restore the data or "
                "pass a copy by data_root=PATH, or pass other images by images=PATH if the command takes it"
            )
        return images if split == "train" else source.binarize_for_eval(images, self.scaling)

    def subset(self, split: str, root: str | None = None, max_images: int | None = None) -> ImageSet:
        """Return the stored values of `images` as an `ImageSet` in memory."""
        images = self.split(split, root)
        if max_images is not None and len(images) > max_images:
            chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))[:max_images]
            images = images.select(chosen.sort().values)
        if split == "train" and self.data["binarize"] != "none":
            return binarize_images(images, self.data["binarize"], self.scaling)
        return replace(images, pixels=images.tensor())


def find_checkpoint(folder: Path) -> Path | None:
    """Return the best checkpoint of a run folder, else its last one, else None."""
    paths = [folder / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
    return next((path for path in paths if path.exists()), None)


def latest_run(runs: Path) -> Path:
    """Return the run folder that finished last, also among the jobs of sweeps."""
    found = [path for path in runs.rglob("metrics.json") if read_json(path).get("status") == "finished"]
    for metrics in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        if find_checkpoint(metrics.parent):
            return metrics.parent
    raise UserError(f"no finished run in {runs}/; train one by `python train.py`, or pass ckpt=PATH")


def load(ckpt: str | Path | None = None, runs: str = "runs", plugins: Sequence[str] = ()) -> TrainedRun:
    """Load a trained model to the CPU.

    Args:
        ckpt: A checkpoint file, or a run folder, for its best checkpoint or else its last one.
        runs: Without `ckpt`, the folder in which the newest finished run is loaded.
        plugins: Modules to import first, besides the installed plugins, as the setting `plugins` does.

    Raises:
        UserError: If the file is not a complete checkpoint of betavae.
    """
    load_plugins(plugins)
    path = Path(ckpt).expanduser() if ckpt else latest_run(Path(runs).expanduser())
    path = find_checkpoint(path) or path
    content = read_checkpoint(path)
    if path.parent == Path() and Path.cwd().name == "checkpoints":
        path = path.absolute()  # its run folder is above the current folder
    settings, data = content["hyper_parameters"], content["datamodule_hyper_parameters"]
    vae = VAE(**settings["model"])
    vae.load_state_dict({key.removeprefix("vae."): value for key, value in content["state_dict"].items()})
    vae = vae.eval().requires_grad_(False)
    scaling = Scaling.from_dict(content["scaling"], vae.image_shape[0]) if "scaling" in content else BYTES
    fingerprints, columns = content.get("fingerprints", {}), content.get("columns")
    return TrainedRun(vae, path, settings, data, fingerprints, columns, scaling, format_caption(path, content))


def load_weights(vae: VAE, ckpt: str, model: Config) -> None:
    """Load the weights of a trained model into one of the same shapes.

    Args:
        vae: The model to change.
        ckpt: A checkpoint file or a run folder.
        model: The settings of `vae`.

    Raises:
        UserError: If the file is not a checkpoint, or its weights have other names or shapes.
    """
    path = find_checkpoint(Path(ckpt).expanduser()) or Path(ckpt).expanduser()
    try:
        content = read_checkpoint(path)
    except UserError as error:
        raise UserError(f"init_from{str(error).removeprefix('ckpt')}") from error
    weights = {key.removeprefix("vae."): value for key, value in content["state_dict"].items()}
    if {key: value.shape for key, value in weights.items()} != {k: v.shape for k, v in vae.state_dict().items()}:
        saved = content["hyper_parameters"]["model"]
        keys = [key for key in {**saved, **model} if saved.get(key) != model.get(key)]
        theirs, ours = (", ".join(f"{key}={group.get(key)}" for key in keys) for group in (saved, model))
        raise UserError(f"init_from: the weights of {path} do not fit: its model has {theirs}, and this run's {ours}")
    vae.load_state_dict(weights)


def format_caption(path: Path, content: Checkpoint) -> str:
    """Format the run of a checkpoint, its epoch and its validation neg. ELBO, as far as they are known."""
    path = path.resolve()
    caption = as_text(path.parent.parent.name if path.parent.name == "checkpoints" else path.name)
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        caption += f", epoch {content['epoch'] + 1:d}"
        neg_elbo = content["callbacks"]["LastValidationMetrics"]["metrics"]["neg_elbo"]
        caption += f", validation neg. ELBO {neg_elbo:.2f} nats"
        settings, data = content["hyper_parameters"], content["datamodule_hyper_parameters"]
        if settings["model"]["likelihood"] == "bernoulli" and data["binarize"] == "none":
            caption += " (surrogate)"
    return caption


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint: tensors and plain values, with exactly the weights that its settings describe.

    Raises:
        UserError: If the file is anything else.
    """
    if not path.exists():
        raise UserError(f"ckpt: {path} does not exist; pass a .ckpt file or a run folder")
    if path.is_dir():
        raise UserError(f"ckpt: {path} is a folder without checkpoints/best.ckpt or checkpoints/last.ckpt")
    try:
        content = load_torch_file(path)
    except Exception as error:
        raise UserError(f"ckpt: {path} is damaged or not a checkpoint ({first_line(error)[:120]})") from error
    written = content.get("betavae_format") if isinstance(content, dict) else None
    if not isinstance(written, int):
        raise UserError(f"ckpt: {path} is not a checkpoint of betavae")
    if written != FORMAT:
        remedy = "update betavae" if written > FORMAT else "train the model again"
        raise UserError(f"ckpt: {path} has format {written}, and this betavae reads format {FORMAT}; {remedy}")
    settings, data = content.get("hyper_parameters"), content.get("datamodule_hyper_parameters")
    model: Any = settings.get("model") if isinstance(settings, dict) else None
    if not all(isinstance(group, dict) for group in (model, data, content.get("fingerprints", {}))):
        raise UserError(f"ckpt: {path} is not a checkpoint of betavae")
    try:
        derived = ("image_shape", "prior", "classes")  # not settings of the group `model`
        plain = {key: value for key, value in model.items() if key not in derived}
        check_group("model", plain | {"conditional": "classes" in model})
        check_group("prior", model.get("prior", {"name": "standard"}))
        check_group("data", data)
        classes = model.get("classes", [""])
        if not (isinstance(classes, list) and {type(name) for name in classes} == {str}):
            raise ValueError("its classes are not a list of names")
        check_weights(content["state_dict"], model, data)
        if "scaling" in content:
            Scaling.from_dict(content["scaling"], model["image_shape"][0])
        columns = content.get("columns") or []
        if (columns and [len(columns), 1, 1] != list(model["image_shape"])) or {type(name) for name in columns} - {str}:
            raise ValueError("its columns are not those of its table")
    except Exception as error:
        if missing := describe_missing(content.get("plugins")):
            raise UserError(f"ckpt: {path} was {missing} ({first_line(error)})") from error
        raise UserError(f"ckpt: {path} is not a valid checkpoint: {first_line(error)}") from error
    return content


def check_weights(state_dict: dict[str, Tensor], model: Config, data: Config) -> None:
    """Raise ValueError if weights or image sizes do not match their settings."""
    weights = {key.removeprefix("vae."): value.shape for key, value in state_dict.items()}
    if "image_shape" not in model:
        raise ValueError("it has no image_shape")
    if weights != model_shapes(model, MAX_PARTS * len(weights)):
        raise ValueError("its weights do not match its settings")
    if data.get("name") == "folder":  # whose images are resized to this size
        size = data["image_size"]
        if list(model["image_shape"][1:]) != ([size, size] if isinstance(size, int) else list(size)):
            raise ValueError(f"data.image_size={size} is not the size of the model's images")


def model_shapes(settings: Config, limit: int) -> dict[str, torch.Size]:
    """Return the shapes of the weights of a VAE, without memory for them.

    Raises:
        ValueError: If it has more than `limit` modules and parameters.
    """
    parts = 0

    def count(*registered: object) -> None:
        nonlocal parts
        parts += 1
        if parts > limit:
            raise ValueError("it has fewer weights than its settings describe")

    with (
        torch.device("meta"),
        register_module_parameter_registration_hook(count),
        register_module_module_registration_hook(count),
    ):
        return {key: value.shape for key, value in VAE(**settings).state_dict().items()}


def save_checkpoint(content: Checkpoint, path: str | Path) -> None:
    """Write a checkpoint atomically. Raise UserError if the disk is full or not writable."""
    buffer = io.BytesIO()
    torch.save(content, buffer)  # in memory first, because torch hides the error of a disk
    try:
        atomic_write_bytes(Path(path), buffer.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); the previous checkpoint is intact") from error
