"""Commands and folders of sweeps, for the tests of sweeps and searches."""

import shlex
from pathlib import Path
from typing import Any

from betavae.runtime.run_folder import read_json
from tests.commands import REPO

TRAIN = str(REPO / "train.py")
SMALL = ["trainer=smoke", "trainer.limit_train_batches=2", "callbacks.figures_every_n_epochs=0"]
SMALL += ["data.validation_size=200"]


def documented(part: str) -> list[str]:
    """Return the arguments of the command in docs/sweeps.md that contains a text."""
    lines = (REPO / "docs" / "sweeps.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(("python ", "optuna ")) and part in line]
    return shlex.split(line)[2 if line.startswith("python") else 1 :]


def find_job(sweep: Path, start: str) -> Path:
    """Find the only job folder whose name starts with a text."""
    (folder,) = sweep.glob(f"{start}*")
    return folder


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read metrics.json."""
    return read_json(folder / "metrics.json")
