"""`VAEModule`: the VAE as a LightningModule. Every logged number is in nats per image."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from betavae.errors import UserError
from betavae.metrics.accumulators import BatchSums, Totals
from betavae.models.vae import VAE
from betavae.objectives import build_objective
from betavae.objectives.elbo import ACTIVE_UNIT_THRESHOLD
from betavae.objectives.schedules import BETA_SCHEDULES
from betavae.optim import lr_factor, optimizer_class

EVALUATION_SEED = 0
TEST_DRAWS = 4  # samples of z per image in a test: with one, the mean over 10,000 images varies by about 0.05 nats


class VAEModule(L.LightningModule):
    """A VAE, its objective and its optimizer, from plain values that a checkpoint stores.

    Args:
        model: The arguments of `VAE`.
        objective: `name` in `OBJECTIVES`, `k` posterior samples per image, and the settings of `build_objective`.
        beta: The weight of the KL.
        beta_schedule: `name` in `BETA_SCHEDULES` and its settings.
        optimizer: `name` of a class in torch.optim, or MuonAdam, and its arguments.
        lr_schedule: The arguments of `lr_factor`.
    """

    steps_per_batch, accumulate = 1, 1  # set by `set_steps_per_batch`
    cuda_graph: Callable[[Tensor], None] | None = None  # takes the steps instead of `take_steps`

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
        self.window, self.epoch_totals = BatchSums(), Totals()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Reconstruct images `(B, C, H, W)`, of a conditional model with their labels `(B,)`."""
        return self.vae.given(labels).reconstruct(x)

    # ---------------------------------------------------------------- training

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss; with `set_steps_per_batch` the mean loss of the steps that it has taken."""
        if self.automatic_optimization:
            return self.training_loss(*batch)
        first = len(self.window)
        if self.cuda_graph:
            self.cuda_graph(batch[0])
        else:
            self.take_steps(*batch)
        return self.window.mean("loss", first)

    def training_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of a batch, and keep the sums of its terms for the curves."""
        noise = torch.randn(self.k, len(x), self.vae.latent_dim, dtype=x.dtype, device=x.device)
        # A tensor: torch.compile would compile again for another number.
        beta = torch.full((), self.current_beta(), dtype=x.dtype, device=x.device)
        loss, sums = self.loss(x, labels, noise, beta)
        self.window.add(sums, len(x))
        return loss

    def loss(self, x: Tensor, labels: Tensor | None, noise: Tensor, beta: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and each term summed over the batch. This is what torch.compile compiles."""
        terms = self.objective(self.vae.given(labels), x, noise, beta)
        return terms.loss, terms.batch_sums()

    def set_steps_per_batch(
        self,
        steps_per_batch: int,
        batch_size: int,
        accumulate: int,
        clip: float | None,
        algorithm: Literal["norm", "value"],
    ) -> None:
        """Take several optimizer steps in each call of `training_step`, on the parts of a larger batch.

        Lightning's own work per call takes a third of the time of a compiled step (2.6).
        """
        self.automatic_optimization = False
        self.steps_per_batch, self.batch_size, self.accumulate = steps_per_batch, batch_size, accumulate
        self.clip, self.clip_algorithm = clip, algorithm

    def take_steps(self, x: Tensor, labels: Tensor) -> None:
        """Take an optimizer step for every `accumulate` parts of the batch."""
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        parts = list(zip(x.split(self.batch_size), labels.split(self.batch_size), strict=True))
        for start in range(0, len(parts), self.accumulate):
            for number, part in enumerate(parts[start : start + self.accumulate]):
                loss = self.training_loss(*part)
                if number == 0:
                    optimizer.zero_grad()  # after the forward pass, so that the new gradients get the memory of the old
                self.manual_backward(loss / self.accumulate)
            if self.clip:
                self.clip_gradients(optimizer, self.clip, self.clip_algorithm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if self.global_step == self.trainer.max_steps:
                break

    def current_beta(self) -> float:
        """Return beta at the global step of the training."""
        return self.beta * self.beta_factor(self.global_step, self.total_steps)

    # ------------------------------------------------------- curves of training

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log `train/NAME`: means over the images of the last `log_every_n_steps` steps, for every logger."""
        if self.trainer.is_last_batch or len(self.window) >= self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self.log_window()

    def read_window(self) -> tuple[list[str], Tensor]:
        """Reduce the steps that are not logged yet.

        Their sums are passed to every callback with a method `on_train_sums`.

        Returns: `BatchSums.rows`.
        """
        names, rows = self.window.rows(lambda rows: self.trainer.strategy.reduce(rows, reduce_op="sum"))
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hook := getattr(callback, "on_train_sums", None):
                hook(self.trainer, self, names, rows)
        return names, rows

    def log_window(self) -> None:
        """Log the means since the last call, and publish those of the epoch so far."""
        names, rows = self.read_window()
        self.window = BatchSums()
        images, *sums = rows.sum(0)
        window = Totals()
        window.add(dict(zip(names, sums, strict=True)), int(images))
        self.epoch_totals.add(window.sums, window.images)
        means = {f"train/{name}": mean for name, mean in window.means().items()}
        self.trainer.callback_metrics.update(means)
        self.publish_epoch()
        scalars = {name: mean.item() for name, mean in means.items()}
        scalars["train/beta"] = self.current_beta()
        scalars["train/learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        for logger in self.trainer.loggers:
            logger.log_metrics(scalars, self.trainer.global_step)

    def publish_epoch(self) -> None:
        """Put the means of the epoch so far into `trainer.callback_metrics` as `epoch/NAME`."""
        means = {f"epoch/{name}": mean for name, mean in self.epoch_totals.means().items()}
        self.trainer.callback_metrics.update(means)

    def on_train_epoch_end(self) -> None:
        """Log the rest of the epoch. Callbacks, which Lightning calls earlier, may call it themselves."""
        if len(self.window):  # `max_steps` or early stopping has ended the epoch before its last batch
            self.log_window()
        self.publish_epoch()
        self.epoch_totals = Totals()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the sums that are not logged yet."""
        epoch = (self.epoch_totals.sums, self.epoch_totals.images)
        checkpoint["train_metrics"] = {"window": self.window.state_dict(), "epoch": epoch}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sums until `on_train_start`, when the device is known."""
        self.restored = checkpoint["train_metrics"]

    def on_train_start(self) -> None:
        """Restore the sums of a resumed training."""
        if restored := self.__dict__.pop("restored", None):
            self.window.load_state_dict(restored["window"], self.device)
            self.epoch_totals.sums, self.epoch_totals.images = restored["epoch"]

    # ----------------------------------------------------- validation and test

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add the batch to the validation means, with one sample of z per image."""
        self.evaluate(*batch, draws=1)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add the batch to the test means, with `TEST_DRAWS` samples of z per image."""
        self.evaluate(*batch, TEST_DRAWS)

    def on_validation_epoch_start(self) -> None:
        """Start the means, with the same noise in every evaluation: two epochs differ only by their weights."""
        self.evaluation, self.generator = Totals(), torch.Generator().manual_seed(EVALUATION_SEED)

    def evaluate(self, x: Tensor, labels: Tensor, draws: int) -> None:
        """Add the terms at the full beta, so that the losses of two epochs compare models and not schedules."""
        if not len(x):
            return
        size = draws * self.k * self.vae.latent_dim
        # Rows of multiples of 16, because torch draws normals in blocks of 16: an image's noise depends neither on the
        # batch size nor on the number of processes, each of which takes the rows of its own images.
        processes, rank = self.trainer.world_size, self.trainer.global_rank
        noise = torch.randn(len(x) * processes, -(-size // 16) * 16, generator=self.generator, dtype=x.dtype)
        for draw in noise[rank::processes, :size].to(x).view(len(x), draws, self.k, -1).permute(1, 2, 0, 3):
            terms = self.objective(self.vae.given(labels), x, draw, self.beta)
            mean = terms.posterior.mean
            self.evaluation.add(terms.batch_sums() | {"mean": mean.sum(0), "square": (mean**2).sum(0)}, len(x))

    def on_validation_epoch_end(self, split: str = "val") -> None:
        """Log `SPLIT/NAME`: means over all images of all processes, and the number of active units."""
        means = self.evaluation.gather(self.trainer.world_size).means()
        variance = means.pop("square") - means.pop("mean") ** 2
        means["active_units"] = (variance > ACTIVE_UNIT_THRESHOLD).sum().double()
        means = {f"{split}/{name}": value for name, value in means.items()}
        # `log_dict` is for callbacks; in a logger it would add a second curve with epoch numbers for steps.
        self.log_dict({name: value.float() for name, value in means.items()}, logger=False)
        for logger in self.loggers:
            logger.log_metrics({name: value.item() for name, value in means.items()}, self.global_step)

    on_test_epoch_start = on_validation_epoch_start

    def on_test_epoch_end(self) -> None:
        """Log the test means."""
        self.on_validation_epoch_end("test")

    # --------------------------------------------------------------- optimizer

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the learning-rate schedule."""
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
        """Return the number of optimizer steps of the whole training."""
        steps = self.trainer.estimated_stepping_batches  # with several steps per batch, this counts the batches
        if self.automatic_optimization:
            return steps
        loader: Any = self.trainer.train_dataloader
        in_epoch = -(-loader.size // (self.batch_size * self.accumulate))
        in_epoch = min(in_epoch, self.trainer.num_training_batches * self.steps_per_batch)
        steps = in_epoch * (self.trainer.max_epochs or 1)
        return min(steps, self.trainer.max_steps) if self.trainer.max_steps > 0 else steps

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; Lightning's name of the running hook without nn.Module's search for parameters.

        Lightning sets it 40 times per step, which would add 4 % to an epoch on a CPU (2.6).
        """
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


def without(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the settings except one."""
    return {key: value for key, value in settings.items() if key != name}
