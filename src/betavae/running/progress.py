"""What a person sees while it trains: pictures, the bar or the lines in the terminal."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from betavae import pictures
from betavae.curves import Curves
from betavae.running.run_logger import loggers_of
from betavae.terms import gaussian_kl

log = logging.getLogger(__name__)
SHOWN = ("recon", "kl")  # after the loss, on a line of an epoch; an objective's own terms follow
NAMES = {"kl": "KL", "neg_elbo": "neg. ELBO"}


class Pictures(Callback):
    """Every `every` epochs (0: never) and after the test: reconstructions of fixed test images, samples from fixed z, a
    latent traversal, KL per dimension, in two dimensions the manifold; after the test also the embedding projector, and
    the pictures as files in `folder`."""

    def __init__(self, every: int, folder: Path):
        self.every, self.folder = every, folder

    @torch.no_grad()
    def draw(self, trainer: L.Trainer, vae: Any) -> tuple[dict[str, Tensor], Tensor]:
        """`name -> (C, H, W)` in [0, 1], and the KL per latent dimension in nats."""
        device = next(vae.parameters()).device
        test = trainer.datamodule.sets["test"]  # type: ignore[attr-defined]
        images = test.pixels.index_select(0, torch.arange(min(1000, len(test)))).to(device).float() / 255
        z = torch.randn(64, vae.latent_dim, generator=torch.Generator().manual_seed(0)).to(device)
        kl = gaussian_kl(vae.encode(images)).mean(0).cpu()
        span = torch.linspace(-3, 3, 11, device=device)
        by_kl = kl.argsort(descending=True).tolist()[:10]
        rows = pictures.traversal(vae, vae.encode(images[:1]).mean[0], by_kl, span)
        drawn = {
            "reconstructions": pictures.grid(pictures.reconstructions(vae, images[:16]), 8),
            "samples": pictures.grid(vae.decode(z), 8),
            "traversal": pictures.grid(rows, len(span)),
        }
        if vae.latent_dim == 2:
            drawn["manifold"] = pictures.grid(pictures.manifold(vae, 20), 20)
        return drawn, kl

    def show(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Tensor]:
        drawn, kl = self.draw(trainer, module.vae)
        for logger in loggers_of(trainer):
            for name, picture in drawn.items():
                logger.log_picture(name, picture, trainer.global_step)
            logger.log_figure("latent/kl_per_dimension", pictures.kl_bars(kl), trainer.global_step)
        return drawn

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if self.every and epoch % self.every == 0 and epoch != trainer.max_epochs and trainer.is_global_zero:
            self.show(trainer, module)

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for name, picture in self.show(trainer, module).items():
            pictures.save_picture(picture, self.folder / f"{name}.png")
        test = trainer.datamodule.sets["test"]  # type: ignore[attr-defined]
        x = test.pixels.index_select(0, torch.arange(min(2000, len(test)))).to(module.device).float() / 255
        labels = test.labels[: len(x)]
        with torch.no_grad():
            means = module.vae.encode(x).mean.cpu()  # type: ignore[operator,union-attr]
        for logger in loggers_of(trainer):
            logger.log_embedding(means, labels.tolist(), pictures.coloured(x.cpu(), labels))


def shown(metrics: dict[str, Any], split: str) -> dict[str, float]:
    """The loss, recon, kl, and an objective's own terms, as they were last logged for a split."""
    named = {name.removeprefix(f"{split}/"): float(value) for name, value in metrics.items() if name.startswith(split)}
    return {name: value for name, value in named.items() if name != "neg_elbo"}


class Bar(TQDMProgressBar):
    """The progress bar of a terminal: one line an epoch."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=20, leave=True)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        numbers = {name: f"{value:.2f}" for name, value in shown(trainer.callback_metrics, "train").items()}
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


class ValidationNumbers(Callback):
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


class EpochLines(Callback):
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
        next(c for c in trainer.callbacks if isinstance(c, Curves)).end_epoch(trainer, module)  # type: ignore[attr-defined]
        line = f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}"
        for name, value in shown(trainer.callback_metrics, "epoch").items():
            line += f"  {NAMES.get(name, name)} {value:.2f}"
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
