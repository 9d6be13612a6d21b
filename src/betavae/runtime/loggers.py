"""The loggers of a run by name, and those that write into the run folder."""

import csv
import importlib.util
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from betavae import plotting
from betavae.errors import UserError
from betavae.runtime.checkpoint import Checkpoint
from betavae.runtime.remote_loggers import MLflow, WeightsAndBiases
from betavae.runtime.run_folder import RunFolder, is_own_output
from betavae.runtime.run_logger import RunLogger
from betavae.runtime.settings import Config, check_signature
from betavae.storage.files import STAMP_COLUMN, atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TensorBoard(RunLogger, TensorBoardLogger):
    """TensorBoard events in the run folder itself, without a copy of the settings."""

    def __init__(self, run: RunFolder, state: Checkpoint | None):
        purge_step = state["global_step"] + 1 if state else None
        super().__init__(run.path, name="", version="", default_hp_metric=False, purge_step=purge_step)
        self.folder = run.path
        self.view_command = f"tensorboard --logdir {shlex.quote(str(run.path.parent))}"
        sizes = state.get("events", {}) if state else {}
        for path in filter(is_own_output, run.path.glob("events.out.tfevents.*")):
            if size := sizes.get(path.name):
                os.truncate(path, min(size, path.stat().st_size))
            else:
                path.unlink()

    def save(self) -> None:
        self.experiment.flush()

    def finalize(self, status: str) -> None:
        self.save()  # Lightning calls this between fit and test too, and a run has one file of events

    def resume_offsets(self) -> dict[str, int]:
        """Return the bytes of each file of events."""
        self.save()
        return {path.name: path.stat().st_size for path in sorted(self.folder.glob("events.out.tfevents.*"))}

    def log_image_grid(self, name: str, image: Tensor, step: int) -> None:
        enlarged = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
        self.experiment.add_image(f"pictures/{name}", (enlarged * 255).round().to(torch.uint8).cpu(), step)

    def log_figure(self, name: str, figure: "Figure", step: int) -> None:
        self.experiment.add_figure(name, figure, step)

    def log_embedding(self, means: Tensor, labels: list[int | list[int]], tiles: Tensor) -> None:
        # The projector needs three columns. The "step" is the name of the folder of its files.
        means = torch.nn.functional.pad(means, (0, max(0, 3 - means.shape[1])))
        self.experiment.add_embedding(means, labels, tiles, global_step="projector", tag="posterior_means")

    def log_final_metrics(self, settings: Config, metrics: dict[str, float]) -> None:
        """Fill the HPARAMS tab with flat settings and the test metrics."""
        from torch.utils.tensorboard.summary import hparams

        # Without torch's first summary, the list of columns, TensorBoard derives the columns from all runs, and puts
        # the settings that differ first.
        _, start, end = hparams(settings, metrics)
        writer = self.experiment._get_file_writer()
        writer.add_summary(start)
        writer.add_summary(end)

    def finish(self, status: str) -> None:
        self.experiment.close()


class CSVRunLogger(RunLogger):
    """`curves.csv` with a row per call, whose first column is the step, and `figures/NAME_STEP.png`.

    Lightning's CSVLogger deletes the file of a resumed run, and rewrites it in place for every new column, so that a
    run that is killed could lose it.
    """

    FILE = "curves.csv"
    name = version = ""

    def __init__(self, run: RunFolder, state: Checkpoint | None):
        self.folder, self.path = run.path, run.path / self.FILE
        self.columns: list[str] = []
        rows = self.read()[: (state.get("events", {}) if state else {}).get(self.FILE, 0)]
        self.rows = len(rows)
        if rows:
            self.write(rows)
        elif is_own_output(self.path):
            self.columns = []
            self.path.unlink(missing_ok=True)

    def read(self) -> list[dict[str, str]]:
        if not is_own_output(self.path):
            return []
        with open(self.path, newline="") as file:
            table = csv.DictReader(file)
            self.columns = [name for name in table.fieldnames or () if name != STAMP_COLUMN]
            return list(table)

    def write(self, rows: list[dict[str, Any]]) -> None:
        with atomic_path(self.path, "logger=csv") as part, open(part, "w", newline="") as file:
            table = csv.DictWriter(file, [*self.columns, STAMP_COLUMN])
            table.writeheader()
            table.writerows(rows)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if new := [name for name in row if name not in self.columns]:
            rows = self.read()
            self.columns += new
            self.write(rows)
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, [*self.columns, STAMP_COLUMN]).writerow(row)
        self.rows += 1

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the settings are in config.yaml."""

    def resume_offsets(self) -> dict[str, int]:
        """Return the number of rows."""
        return {self.FILE: self.rows}

    def file(self, name: str, step: int) -> Path:
        return self.folder / "figures" / f"{name.replace('/', '_')}_{step:06d}.png"

    def log_image_grid(self, name: str, image: Tensor, step: int) -> None:
        plotting.save_image(image, self.file(name, step))

    def log_figure(self, name: str, figure: "Figure", step: int) -> None:
        plotting.save_figure(figure, self.file(name, step))


# Each is called with the run folder, the checkpoint to resume from or None, and its settings.
LOGGERS = {"tensorboard": TensorBoard, "csv": CSVRunLogger, "wandb": WeightsAndBiases, "mlflow": MLflow}


def make_loggers(settings: dict[str, Config], run: RunFolder, state: Checkpoint | None) -> dict[str, RunLogger]:
    """Make the loggers of a run by name.

    Raises:
        UserError: If the package of a logger is missing, or it fails to start.
    """
    for name in settings:
        if name in ("wandb", "mlflow") and importlib.util.find_spec(name) is None:
            raise UserError(f'logger={name} needs the package {name}: pip install -e ".[{name}]"')
        check_signature(f"logger.{name}", LOGGERS[name], settings[name], run, state)
    return {name: LOGGERS[name](run, state, **values) for name, values in settings.items()}
