"""What a person sees while it trains: TensorBoard's pictures, the bar or the lines in the terminal; and safe saving."""

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor

from betavae import figures
from betavae.checkpoint import save
from betavae.module import VAEModule

log = logging.getLogger(__name__)


class Pictures(Callback):
    """Every `every` epochs (0: never) and after the test: reconstructions of fixed test images, samples from fixed z, a
    latent traversal, KL per dimension, in two dimensions the manifold; after the test also the embedding projector."""

    def __init__(self, every: int):
        self.every = every

    @torch.no_grad()
    def draw(self, trainer: L.Trainer, module: VAEModule) -> dict[str, Tensor]:
        """`tag -> (C, H, W)` in [0, 1]."""
        vae = module.vae
        images = trainer.datamodule.sets["test"][0][:16].to(module.device).float() / 255  # type: ignore[attr-defined]
        z = torch.randn(64, vae.latent_dim, generator=torch.Generator().manual_seed(0)).to(module.device)
        by_kl = module.kl_per_dimension.argsort(descending=True).tolist() or list(range(vae.latent_dim))
        span = torch.linspace(-3, 3, 11, device=module.device)
        rows = figures.traversal(vae, vae.encode(images[:1]).mean[0], by_kl[:10], span)
        pictures = {
            "reconstructions": figures.grid(figures.reconstructions(vae, images), 8),
            "samples": figures.grid(vae.likelihood.mean(vae.decode(z)), 8),
            "traversal": figures.grid(rows, len(span)),
        }
        if vae.latent_dim == 2:
            pictures["manifold"] = figures.grid(figures.manifold(vae, 20), 20)
        return pictures

    def show(self, trainer: L.Trainer, module: VAEModule) -> None:
        if trainer.logger is None or not trainer.is_global_zero:
            return
        board, step = trainer.logger.experiment, module.global_step  # type: ignore[attr-defined]
        for tag, picture in self.draw(trainer, module).items():
            enlarged = picture.repeat_interleave(2, 1).repeat_interleave(2, 2)
            board.add_image(f"pictures/{tag}", (enlarged * 255).round().to(torch.uint8).cpu(), step)
        if len(module.kl_per_dimension):
            board.add_figure("latent/kl_per_dimension", figures.kl_bars(module.kl_per_dimension), step)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if (
            self.every
            and (trainer.current_epoch + 1) % self.every == 0
            and trainer.current_epoch + 1 != trainer.max_epochs
        ):
            self.show(trainer, module)  # type: ignore[arg-type]

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.show(trainer, module)  # type: ignore[arg-type]
        if trainer.logger is not None and trainer.is_global_zero:
            self.embed(trainer, module)  # type: ignore[arg-type]

    @torch.no_grad()
    def embed(self, trainer: L.Trainer, module: VAEModule) -> None:
        """The posterior means of 2,000 test images for the projector, each drawn in the colour of its label."""
        import matplotlib

        images, labels = (t[:2000].to(module.device) for t in trainer.datamodule.sets["test"])  # type: ignore[attr-defined]
        x = images.float() / 255
        means = module.vae.encode(x).mean.cpu()
        colours = torch.tensor(matplotlib.colormaps["tab10"].colors)[labels.cpu() % 10]  # type: ignore[attr-defined]
        tiles = 1 - x.mean(1, keepdim=True).cpu() * (1 - colours.view(-1, 3, 1, 1))  # coloured strokes on white
        # The projector shows nothing for fewer than three columns.
        means = torch.nn.functional.pad(means, (0, max(0, 3 - means.shape[1])))
        trainer.logger.experiment.add_embedding(  # type: ignore[union-attr]
            means,
            metadata=labels.tolist(),
            label_img=tiles,
            global_step=module.global_step,
            tag="posterior_means",
        )


class Bar(TQDMProgressBar):
    """The progress bar of a terminal: one line an epoch, read from what the module last logged."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=20, leave=True)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        shown = {name: f"{value:.2f}" for name, value in pl_module.train_means.items() if name != "neg_elbo"}  # type: ignore
        if "val/neg_elbo" in trainer.callback_metrics:
            shown["val neg. ELBO"] = f"{trainer.callback_metrics['val/neg_elbo']:.2f}"
        return shown

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.train_progress_bar.n == 0:  # a first one that Lightning opens, and would leave behind empty
            self.train_progress_bar.leave = False
            self.train_progress_bar.close()
        super().on_train_epoch_start(trainer, *args)

    # Validation and test would flash by for a tenth of a second each.
    def init_validation_tqdm(self) -> Any:
        return Tqdm(disable=True)

    init_test_tqdm = init_validation_tqdm


class EpochLines(Callback):
    """One line per epoch, for the log file and for a terminal that is not one."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = time.perf_counter()  # also of an epoch that a resumed run goes on with in its middle

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        terms = module.epoch_means()  # type: ignore[operator]
        line = f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}"
        line += f"  loss {terms['loss']:.2f}  recon {terms['recon']:.2f}  KL {terms['kl']:.2f}"
        if "val/neg_elbo" in trainer.callback_metrics:
            line += f"  val neg. ELBO {trainer.callback_metrics['val/neg_elbo']:.2f}"
        self.seconds.append(round(time.perf_counter() - self.started, 3))
        log.info("%s  %.1f s", line, self.seconds[-1], extra={"epoch_line": True})


class Board(TensorBoardLogger):
    """TensorBoard's events straight in the run folder, and nothing else (no second copy of the settings)."""

    def __init__(self, folder: Path, **kwargs: Any):
        super().__init__(folder, name="", version="", default_hp_metric=False, **kwargs)

    def save(self) -> None:
        self.experiment.flush()

    def finalize(self, status: str) -> None:
        self.save()  # not closed between fit and test, so that a run has one file of events


class SafeCheckpointIO(TorchCheckpointIO):
    """Checkpoints appear whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(checkpoint, path)


class NoProfiler(PassThroughProfiler):
    """Lightning's own makes a generator for each of 42 actions of a step: a seventieth of the step's time."""

    nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return self.nothing
