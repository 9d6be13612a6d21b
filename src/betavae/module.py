"""`VAEModule`: the VAE and its loss as a LightningModule. Everything it counts is in nats per image."""

from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from betavae.errors import UserError
from betavae.metrics_callback import Totals, TrainMetrics
from betavae.models.vae import VAE
from betavae.objectives import build_objective
from betavae.objectives.elbo import ACTIVE_UNIT_THRESHOLD
from betavae.objectives.schedules import BETA_SCHEDULES
from betavae.optim import lr_factor, optimizer_class

EVALUATION_SEED = 0
TEST_DRAWS = 4  # of z per image in a test: one draw alone moves the mean over 10,000 images by about 0.05 nats


class VAEModule(L.LightningModule):
    """A VAE, its objective, its optimiser. All arguments are plain values: a checkpoint holds them, and is the recipe.

    `model` is what `VAE` takes. `objective` is a name in `OBJECTIVES`, the number `k` of posterior samples, and what
    else `objectives.chosen` takes; `beta_schedule` and `lr_schedule` are names with their settings, and `optimizer` is
    the name of a class in torch.optim with its arguments.
    """

    def __init__(
        self,
        model: dict[str, Any],
        objective: dict[str, Any],
        beta: float,
        beta_schedule: dict[str, Any],
        optimizer: dict[str, Any],
        lr_schedule: dict[str, Any],
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.vae = VAE(**model)
        self.k, self.objective = objective["k"], build_objective(objective)
        self.beta, self.total_steps = beta, 0.0
        self.beta_factor = partial(BETA_SCHEDULES[beta_schedule["name"]], **without(beta_schedule, "name"))

    def forward(self, x: Tensor) -> Tensor:
        return self.vae.reconstruct(x)

    def loss(self, x: Tensor, noise: Tensor, beta: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What torch.compile may compile: the loss, and each term summed over the batch."""
        terms = self.objective(self.vae, x, noise, beta)
        return terms.loss, terms.batch_sums()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, _ = batch
        noise = torch.randn(self.k, len(x), self.vae.latent_dim, dtype=x.dtype, device=x.device)
        # A tensor, since for another number torch.compile would compile again.
        beta = torch.full((), self.current_beta(), dtype=x.dtype, device=x.device)
        loss, sums = self.loss(x, noise, beta)
        return {"loss": loss, "sums": [(sums, len(x))]}

    def configure_callbacks(self) -> list[Any]:
        return [TrainMetrics()]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch[0], draws=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch[0], TEST_DRAWS)

    def on_validation_epoch_start(self) -> None:
        # The same noise at every evaluation, so that two epochs differ by their weights alone.
        self.evaluation, self.generator = Totals(), torch.Generator().manual_seed(EVALUATION_SEED)

    def evaluate(self, x: Tensor, draws: int) -> None:
        """Add the terms at the full beta, so that losses of two epochs compare the models and not the schedule."""
        if not len(x):
            return
        size = draws * self.k * self.vae.latent_dim
        # Rows of whole sixteens: torch draws normals in blocks of 16, so no image's noise depends on the batch size.
        # Nor on the number of processes: each takes the rows of its own images.
        processes, rank = self.trainer.world_size, self.trainer.global_rank
        noise = torch.randn(len(x) * processes, -(-size // 16) * 16, generator=self.generator, dtype=x.dtype)
        for draw in noise[rank::processes, :size].to(x).view(len(x), draws, self.k, -1).permute(1, 2, 0, 3):
            terms = self.objective(self.vae, x, draw, self.beta)
            mean = terms.posterior.mean
            self.evaluation.add(terms.batch_sums() | {"mean": mean.sum(0), "square": (mean**2).sum(0)}, len(x))

    def on_validation_epoch_end(self, split: str = "val") -> None:
        """Means over all images of all processes, and the number of active units."""
        sums, images = self.evaluation.gather(self.trainer)
        variance = sums.pop("square") / images - (sums.pop("mean") / images) ** 2
        means = {f"{split}/{name}": value / images for name, value in sums.items()}
        means[f"{split}/active_units"] = (variance > ACTIVE_UNIT_THRESHOLD).sum().double()
        # For callbacks; loggers get it with the step, where `log_dict` would give them a second curve of epoch numbers.
        self.log_dict({name: value.float() for name, value in means.items()}, logger=False)
        for logger in self.loggers:
            logger.log_metrics({name: value.item() for name, value in means.items()}, self.global_step)

    on_test_epoch_start = on_validation_epoch_start

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end("test")

    def current_beta(self) -> float:
        """Beta at the global step of a training."""
        return self.beta * self.beta_factor(self.global_step, self.total_steps)

    def configure_optimizers(self) -> Any:
        self.total_steps = self.count_steps()
        name, settings = self.hparams["optimizer"]["name"], without(self.hparams["optimizer"], "name")
        try:
            optimizer = optimizer_class(name)(self.parameters(), **settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer: {name} does not take {settings} ({error})") from error
        schedule = self.hparams["lr_schedule"]
        if schedule["name"] == "constant" and not schedule["warmup"]:
            return optimizer
        factor = partial(lr_factor, total_steps=self.total_steps, **schedule)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def count_steps(self) -> float:
        """The optimiser steps of the whole training."""
        return self.trainer.estimated_stepping_batches


def without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}
