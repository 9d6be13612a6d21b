"""Loggers that keep their runs elsewhere, or will: Weights & Biases, MLflow. Each with a package of its own."""

import contextlib
import io
import logging
import os
import secrets
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from torch import Tensor

from betavae import plotting
from betavae.errors import UserError
from betavae.runtime.run_folder import RunFolder
from betavae.runtime.run_logger import RunLogger

log = logging.getLogger(__name__)


class WeightsAndBiases(RunLogger, WandbLogger):
    """A run of W&B under the name of the run folder, its files in there. A run that goes on has the same id, and counts
    its rows on from the checkpoint: online W&B drops those that come again; offline each session has a folder of its
    own, to be synced in their order."""

    def __init__(self, run: RunFolder, state: dict[str, Any] | None, project: str, entity: str | None, mode: str):
        import wandb

        kept = run.read_metrics().get("loggers", {}).get("wandb")
        try:
            experiment = wandb.init(
                project=project,
                entity=entity,
                mode=mode,  # type: ignore[arg-type]
                dir=run.path,
                name=run.path.name,
                id=kept or secrets.token_hex(4),
                resume="allow" if mode == "online" else None,
                # Who is killed loses what is not in the file yet; W&B's own is 15 seconds (0.31).
                settings=wandb.Settings(silent=True, console="off", x_transaction_log_flush_interval=1.0),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"logger.wandb: {str(error).splitlines()[0]} (or logger.wandb.mode=offline, and `wandb sync` later)"
            ) from error
        super().__init__(experiment=experiment)
        experiment.define_metric("*", step_metric="trainer/global_step")  # as Lightning does
        self.rows = (state.get("events", {}) if state else {}).get("wandb", 0)
        if mode == "online":
            self.view_command = experiment.url
            log.info("watch %s", self.view_command)
        else:
            again = "--append " if kept else ""
            self.view_command = f"wandb sync {again}{shlex.quote(str(Path(os.path.relpath(experiment.dir)).parent))}"

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        # W&B's own "step" is the number of the row.
        self.experiment.log({**metrics, "trainer/global_step": step}, step=self.rows, commit=True)
        self.rows += 1

    def resume_offsets(self) -> dict[str, int]:
        """In rows."""
        return {"wandb": self.rows}

    def log_settings(self, settings: dict[str, Any]) -> None:
        self.log_hyperparams(settings)

    def log_image_grid(self, name: str, picture: Tensor, step: int) -> None:
        self.log_image(f"pictures/{name}", [plotting.to_pil(picture)], step)

    def log_figure(self, name: str, figure: Any, step: int) -> None:
        from PIL import Image

        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150)
        self.log_image(name, [Image.open(drawn)], step)

    def log_final_metrics(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        self.experiment.summary.update(metrics)

    def finish(self, status: str) -> None:
        self.experiment.finish(exit_code=0 if status == "finished" else 1)


class MLflow(RunLogger, MLFlowLogger):
    """A run of MLflow under the name of the run folder; the pictures are its artifacts."""

    def __init__(self, run: RunFolder, state: dict[str, Any] | None, experiment: str, tracking_uri: str):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would tell its makers of each run
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        kept = run.read_metrics().get("loggers", {}).get("mlflow")
        try:
            client = MlflowClient(tracking_uri)
            if client.get_experiment_by_name(experiment) is None:
                # Of a file: beside it, instead of in the working folder. A server knows a place of its own.
                local = tracking_uri.partition("sqlite:///")[2]
                place = (Path(local).absolute().parent / "artifacts").as_uri() if local else None
                with contextlib.suppress(MlflowException):  # another process has just made it
                    client.create_experiment(experiment, place)
            super().__init__(experiment, run.path.name, tracking_uri, run_id=kept)
            there = self.experiment.get_run(self.run_id).data
            self.last = {  # the step of each curve's end: MLflow would keep twice what comes again
                name: max(point.step for point in client.get_metric_history(self.run_id, name))
                for name in there.metrics
            }
            client.update_run(self.run_id, "RUNNING")
        except MlflowException as error:
            raise UserError(f"logger.mlflow.tracking_uri={tracking_uri}: {str(error).splitlines()[0]}") from error
        self.settings, self.step = set(there.params), max(self.last.values(), default=0)
        self.view_command = f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri)}"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.step = step or 0
        new = {name: value for name, value in metrics.items() if self.step > self.last.get(name, -1)}
        self.last |= dict.fromkeys(new, self.step)
        if new:
            super().log_metrics(new, self.step)

    def log_settings(self, settings: dict[str, Any]) -> None:
        # MLflow takes none twice: those of a run that goes on stay as they were.
        self.log_hyperparams({name: value for name, value in settings.items() if name not in self.settings})

    def log_image_grid(self, name: str, picture: Tensor, step: int) -> None:
        self.experiment.log_image(self.run_id, plotting.to_pil(picture), f"pictures/{name}/{step:06d}.png")

    def log_figure(self, name: str, figure: Any, step: int) -> None:
        self.experiment.log_figure(self.run_id, figure, f"{name}/{step:06d}.png")

    def log_final_metrics(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        self.log_metrics(metrics, self.step)

    def finalize(self, status: str = "success") -> None:
        """Lightning's, after training and again after the test; see `end`."""

    def finish(self, status: str) -> None:
        word = {"finished": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED")
        self.experiment.set_terminated(self.run_id, word)
