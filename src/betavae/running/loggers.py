"""Where curves and pictures go. Nothing but this file knows which kind of logger a run has."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor


class TensorBoard(TensorBoardLogger):
    """TensorBoard's events straight in the run folder, and nothing else (no second copy of the settings)."""

    def __init__(self, folder: Path, purge_step: int | None = None):
        super().__init__(folder, name="", version="", default_hp_metric=False, purge_step=purge_step)
        self.folder = folder

    def save(self) -> None:
        self.experiment.flush()

    def finalize(self, status: str) -> None:
        self.save()  # not closed between fit and test, so that a run has one file of events

    def position(self) -> dict[str, int]:
        """How far each file of events went, in bytes."""
        self.save()
        return {path.name: path.stat().st_size for path in sorted(self.folder.glob("events.out.tfevents.*"))}

    def log_picture(self, name: str, picture: Tensor, step: int) -> None:
        """`picture` `(C, H, W)` in [0, 1]."""
        enlarged = picture.repeat_interleave(2, 1).repeat_interleave(2, 2)
        self.experiment.add_image(f"pictures/{name}", (enlarged * 255).round().to(torch.uint8).cpu(), step)

    def log_figure(self, name: str, figure: Any, step: int) -> None:
        self.experiment.add_figure(name, figure, step)

    def log_embedding(self, means: Tensor, labels: list[Any], tiles: Tensor) -> None:
        """Latent points `(N, latent_dim)` for the projector, each with a label and a picture `(3, H, W)`."""
        # The projector shows nothing for fewer than three columns. The "step" names the folder of its files.
        means = torch.nn.functional.pad(means, (0, max(0, 3 - means.shape[1])))
        self.experiment.add_embedding(means, labels, tiles, global_step="projector", tag="posterior_means")

    def log_outcome(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        """The HPARAMS tab: flat names, written once, with the final test numbers."""
        from torch.utils.tensorboard.summary import hparams

        # Without torch's first summary, the list of columns, TensorBoard works the list out itself, over all runs, and
        # puts the settings that differ first: in a sweep, what was swept.
        _, start, end = hparams(settings, metrics)
        writer = self.experiment._get_file_writer()
        writer.add_summary(start)
        writer.add_summary(end)
        self.experiment.close()
