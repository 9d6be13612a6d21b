"""Write rows that a model of a table made."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from betavae.errors import UserError
from betavae.runtime.checkpoint import TrainedRun
from betavae.storage.files import atomic_path, write_csv


def save_rows(
    run: TrainedRun, x: Tensor, out: str | Path, names: Sequence[str] = (), labels: Tensor | None = None
) -> None:
    """Save rows of a table `(N, C, 1, 1)`, as the model sees them, as FILE.csv in the units of the data.

    The rows of a conditional model also have the classes of their `labels` `(N,)`, in the column `data.label`.

    Raises:
        UserError: If `out` has another ending, or is a file that this project did not write.
    """
    if Path(out).suffix != ".csv":
        raise UserError(f"out={out} is invalid: expected FILE.csv for {run.path}, a model of a table")
    values = run.scaling.to_stored(x).flatten(1).T.tolist()
    columns: dict[str, Sequence[object]] = {"name": names} if names else {}
    columns |= dict(zip(run.columns or (), values, strict=True))
    if run.vae.classes and labels is not None:
        columns[str(run.data.get("label", "label"))] = [run.vae.classes[number] for number in labels]
    with atomic_path(out) as path:
        write_csv(path, columns)
