"""Loggers of services outside of the run folder: Weights & Biases and MLflow."""

import contextlib
import io
import logging
import os
import secrets
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from torch import Tensor

from betavae import plotting
from betavae.errors import UserError, first_line
from betavae.runtime.checkpoint import Checkpoint
from betavae.runtime.run_folder import RunFolder
from betavae.runtime.run_logger import RunLogger
from betavae.runtime.settings import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


class WeightsAndBiases(RunLogger, WandbLogger):
    """A W&B run with the name of the run folder, which contains its files.

    A resumed run has the same id, and counts its rows from the checkpoint: online, W&B drops repeated rows; offline,
    each session has its own folder, to be synced in their order.
    """

    def __init__(
        self,
        run: RunFolder,
        state: Checkpoint | None,
        project: str,
        entity: str | None,
        mode: Literal["offline", "online"],
    ):
        import wandb

        known_id = run.read_metrics().get("loggers", {}).get("wandb")
        try:
            experiment = wandb.init(
                project=project,
                entity=entity,
                mode=mode,
                dir=run.path,
                name=run.path.name,
                id=known_id or secrets.token_hex(4),
                resume="allow" if mode == "online" else None,
                # A killed process loses what is not in the file yet; the default is 15 seconds (0.31).
                settings=wandb.Settings(silent=True, console="off", x_transaction_log_flush_interval=1.0),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"logger.wandb: {first_line(error)} (or pass logger.wandb.mode=offline and run `wandb sync` later)"
            ) from error
        super().__init__(experiment=experiment)
        experiment.define_metric("*", step_metric="trainer/global_step")  # as Lightning does
        self.rows = (state.get("events", {}) if state else {}).get("wandb", 0)
        if mode == "online":
            self.view_command = experiment.url
            log.info("watch %s", self.view_command)
        else:
            append = "--append " if known_id else ""
            self.view_command = f"wandb sync {append}{shlex.quote(str(Path(os.path.relpath(experiment.dir)).parent))}"

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        # W&B's own "step" is the number of the row.
        self.experiment.log({**metrics, "trainer/global_step": step}, step=self.rows, commit=True)
        self.rows += 1

    def resume_offsets(self) -> dict[str, int]:
        """Return the number of rows."""
        return {"wandb": self.rows}

    def log_settings(self, settings: Config) -> None:
        self.log_hyperparams(settings)

    def log_image_grid(self, name: str, image: Tensor, step: int) -> None:
        self.log_image(f"pictures/{name}", [plotting.to_pil(image)], step)

    def log_figure(self, name: str, figure: "Figure", step: int) -> None:
        from PIL import Image

        png = io.BytesIO()
        figure.savefig(png, dpi=150)
        self.log_image(name, [Image.open(png)], step)

    def log_final_metrics(self, settings: Config, metrics: dict[str, float]) -> None:
        self.experiment.summary.update(metrics)

    def finish(self, status: str) -> None:
        self.experiment.finish(exit_code=0 if status == "finished" else 1)


class MLflow(RunLogger, MLFlowLogger):
    """An MLflow run with the name of the run folder; the figures are its artifacts."""

    def __init__(self, run: RunFolder, state: Checkpoint | None, experiment: str, tracking_uri: str):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would report each run to its makers
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        known_id = run.read_metrics().get("loggers", {}).get("mlflow")
        try:
            client = MlflowClient(tracking_uri)
            if client.get_experiment_by_name(experiment) is None:
                # Artifacts of a database file go beside it instead of into the working folder; a server decides itself.
                local = tracking_uri.partition("sqlite:///")[2]
                location = (Path(local).absolute().parent / "artifacts").as_uri() if local else None
                with contextlib.suppress(MlflowException):  # another process has just created it
                    client.create_experiment(experiment, location)
            super().__init__(experiment, run.path.name, tracking_uri, run_id=known_id)
            logged = self.experiment.get_run(self.run_id).data
            self.last = {  # the last step of each curve: MLflow would store repeated points twice
                name: max(point.step for point in client.get_metric_history(self.run_id, name))
                for name in logged.metrics
            }
            client.update_run(self.run_id, "RUNNING")
        except MlflowException as error:
            raise UserError(f"logger.mlflow.tracking_uri={tracking_uri}: {first_line(error)}") from error
        self.settings, self.step = set(logged.params), max(self.last.values(), default=0)
        self.view_command = f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri)}"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.step = step or 0
        new = {name: value for name, value in metrics.items() if self.step > self.last.get(name, -1)}
        self.last |= dict.fromkeys(new, self.step)
        if new:
            super().log_metrics(new, self.step)

    def log_settings(self, settings: Config) -> None:
        # MLflow rejects a second value, so a resumed run keeps its settings.
        self.log_hyperparams({name: value for name, value in settings.items() if name not in self.settings})

    def log_image_grid(self, name: str, image: Tensor, step: int) -> None:
        self.experiment.log_image(self.run_id, plotting.to_pil(image), f"pictures/{name}/{step:06d}.png")

    def log_figure(self, name: str, figure: "Figure", step: int) -> None:
        self.experiment.log_figure(self.run_id, figure, f"{name}/{step:06d}.png")

    def log_final_metrics(self, settings: Config, metrics: dict[str, float]) -> None:
        self.log_metrics(metrics, self.step)

    def finalize(self, status: str = "success") -> None:
        """Do nothing: Lightning calls this after training and after the test, and `finish` ends the run."""

    def finish(self, status: str) -> None:
        word = {"finished": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED")
        self.experiment.set_terminated(self.run_id, word)
