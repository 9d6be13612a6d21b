"""Where curves, pictures and settings go. Nothing but this file knows which kind of logger a run has."""

import contextlib
import csv
import importlib.util
import io
import logging
import os
import secrets
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from betavae import pictures
from betavae.errors import UserError
from betavae.files import STAMP, writing
from betavae.running.run_folder import RunFolder, ours

log = logging.getLogger(__name__)


class RunLogger(Logger):
    """What a run tells its loggers beside the scalars of `log_metrics`; not every one has a place for each.

    Made once it is sure that the run can be, in the process that writes. `state` is the checkpoint that the run goes
    on from; Lightning's `version` is what a logger is found by when it does, where its place is not the run folder.
    """

    look: str | None = None  # the command that shows what it keeps

    def log_settings(self, settings: dict[str, Any]) -> None:
        """By flat names, before the first step."""

    @abstractmethod
    def log_picture(self, name: str, picture: Tensor, step: int) -> None:
        """`picture` `(C, H, W)` in [0, 1]."""

    @abstractmethod
    def log_figure(self, name: str, figure: Any, step: int) -> None:
        """A figure of matplotlib."""

    def log_embedding(self, means: Tensor, labels: list[Any], tiles: Tensor) -> None:
        """Latent points `(N, latent_dim)`, each with a label and a picture `(3, H, W)`."""

    def log_outcome(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        """The settings again, with the test numbers that metrics.json has."""

    def position(self) -> dict[str, int]:
        """How far each of its files went, for a checkpoint: what comes later will come again."""
        return {}

    def end(self, status: str) -> None:
        """`status` is that of metrics.json."""


class TensorBoard(RunLogger, TensorBoardLogger):
    """TensorBoard's events straight in the run folder, and nothing else (no second copy of the settings)."""

    def __init__(self, run: RunFolder, state: dict[str, Any] | None):
        purge_step = state["global_step"] + 1 if state else None
        super().__init__(run.path, name="", version="", default_hp_metric=False, purge_step=purge_step)
        self.folder = run.path
        self.look = f"tensorboard --logdir {run.path.parent}"
        sizes = state.get("events", {}) if state else {}
        for path in filter(ours, run.path.glob("events.out.tfevents.*")):
            if size := sizes.get(path.name):
                os.truncate(path, min(size, path.stat().st_size))
            else:
                path.unlink()

    def save(self) -> None:
        self.experiment.flush()

    def finalize(self, status: str) -> None:
        self.save()  # not closed between fit and test, so that a run has one file of events

    def position(self) -> dict[str, int]:
        """In bytes."""
        self.save()
        return {path.name: path.stat().st_size for path in sorted(self.folder.glob("events.out.tfevents.*"))}

    def log_picture(self, name: str, picture: Tensor, step: int) -> None:
        enlarged = picture.repeat_interleave(2, 1).repeat_interleave(2, 2)
        self.experiment.add_image(f"pictures/{name}", (enlarged * 255).round().to(torch.uint8).cpu(), step)

    def log_figure(self, name: str, figure: Any, step: int) -> None:
        self.experiment.add_figure(name, figure, step)

    def log_embedding(self, means: Tensor, labels: list[Any], tiles: Tensor) -> None:
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


class CSV(RunLogger):
    """`curves.csv`, a row for each call, its first column the step; and `figures/NAME_STEP.png`. The settings are in
    config.yaml beside it. (Lightning's CSVLogger deletes the file of a run that goes on, and writes it anew, in place,
    with each new column: killed then, a run would lose it.)"""

    FILE = "curves.csv"
    name = version = ""  # type: ignore[assignment]

    def __init__(self, run: RunFolder, state: dict[str, Any] | None):
        self.folder, self.path = run.path, run.path / self.FILE
        self.columns: list[str] = []
        self.rows = (state.get("events", {}) if state else {}).get(self.FILE, 0)
        if self.rows:
            with open(self.path, newline="") as file:
                table = csv.DictReader(file)
                kept = [row for row, _ in zip(table, range(self.rows), strict=False)]
                self.columns = [name for name in table.fieldnames or () if name != f"made by {STAMP}"]
            self.write(kept)
        elif ours(self.path):
            self.path.unlink(missing_ok=True)

    def write(self, rows: list[dict[str, Any]]) -> None:
        with writing(self.path, "logger=csv") as part, open(part, "w", newline="") as file:
            table = csv.DictWriter(file, [*self.columns, f"made by {STAMP}"])
            table.writeheader()
            table.writerows(rows)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if new := [name for name in row if name not in self.columns]:
            rows = []
            if self.columns:
                with open(self.path, newline="") as file:
                    rows = list(csv.DictReader(file))
            self.columns += new
            self.write(rows)
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, [*self.columns, f"made by {STAMP}"]).writerow(row)
        self.rows += 1

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning's; see config.yaml."""

    def position(self) -> dict[str, int]:
        """In rows."""
        return {self.FILE: self.rows}

    def file(self, name: str, step: int) -> Path:
        return self.folder / "figures" / f"{name.replace('/', '_')}_{step:06d}.png"

    def log_picture(self, name: str, picture: Tensor, step: int) -> None:
        pictures.save_picture(picture, self.file(name, step))

    def log_figure(self, name: str, figure: Any, step: int) -> None:
        pictures.save_figure(figure, self.file(name, step))


class WeightsAndBiases(RunLogger, WandbLogger):
    """A run of W&B under the name of the run folder, its files in there. A run that goes on has the same id: online W&B
    drops the steps that come again; offline each session has a folder of its own, to be synced in their order."""

    def __init__(self, run: RunFolder, state: dict[str, Any] | None, project: str, entity: str | None, mode: str):
        import wandb

        kept = run.record().get("loggers", {}).get("wandb")
        try:
            experiment = wandb.init(
                project=project,
                entity=entity,
                mode=mode,  # type: ignore[arg-type]
                dir=run.path,
                name=run.path.name,
                id=kept or secrets.token_hex(4),
                resume="allow" if mode == "online" else None,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"logger.wandb: {str(error).splitlines()[0]} (or logger.wandb.mode=offline, and `wandb sync` later)"
            ) from error
        super().__init__(experiment=experiment)
        if mode == "online":
            self.look = experiment.url
            log.info("watch %s", self.look)
        else:
            again = "--append " if kept else ""
            self.look = f"wandb sync {again}{Path(os.path.relpath(experiment.dir)).parent}"

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        # By W&B's own count of steps, which tells it what it has already.
        self.experiment.log(dict(metrics), step=step)

    def log_settings(self, settings: dict[str, Any]) -> None:
        self.log_hyperparams(settings)

    def log_picture(self, name: str, picture: Tensor, step: int) -> None:
        self.log_image(f"pictures/{name}", [pictures.as_image(picture)], step)

    def log_figure(self, name: str, figure: Any, step: int) -> None:
        from PIL import Image

        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150)
        self.log_image(name, [Image.open(drawn)], step)

    def log_outcome(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        self.experiment.summary.update(metrics)

    def end(self, status: str) -> None:
        self.experiment.finish(exit_code=0 if status == "finished" else 1)


class MLflow(RunLogger, MLFlowLogger):
    """A run of MLflow under the name of the run folder; the pictures are its artifacts."""

    def __init__(self, run: RunFolder, state: dict[str, Any] | None, experiment: str, tracking_uri: str):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would tell its makers of each run
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        kept = run.record().get("loggers", {}).get("mlflow")
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
        self.look = f"mlflow ui --backend-store-uri {tracking_uri}"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.step = step or 0
        new = {name: value for name, value in metrics.items() if self.step > self.last.get(name, -1)}
        self.last |= dict.fromkeys(new, self.step)
        if new:
            super().log_metrics(new, self.step)

    def log_settings(self, settings: dict[str, Any]) -> None:
        # MLflow takes none twice: those of a run that goes on stay as they were.
        self.log_hyperparams({name: value for name, value in settings.items() if name not in self.settings})

    def log_picture(self, name: str, picture: Tensor, step: int) -> None:
        self.experiment.log_image(self.run_id, pictures.as_image(picture), f"pictures/{name}/{step:06d}.png")

    def log_figure(self, name: str, figure: Any, step: int) -> None:
        self.experiment.log_figure(self.run_id, figure, f"{name}/{step:06d}.png")

    def log_outcome(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        self.log_metrics(metrics, self.step)

    def finalize(self, status: str = "success") -> None:
        """Lightning's, after training and again after the test; see `end`."""

    def end(self, status: str) -> None:
        word = {"finished": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED")
        self.experiment.set_terminated(self.run_id, word)


# Each is called with the run's folder, the state it goes on from, and its settings.
LOGGERS = {"tensorboard": TensorBoard, "csv": CSV, "wandb": WeightsAndBiases, "mlflow": MLflow}


def start(settings: dict[str, dict[str, Any]], run: RunFolder, state: dict[str, Any] | None) -> dict[str, RunLogger]:
    """A run's loggers by name. Raises UserError for one that cannot be."""
    for name in settings:
        if name in ("wandb", "mlflow") and importlib.util.find_spec(name) is None:
            raise UserError(f'logger={name} needs the package {name}: pip install -e ".[{name}]"')
    return {name: LOGGERS[name](run, state, **values) for name, values in settings.items()}


def loggers_of(trainer: L.Trainer) -> list[RunLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, RunLogger)]
