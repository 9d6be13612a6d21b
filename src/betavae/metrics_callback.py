"""Averages over images: summed where they are computed, read seldom, logged by name."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from betavae.models.precision import to_float64


class MetricAccumulator:
    """Named sums over the images of each training batch, kept on the device until they are read.

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

    def reduce_rows(self, trainer: L.Trainer) -> Tensor:
        """Sum over all processes, which have equally many batches, in one reduction.

        Returns: float64 `(batches, 1 + terms)` on the CPU, the number of images first.
        """
        flat = torch.stack([value for batch in self.batches for value in batch.values()]).view(len(self), -1)
        images = torch.tensor(self.images, dtype=flat.dtype, device=flat.device)
        reduce_rows: Any = trainer.strategy.reduce(torch.cat((images[:, None], flat), 1), reduce_op="sum")
        return reduce_rows.cpu().double()


class Totals:
    """Named sums, of any shape, over all images of an evaluation, in double precision."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.images = 0

    def add(self, sums: dict[str, Tensor], images: int) -> None:
        self.sums |= {name: self.sums.get(name, 0) + to_float64(value) for name, value in sums.items()}
        self.images += images

    def gather(self, trainer: L.Trainer) -> tuple[dict[str, Tensor], int]:
        """Add up the sums and the numbers of images of all processes; one without an image has no terms."""
        own: Any = ({name: value.cpu() for name, value in self.sums.items()}, self.images)
        parts = [own] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, own)
        total = Totals()
        for part in parts:
            total.add(*part)
        return total.sums, total.images


class TrainMetrics(Callback):
    """The terms of training for every logger, `train/NAME`: means over the images of `log_every_n_steps` steps.

    `trainer.callback_metrics` has them too, and beside them the means of the epoch so far as `epoch/NAME`. A training
    step hands the sums of its batches over as `outputs["sums"]`.
    """

    def __init__(self) -> None:
        self.window = MetricAccumulator()
        self.epoch: dict[str, Tensor] = {}
        self.epoch_images = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.window.to(module.device)  # a checkpoint is read on the CPU

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for sums, images in outputs["sums"]:
            self.window.add(sums, images)
        if trainer.is_last_batch or len(self.window) >= trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self.log_window(trainer, module)

    def read(self, trainer: L.Trainer, module: L.LightningModule) -> tuple[list[str], Tensor]:
        """Reduce the rows of the interval so far, and pass them to every callback with `on_train_sums`.

        Returns: the names of the terms, and `Sums.reduce_rows`.
        """
        names, rows = list(self.window.batches[0]), self.window.reduce_rows(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hook := getattr(callback, "on_train_sums", None):
                hook(trainer, module, names, rows)
        return names, rows

    def log_window(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        names, rows = self.read(trainer, module)
        self.window = MetricAccumulator()
        count, *totals = rows.sum(0)
        sums, images = dict(zip(names, totals, strict=True)), int(count)
        self.epoch = {name: self.epoch.get(name, 0) + value for name, value in sums.items()}
        self.epoch_images += images
        means = {f"train/{name}": value / images for name, value in sums.items()}
        trainer.callback_metrics.update(means)
        self.publish_epoch_means(trainer)
        scalars = {name: value.item() for name, value in means.items()}
        scalars["train/beta"] = module.current_beta()  # type: ignore[operator]
        scalars["train/learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        for logger in trainer.loggers:
            logger.log_metrics(scalars, trainer.global_step)

    def publish_epoch_means(self, trainer: L.Trainer) -> None:
        means = {f"epoch/{name}": value / self.epoch_images for name, value in self.epoch.items()}
        trainer.callback_metrics.update(means)

    def flush_epoch(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Also where `max_steps` or early stopping ends it before its last batch; for callbacks that come earlier."""
        if len(self.window):
            self.log_window(trainer, module)
        self.publish_epoch_means(trainer)
        self.epoch, self.epoch_images = {}, 0

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.flush_epoch(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        interval = [self.window.batches, self.window.images]
        return {"interval": interval, "epoch": self.epoch, "epoch_images": self.epoch_images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.window.batches, self.window.images = (list(part) for part in state["interval"])
        self.epoch, self.epoch_images = state["epoch"], state["epoch_images"]
