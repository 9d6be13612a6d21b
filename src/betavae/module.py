"""`VAEModule`: the VAE and its loss as a LightningModule. Everything it counts is in nats per image."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from betavae.checkpoint import FORMAT
from betavae.errors import Diverged, UserError
from betavae.objectives import ACTIVE_UNIT_VARIANCE, BETA_SCHEDULES, OBJECTIVES, Terms, lr_factor
from betavae.optimizers import optimizer_class
from betavae.vae import VAE

EVALUATION_SEED = 0
TEST_DRAWS = 4  # of z per image in a test: one draw alone moves the mean over 10,000 images by about 0.05 nats


class VAEModule(L.LightningModule):
    """A VAE, its objective, its optimiser. All arguments are plain values: a checkpoint holds them, and is the recipe.

    `model` is what `VAE` takes. `objective` is a name in `OBJECTIVES`, the number `k` of posterior samples, and that
    function's own settings; `beta_schedule` and `lr_schedule` are names with settings likewise, and `optimizer` is the
    name of a class in torch.optim with its arguments.
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
        settings = dict(objective)
        self.objective, self.k, self.objective_settings = OBJECTIVES[settings.pop("name")], settings.pop("k"), settings
        schedule = dict(beta_schedule)
        self.beta, self.beta_factor, self.beta_settings = beta, BETA_SCHEDULES[schedule.pop("name")], schedule
        self.total_steps = 0.0
        # Sums over the images of each batch since the last log line, and of all since the epoch began: loss, recon, kl.
        # Kept on the device, read once per interval: reading (or `self.log`) at every step would cost a third of the
        # epoch.
        self.interval: list[Tensor] = []
        self.interval_images: list[int] = []
        self.epoch, self.epoch_images = torch.zeros(3, dtype=torch.float64), 0
        self.train_means: dict[str, float] = {}
        self.kl_per_dimension = torch.zeros(0)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the running hook's name here 40 times a step, and nn.Module's way of setting an attribute,
        # made for parameters, is slow: a twentieth of a step.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.vae.reconstruct(x)

    def current_beta(self) -> float:
        """Beta at the global step while fitting; its full value in a test."""
        if not self.total_steps:
            return self.beta
        return self.beta * self.beta_factor(self.global_step, self.total_steps, **self.beta_settings)

    def configure_optimizers(self) -> Any:
        self.total_steps = self.trainer.estimated_stepping_batches
        if not self.automatic_optimization:  # it has counted Lightning's batches
            loader = self.trainer.train_dataloader
            steps = min(loader.steps, self.trainer.num_training_batches * loader.together)  # type: ignore[union-attr]
            self.total_steps = steps * (self.trainer.max_epochs or 1)
            if self.trainer.max_steps > 0:
                self.total_steps = min(self.total_steps, self.trainer.max_steps)
        settings = dict(self.hparams["optimizer"])
        name = settings.pop("name")
        try:
            optimizer = optimizer_class(name)(self.parameters(), **settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer: {name} does not take {settings} ({error})") from error
        schedule = self.hparams["lr_schedule"]
        if schedule["name"] == "constant" and not schedule["warmup"]:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, self.total_steps, **schedule)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _terms(self, x: Tensor, noise: Tensor, beta: Tensor | float) -> Terms:
        return self.objective(self.vae, x, noise, beta, **self.objective_settings)

    def _loss_and_sums(self, x: Tensor, noise: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        terms = self._terms(x, noise, beta)
        return terms.loss, torch.stack((terms.loss.detach() * len(x), terms.recon.sum(), terms.kl.sum()))

    def compile_training(self, mode: str | None) -> None:
        """torch.compile what a training step computes; evaluation and the checkpoint's keys stay as they are."""
        self._loss_and_sums = torch.compile(self._loss_and_sums, mode=mode, dynamic=False)  # type: ignore[method-assign]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self._training_loss(batch[0])
        # What Lightning would do for each batch, for several in one call (`trainer.steps_per_batch`): its own work for
        # a call takes a third of the time of a compiled step.
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        for x, _ in batch:
            loss = self._training_loss(x)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if self.global_step == self.trainer.max_steps:
                break
        return None

    def _training_loss(self, x: Tensor) -> Tensor:
        noise = torch.randn(self.k, len(x), self.vae.latent_dim, device=x.device)
        # A tensor, since for another number torch.compile would compile again.
        beta = torch.full((), self.current_beta(), device=x.device)
        loss, sums = self._loss_and_sums(x, noise, beta)
        self.interval.append(sums.clone())  # the next replay of a CUDA graph would write over it
        self.interval_images.append(len(x))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if len(self.interval) >= self.trainer.log_every_n_steps or self.trainer.is_last_batch:  # type: ignore[attr-defined]
            self._log_interval()

    def _log_interval(self) -> None:
        batches = self.trainer.strategy.reduce(torch.stack(self.interval), reduce_op="sum").cpu().double()
        self._stop_if_diverged(batches)
        sums, images = batches.sum(0), sum(self.interval_images) * self.trainer.world_size
        self.epoch, self.epoch_images = self.epoch + sums, self.epoch_images + images
        self.interval, self.interval_images = [], []
        self.train_means = means(sums, images)
        if self.logger is not None:
            scalars = {f"train/{name}": value for name, value in self.train_means.items()}
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            scalars |= {"train/beta": self.current_beta(), "train/learning_rate": rate}
            self.logger.log_metrics(scalars, self.global_step)

    def _stop_if_diverged(self, batches: Tensor) -> None:
        """Raises Diverged for the first of these sums `(batches, 3)` that is not finite."""
        finite = batches.isfinite().all(1).tolist()
        if all(finite):
            return
        first = finite.index(False)
        step = self.global_step - (len(finite) - 1 - first) // self.trainer.accumulate_grad_batches
        last = self.train_means
        if first:
            last = means(batches[first - 1], self.interval_images[first - 1] * self.trainer.world_size)
        raise Diverged(f"the loss of step {step} is not finite", last)

    def epoch_means(self) -> dict[str, float]:
        """Training loss, recon, kl and neg_elbo, averaged over the epoch's images so far."""
        return means(self.epoch, self.epoch_images)

    def on_train_epoch_end(self) -> None:
        self.epoch, self.epoch_images = torch.zeros(3, dtype=torch.float64), 0

    def on_validation_epoch_start(self) -> None:
        # The same noise at every evaluation, so that two epochs differ by their weights alone.
        self.generator = torch.Generator().manual_seed(EVALUATION_SEED)
        self.evaluation: Any = 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, draws: int = 1) -> None:
        x = batch[0]
        size = draws * self.k * self.vae.latent_dim
        # Rows of whole sixteens: torch draws normals in blocks of 16, so no image's noise depends on the batch size.
        # Nor on the number of processes: each takes the rows of its own images.
        processes, rank = self.trainer.world_size, self.trainer.global_rank
        noise = torch.randn(len(x) * processes, -(-size // 16) * 16, generator=self.generator)[rank::processes, :size]
        for draw in noise.to(x.device).view(len(x), draws, self.k, -1).permute(1, 2, 0, 3):
            terms = self._terms(x, draw, self.current_beta())
            mean = terms.posterior_mean.double()
            sums = (
                terms.recon.new_tensor([len(x)]),
                (terms.loss * len(x)).view(1),
                terms.recon.sum(0, keepdim=True),
                terms.kl.sum(0),
                mean.sum(0),
                (mean**2).sum(0),
            )
            self.evaluation = self.evaluation + torch.cat([part.double() for part in sums])

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    on_test_epoch_start = on_validation_epoch_start

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx, TEST_DRAWS)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, split: str) -> None:
        """Means over all images of all processes, and the number of active units."""
        sums = self.trainer.strategy.reduce(self.evaluation, reduce_op="sum").cpu()
        (count, loss, recon), (kl, mean, square) = sums[:3], sums[3:].view(3, -1)
        self.kl_per_dimension = kl / count
        variance = square / count - (mean / count) ** 2
        scalars = means(torch.stack((loss, recon, kl.sum())), int(count))
        scalars["active_units"] = float((variance > ACTIVE_UNIT_VARIANCE).sum())
        scalars = {f"{split}/{name}": value for name, value in scalars.items()}
        self.log_dict(scalars, logger=False)  # for callbacks; with the logger it would add a curve of epoch numbers
        if self.logger is not None:
            self.logger.log_metrics(scalars, self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        interval = torch.stack(self.interval).cpu() if self.interval else torch.zeros(0, 3)
        self._stop_if_diverged(interval)
        if not torch.stack([p.isfinite().all() for p in self.parameters()]).all():
            raise Diverged(f"the weights after step {self.global_step} are not finite", self.train_means)
        checkpoint["betavae_format"] = FORMAT
        # One state of the random numbers per process, and the sums of the epoch under way: what makes a resumed run
        # equal to one that was never interrupted.
        states = self.trainer.strategy.all_gather(torch.get_rng_state().to(self.device))
        checkpoint["random_state"] = states.view(self.trainer.world_size, -1).cpu()
        if self.device.type == "cuda":
            checkpoint["cuda_random_state"] = torch.cuda.get_rng_state(self.device)
        checkpoint["running_sums"] = [interval, self.interval_images, self.epoch, self.epoch_images]
        if (state_dict := getattr(self.trainer.train_dataloader, "state_dict", None)) is not None:
            checkpoint["batches"] = state_dict()  # a DataLoader of somebody's own has none
        checkpoint["kl_per_dimension"] = self.kl_per_dimension.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.restored = checkpoint

    def on_train_start(self) -> None:
        if self.trainer.world_size > 1:  # alike until here, for equal weights; from here each draws its own noise
            torch.manual_seed(torch.initial_seed() + self.trainer.global_rank)
        checkpoint = self.__dict__.pop("restored", None)
        if checkpoint is None:
            return
        # Lightning does not, once `estimated_stepping_batches` has asked for the loader.
        if "batches" in checkpoint:
            self.trainer.train_dataloader.load_state_dict(checkpoint["batches"])  # type: ignore[union-attr]
        states = checkpoint["random_state"]
        if len(states) == self.trainer.world_size:
            torch.set_rng_state(states[self.trainer.global_rank])
        if "cuda_random_state" in checkpoint and self.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["cuda_random_state"].cpu(), self.device)
        interval, self.interval_images, self.epoch, self.epoch_images = checkpoint["running_sums"]
        self.interval = list(interval.to(self.device))
        self.kl_per_dimension = checkpoint["kl_per_dimension"].to(self.device)


def means(sums: Tensor, images: int) -> dict[str, float]:
    """(loss, recon, kl) summed over `images` -> their means in nats per image, and the negative ELBO."""
    loss, recon, kl = (sums / max(1, images)).tolist()
    return {"loss": loss, "recon": recon, "kl": kl, "neg_elbo": recon + kl}
