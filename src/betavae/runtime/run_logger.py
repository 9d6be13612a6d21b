"""What every logger of a run can do, whichever it is."""

from abc import abstractmethod
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from torch import Tensor


class RunLogger(Logger):
    """What a run tells its loggers beside the scalars of `log_metrics`; not every one has a place for each.

    Made once it is sure that the run can be, in the process that writes. `state` is the checkpoint that the run goes
    on from; Lightning's `version` is what a logger is found by when it does, where its place is not the run folder.
    """

    view_command: str | None = None  # the command that shows what it keeps

    def log_settings(self, settings: dict[str, Any]) -> None:
        """By flat names, before the first step."""

    @abstractmethod
    def log_image_grid(self, name: str, picture: Tensor, step: int) -> None:
        """`picture` `(C, H, W)` in [0, 1]."""

    @abstractmethod
    def log_figure(self, name: str, figure: Any, step: int) -> None:
        """A figure of matplotlib."""

    def log_embedding(self, means: Tensor, labels: list[Any], tiles: Tensor) -> None:
        """Latent points `(N, latent_dim)`, each with a label and a square tile `(3, side, side)`."""

    def log_final_metrics(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        """The settings again, with the test numbers that metrics.json has."""

    def resume_offsets(self) -> dict[str, int]:
        """How far each of its files went, for a checkpoint: what comes later will come again."""
        return {}

    def finish(self, status: str) -> None:
        """`status` is that of metrics.json."""


def run_loggers(trainer: L.Trainer) -> list[RunLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, RunLogger)]
