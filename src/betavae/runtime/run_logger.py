"""The interface that a run has to each of its loggers."""

from abc import abstractmethod
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.loggers import Logger
from torch import Tensor

from betavae.runtime.settings import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RunLogger(Logger):
    """A logger of a run: more than the scalars of `log_metrics`, as far as its kind supports it.

    It is made in the process of rank zero, with the checkpoint `state` that the run is resumed from. On resume, a
    logger that writes outside of the run folder finds its run by Lightning's `version`.
    """

    view_command: str | None = None  # the command that shows the logged data

    def log_settings(self, settings: Config) -> None:
        """Log settings by their flat names, before the first step."""

    @abstractmethod
    def log_image_grid(self, name: str, image: Tensor, step: int) -> None:
        """Log an image `(C, H, W)` in [0, 1]."""

    @abstractmethod
    def log_figure(self, name: str, figure: "Figure", step: int) -> None:
        """Log a figure of matplotlib."""

    def log_embedding(self, means: Tensor, labels: list[int | list[int]], tiles: Tensor) -> None:
        """Log latent points `(N, latent_dim)`, each with a label and a square image `(3, side, side)`."""

    def log_final_metrics(self, settings: Config, metrics: dict[str, float]) -> None:
        """Log the test metrics, with the settings again."""

    def resume_offsets(self) -> dict[str, int]:
        """Return the length of each file for a checkpoint, since a resume logs everything behind it again."""
        return {}

    def finish(self, status: str) -> None:
        """Close the logger at the end of a run with a status of metrics.json."""


def run_loggers(trainer: L.Trainer) -> list[RunLogger]:
    """Return the loggers of a trainer, without those of custom callbacks."""
    return [logger for logger in trainer.loggers if isinstance(logger, RunLogger)]
