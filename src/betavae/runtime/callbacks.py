"""The callbacks of a run that log, draw and report, and the registry of custom callbacks."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from betavae import grids, plotting
from betavae.data.labels import count_columns, cycle_labels
from betavae.data.scaling import Scaling
from betavae.grids import Grid
from betavae.models.vae import VAE, Posterior
from betavae.runtime.checkpoint import format_caption
from betavae.runtime.run_logger import run_loggers
from betavae.runtime.terminal_log import warn_on_error
from betavae.storage.torch_file import load_torch_file

log = logging.getLogger(__name__)
# Custom callbacks by name. A config gives each its arguments: `callbacks: {custom: {my_callback: {every: 2}}}`.
CALLBACKS: dict[str, type[Callback]] = {}
MAX_EMBEDDED = 2000  # test images in the embedding projector
BATCH_SIZE = 500  # of images that are encoded for a figure
DISPLAY_NAMES = {"kl": "KL", "neg_elbo": "neg. ELBO"}


class ImageLogger(Callback):
    """Draw the model every `every` epochs, and once more when `finish` is called after the test.

    With `every` 0 it draws only after the test. The figures are reconstructions of fixed test images, samples of the
    prior from a fixed seed, a latent traversal, the KL per dimension, for two dimensions the manifold, and after the
    test the embedding projector. A conditional model is shown with the labels of the images, in the traversal and the
    manifold that of the first image, and with a column of samples per class. After the test they are also written to
    `folder`. A figure that fails is a warning.
    """

    def __init__(self, every: int, folder: Path):
        self.every, self.folder = every, folder

    def images(self, trainer: L.Trainer, vae: VAE, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of the first `most` test images and their labels.

        The images have the device and dtype of the weights.
        """
        test = trainer.datamodule.splits["test"]  # type: ignore[attr-defined]
        for index in torch.arange(min(most, len(test))).split(BATCH_SIZE):
            x = trainer.datamodule.scaling.apply(test.pixels.index_select(0, index))  # type: ignore[attr-defined]
            yield x.to(next(vae.parameters())), test.labels[index]

    def draw(self, trainer: L.Trainer, vae: VAE) -> tuple[dict[str, Grid], Tensor]:
        """Return grids of images by name, none for a table, and the KL per latent dimension in nats."""
        encoded = [(labels, *vae.given(labels).encode(x)) for x, labels in self.images(trainer, vae, 1000)]
        labels, mean, logvar = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        kl = vae.given(labels).kl_per_dimension(Posterior(mean, logvar)).mean(0).cpu()
        if trainer.datamodule.splits["test"].columns is not None:  # type: ignore[attr-defined]
            return {}, kl
        x, labels = next(self.images(trainer, vae, 16))
        columns, first = count_columns(vae.classes, 8), vae.given(labels[:1])
        sampled = vae.given(cycle_labels(vae.classes[:columns], 8 * columns))
        samples = sampled.sample(8 * columns, generator=torch.Generator().manual_seed(0))
        span = torch.linspace(-3, 3, 11, device=x.device)
        figures = {
            "reconstructions": grids.make_reconstruction_grid(vae.given(labels), x),
            "samples": Grid(samples, columns, column_labels=vae.classes[:columns]),
            "traversal": grids.make_traversal_grid(first, first.encode(x[:1]).mean[0], span, kl, rows=10),
        }
        if vae.latent_dim == 2:
            figures["manifold"] = grids.make_manifold_grid(first, 20)
        scaling: Scaling = trainer.datamodule.scaling  # type: ignore[attr-defined]
        return {name: grid._replace(images=scaling.to_picture(grid.images)) for name, grid in figures.items()}, kl

    @torch.no_grad()
    def log_figures(self, trainer: L.Trainer, vae: VAE) -> dict[str, Grid]:
        """Draw the model and send the figures to every logger; return them, or nothing if drawing failed."""
        figures: dict[str, Grid] = {}
        kl = None
        with evaluating(vae), warn_on_error("drawing figures of the model"):
            figures, kl = self.draw(trainer, vae)
        for logger in run_loggers(trainer) if kl is not None else []:
            with warn_on_error(f"sending figures to {type(logger).__name__}"):
                for name, grid in figures.items():
                    picture = plotting.make_grid(grid.images, grid.columns)
                    logger.log_image_grid(name, picture, trainer.global_step)
                logger.log_figure("latent/kl_per_dimension", plotting.plot_kl(kl), trainer.global_step)
        return figures

    @torch.no_grad()
    def log_embedding(self, trainer: L.Trainer, vae: VAE) -> None:
        """Send the posterior means of test images to every logger."""
        test = trainer.datamodule.splits["test"]  # type: ignore[attr-defined]
        n = min(MAX_EMBEDDED, len(test))
        to_picture = trainer.datamodule.scaling.to_picture  # type: ignore[attr-defined]
        side = plotting.MAX_SPRITE_SIDE // math.ceil(math.sqrt(n))
        batches = []
        for x, labels in self.images(trainer, vae, n):
            # A row of a table is a square in the color of its label.
            has_pictures = test.columns is None and x.shape[1] in (1, 3)
            pictures = to_picture(x.float().cpu()).clamp(0, 1) if has_pictures else torch.ones(len(x), 1, 8, 8)
            means = vae.given(labels).encode(x).mean.cpu()
            batches.append((means, labels, plotting.make_tiles(pictures, labels, side)))
        means, names, tiles = (torch.cat(parts) for parts in zip(*batches, strict=True))
        for logger in run_loggers(trainer):
            logger.log_embedding(means, names.tolist(), tiles)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if self.every and epoch % self.every == 0 and epoch != trainer.max_epochs and trainer.is_global_zero:
            self.log_figures(trainer, module.vae)  # type: ignore[arg-type]

    def finish(self, trainer: L.Trainer, vae: VAE, checkpoint: Path) -> None:
        """Draw everything after the test metrics of a checkpoint are on disk."""
        with warn_on_error("drawing figures of the model"):
            vae.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
        figures = self.log_figures(trainer, vae)
        with warn_on_error(f"writing figures to {self.folder}"):
            caption = format_caption(checkpoint, load_torch_file(checkpoint))
            for name, grid in figures.items():
                grids.save_grids([grid], self.folder / f"{name}.png", f"{name} of {caption}")
        with evaluating(vae), warn_on_error("drawing the embedding projector"):
            self.log_embedding(trainer, vae)


@contextlib.contextmanager
def evaluating(vae: VAE) -> Iterator[None]:
    """Switch a model to evaluation mode, then restore the mode of each of its modules."""
    modes = [(module, module.training) for module in vae.modules()]
    vae.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def display_metrics(metrics: dict[str, Any], split: str) -> dict[str, float]:
    """Return the loss, recon, kl and an objective's own terms that were last logged for a split."""
    named = {name.removeprefix(f"{split}/"): float(value) for name, value in metrics.items() if name.startswith(split)}
    return {name: value for name, value in named.items() if name != "neg_elbo"}


class EpochProgressBar(TQDMProgressBar):
    """A progress bar with one line per epoch."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=20, leave=True)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = {name: f"{value:.2f}" for name, value in display_metrics(trainer.callback_metrics, "train").items()}
        if "val/neg_elbo" in trainer.callback_metrics:
            metrics["val neg. ELBO"] = f"{trainer.callback_metrics['val/neg_elbo']:.2f}"
        return metrics

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.train_progress_bar.n == 0:  # Lightning opens a first bar, and would leave it behind empty
            self.train_progress_bar.leave = False
            self.train_progress_bar.close()
        super().on_train_epoch_start(trainer, *args)

    # Bars of validation and test would flash by for a tenth of a second each.
    def init_validation_tqdm(self) -> Any:
        return Tqdm(disable=True)

    init_test_tqdm = init_validation_tqdm


class LastValidationMetrics(Callback):
    """The last validation metrics by name, also stored in each checkpoint."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        named = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.metrics = {name.removeprefix("val/"): value for name, value in named.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.metrics = dict(state["metrics"])


class EpochSummary(Callback):
    """One log line per epoch, and the seconds of the training over all its sessions."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.before = 0.0  # seconds of earlier sessions, up to the checkpoint of the resume
        self.began = time.perf_counter()  # no training starts if a run is resumed after its last epoch

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.began = self.started = time.perf_counter()  # a resumed epoch has no `on_train_epoch_start`

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.on_train_epoch_end()  # now, for the means of the whole epoch
        line = f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}"
        for name, value in display_metrics(trainer.callback_metrics, "epoch").items():
            line += f"  {DISPLAY_NAMES.get(name, name)} {value:.2f}"
        if "val/neg_elbo" in trainer.callback_metrics:
            line += f"  val neg. ELBO {trainer.callback_metrics['val/neg_elbo']:.2f}"
        self.epochs.append(round(time.perf_counter() - self.started, 3))
        log.info("%s  %.1f s", line, self.epochs[-1], extra={"epoch_line": True})

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.before, self.began = self.seconds, time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs, self.before = list(state["epochs"]), state["seconds"]
