"""What a person sees while it trains: pictures, the bar or the lines in the terminal."""

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

from betavae import plotting
from betavae.models.vae import VAE
from betavae.objectives.elbo import gaussian_kl
from betavae.runtime.run_logger import run_loggers
from betavae.runtime.terminal_log import warn_on_error

log = logging.getLogger(__name__)
SHOWN = ("recon", "kl")  # after the loss, on a line of an epoch; an objective's own terms follow
EMBEDDED = 2000  # test images in the embedding projector
PART = 500  # images at once
DISPLAY_NAMES = {"kl": "KL", "neg_elbo": "neg. ELBO"}


class ImageLogger(Callback):
    """Draw every `every` epochs (0: never), and once more when `finish` is called after the test.

    Reconstructions of fixed test images, samples from fixed z, a latent traversal, KL per dimension, in two dimensions
    the manifold; after the test also the embedding projector, and the pictures as files in `folder`. A picture that
    fails is a warning.
    """

    def __init__(self, every: int, folder: Path):
        self.every, self.folder = every, folder

    def images(self, trainer: L.Trainer, vae: VAE, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the first `most` test images in parts, on the device and in the dtype of the weights, with labels."""
        test = trainer.datamodule.splits["test"]  # type: ignore[attr-defined]
        for index in torch.arange(min(most, len(test))).split(PART):
            x = test.pixels.index_select(0, index).float() / 255
            yield x.to(next(vae.parameters())), test.labels[index]

    def draw(self, trainer: L.Trainer, vae: VAE) -> tuple[dict[str, Tensor], Tensor]:
        """`name -> (C, H, W)` in [0, 1], and the KL per latent dimension in nats."""
        kl = torch.cat([gaussian_kl(vae.encode(x)) for x, _ in self.images(trainer, vae, 1000)]).mean(0).cpu()
        x, _ = next(self.images(trainer, vae, 16))
        z = torch.randn(64, vae.latent_dim, generator=torch.Generator().manual_seed(0)).to(x.device)
        by_kl = kl.argsort(descending=True).tolist()[:10]
        span = torch.linspace(-3, 3, 11, device=x.device)
        rows = plotting.traversal(vae, vae.encode(x[:1]).mean[0], by_kl, span)
        drawn = {
            "reconstructions": plotting.make_grid(plotting.reconstructions(vae, x), 8),
            "samples": plotting.make_grid(vae.decode(z), 8),
            "traversal": plotting.make_grid(rows, len(span)),
        }
        if vae.latent_dim == 2:
            drawn["manifold"] = plotting.make_grid(plotting.manifold(vae, 20), 20)
        return drawn, kl

    @torch.no_grad()
    def show(self, trainer: L.Trainer, vae: VAE, final: bool) -> None:
        drawn: dict[str, Tensor] = {}
        with evaluating(vae), warn_on_error("drawing pictures of the model"):
            drawn, kl = self.draw(trainer, vae)
        for logger in run_loggers(trainer) if drawn else []:
            with warn_on_error(f"sending pictures to {type(logger).__name__}"):
                for name, picture in drawn.items():
                    logger.log_image_grid(name, picture, trainer.global_step)
                logger.log_figure("latent/kl_per_dimension", plotting.kl_bar_figure(kl), trainer.global_step)
        if not final:
            return
        with warn_on_error(f"writing pictures to {self.folder}"):
            for name, picture in drawn.items():
                plotting.save_image(picture, self.folder / f"{name}.png")
        with evaluating(vae), warn_on_error("drawing the embedding projector"):
            n = min(EMBEDDED, len(trainer.datamodule.splits["test"]))  # type: ignore[attr-defined]
            side = plotting.MAX_SPRITE_SIDE // math.ceil(math.sqrt(n))
            parts = [
                (vae.encode(x).mean.cpu(), labels, plotting.tiles(x.float().cpu(), labels, side))
                for x, labels in self.images(trainer, vae, n)
            ]
            means, labels, tiles = zip(*parts, strict=True)
            for logger in run_loggers(trainer):
                logger.log_embedding(torch.cat(means), torch.cat(labels).tolist(), torch.cat(tiles))

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if self.every and epoch % self.every == 0 and epoch != trainer.max_epochs and trainer.is_global_zero:
            self.show(trainer, module.vae, final=False)  # type: ignore[arg-type]

    def finish(self, trainer: L.Trainer, vae: VAE) -> None:
        """Draw everything, once the numbers of the run are on disk."""
        with warn_on_error("drawing pictures of the model"):
            vae.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
        self.show(trainer, vae, final=True)


@contextlib.contextmanager
def evaluating(vae: VAE) -> Iterator[None]:
    """Put the model into evaluation mode, and each of its modules back into the mode it had."""
    modes = [(module, module.training) for module in vae.modules()]
    vae.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def display_metrics(metrics: dict[str, Any], split: str) -> dict[str, float]:
    """The loss, recon, kl, and an objective's own terms, as they were last logged for a split."""
    named = {name.removeprefix(f"{split}/"): float(value) for name, value in metrics.items() if name.startswith(split)}
    return {name: value for name, value in named.items() if name != "neg_elbo"}


class EpochProgressBar(TQDMProgressBar):
    """The progress bar of a terminal: one line an epoch."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=20, leave=True)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        numbers = {name: f"{value:.2f}" for name, value in display_metrics(trainer.callback_metrics, "train").items()}
        if "val/neg_elbo" in trainer.callback_metrics:
            numbers["val neg. ELBO"] = f"{trainer.callback_metrics['val/neg_elbo']:.2f}"
        return numbers

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.train_progress_bar.n == 0:  # a first one that Lightning opens, and would leave behind empty
            self.train_progress_bar.leave = False
            self.train_progress_bar.close()
        super().on_train_epoch_start(trainer, *args)

    # Validation and test would flash by for a tenth of a second each.
    def init_validation_tqdm(self) -> Any:
        return Tqdm(disable=True)

    init_test_tqdm = init_validation_tqdm


class LastValidationMetrics(Callback):
    """The last validation numbers, by name; each checkpoint has its own."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        named = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.numbers = {name.removeprefix("val/"): value for name, value in named.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"numbers": self.numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.numbers = dict(state["numbers"])


class EpochSummary(Callback):
    """One line per epoch, for the log file and for a terminal that is not one; and the seconds, over all sessions."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.before = 0.0  # seconds of earlier sessions, up to the checkpoint that this one goes on from
        self.began = time.perf_counter()  # where a run goes on after its last epoch, no training starts

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.began = self.started = time.perf_counter()  # also of an epoch that a resumed run goes on with

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
