"""Averages over images: summed where they are computed, read seldom, logged by name."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class Sums:
    """Sums over images of named terms of any shape, kept on the device until they are read.

    Reading, or `self.log`, at every step would cost a third of an epoch.
    """

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.images: list[int] = []

    def __len__(self) -> int:
        return len(self.batches)

    def add(self, sums: dict[str, Tensor], images: int) -> None:
        self.batches.append(sums)
        self.images.append(images)

    def to(self, device: torch.device) -> None:
        self.batches = [{name: value.to(device) for name, value in batch.items()} for batch in self.batches]

    def rows(self, trainer: L.Trainer) -> Tensor:
        """Empties it: a row per batch, summed over all processes, in double precision on the CPU. In it the number of
        images, and then every number of every term."""
        flat = torch.cat([value.reshape(-1) for batch in self.batches for value in batch.values()])
        flat = flat.view(len(self), -1)
        images = torch.tensor(self.images, dtype=flat.dtype, device=flat.device)
        self.batches, self.images = [], []
        rows: Any = trainer.strategy.reduce(torch.cat((images[:, None], flat), 1), reduce_op="sum")
        return rows.cpu().double()

    def take(self, trainer: L.Trainer) -> tuple[dict[str, Tensor], int]:
        """Empties it: the sums over all batches, and how many images they are over."""
        shapes = {name: value.shape for name, value in self.batches[0].items()}
        total = self.rows(trainer).sum(0)
        parts = total[1:].split([shape.numel() for shape in shapes.values()])
        sums = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return sums, int(total[0])


class Curves(Callback):
    """The terms of training for every logger, `train/NAME`: means over the images of `log_every_n_steps` steps.

    `trainer.callback_metrics` has them too, and beside them the means of the epoch so far as `epoch/NAME`. A training
    step hands the sums of its batches over as `outputs["sums"]`.
    """

    def __init__(self) -> None:
        self.interval = Sums()
        self.epoch: dict[str, Tensor] = {}
        self.epoch_images = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.interval.to(module.device)  # a checkpoint is read on the CPU

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for sums, images in outputs["sums"]:
            self.interval.add(sums, images)
        if trainer.is_last_batch or len(self.interval) >= trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self.end_interval(trainer, module)

    def end_interval(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        sums, images = self.interval.take(trainer)
        self.epoch = {name: self.epoch.get(name, 0) + value for name, value in sums.items()}
        self.epoch_images += images
        means = {f"train/{name}": value / images for name, value in sums.items()}
        trainer.callback_metrics.update(means)
        self.tell_epoch(trainer)
        scalars = {name: value.item() for name, value in means.items()}
        scalars["train/beta"] = module.current_beta()  # type: ignore[operator]
        scalars["train/learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        for logger in trainer.loggers:
            logger.log_metrics(scalars, trainer.global_step)

    def tell_epoch(self, trainer: L.Trainer) -> None:
        means = {f"epoch/{name}": value / self.epoch_images for name, value in self.epoch.items()}
        trainer.callback_metrics.update(means)

    def end_epoch(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Also where `max_steps` or early stopping ends it before its last batch; for callbacks that come earlier."""
        if len(self.interval):
            self.end_interval(trainer, module)
        self.tell_epoch(trainer)
        self.epoch, self.epoch_images = {}, 0

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.end_epoch(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        interval = [self.interval.batches, self.interval.images]
        return {"interval": interval, "epoch": self.epoch, "epoch_images": self.epoch_images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.interval.batches, self.interval.images = (list(part) for part in state["interval"])
        self.epoch, self.epoch_images = state["epoch"], state["epoch_images"]
