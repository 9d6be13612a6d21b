"""Sweeps: many jobs in one folder, that can be left alone, killed, started again and read afterwards. No torch here."""

import contextlib
import itertools
import logging
import math
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, RangeSweep
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from betavae.errors import TrialPruned, UserError
from betavae.runtime import distributed
from betavae.runtime.cli import argument, gc_paused
from betavae.runtime.distributed import ONE_DEVICE_MESSAGE
from betavae.runtime.hydra_config import to_plain
from betavae.runtime.run_folder import MARKER_FILE, RUN, SWEEP, UNFINISHED, RunFolder, claim_folder
from betavae.runtime.settings import flatten
from betavae.runtime.yaml_files import read_yaml, write_yaml

log = logging.getLogger(__name__)

DONE_STATUSES = ("finished", "pruned")
MAX_VALUES = 1_000_000  # settings of all jobs of a sweep
SEARCH_FILE = "search.json"  # in a search's folder: what it makes small
RECORD_OBJECTIVES = ("seconds", "parameters")  # what a search can make small beside validation numbers
# What cannot change a result, and so does not make two jobs different.
IGNORED_KEYS = ("runs", "resume", "debug", "name", "callbacks.figures_every_n_epochs", "trainer.enable_progress_bar")


STATUSES = ("finished", "failed", "diverged", "pruned", "interrupted", "running", "missing")


class Job(NamedTuple):
    """One job of a sweep, as its folder tells it."""

    folder: Path
    status: str  # one of STATUSES
    overrides: dict[str, str]
    record: dict[str, Any]  # metrics.json

    @property
    def test(self) -> dict[str, float]:
        return self.record.get("test", {}) if self.status == "finished" else {}


class SweepCallback(Callback):
    """Hydra calls this as a sweep starts (`hydra.callbacks` in train.yaml). It keeps the folder for `print_jobs`."""

    folder: Path | None = None
    search = False
    made: ClassVar[list[Path]] = []  # the folders above it that were not there, the innermost first

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            self.start(config)
        except UserError as error:
            # Hydra turns an Exception of a callback into a warning.
            raise SystemExit(f"error: {error}") from error

    def start(self, config: DictConfig) -> None:
        trainer = config.trainer
        if any(item.lstrip("+").startswith("resume=") for item in config.hydra.overrides.task):
            raise UserError("resume goes with one run; go on with a sweep by hydra.sweep.dir=ITS_FOLDER")
        several = trainer.num_nodes != 1 or (isinstance(trainer.devices, int) and trainer.devices not in (0, 1))
        if several or distributed.externally_launched():
            raise UserError(ONE_DEVICE_MESSAGE)
        search = is_search(config.hydra)
        if chooses_by_validation(config.hydra) and config.data.validation_size == 0:
            raise UserError(
                "a search chooses by validation images, and data.validation_size=0 leaves none: give it a number"
            )
        folder = Path(config.hydra.sweep.dir)
        SweepCallback.made = [parent for parent in folder.parents if not parent.exists()]
        claim_folder(folder, SWEEP, "hydra.sweep.dir")
        SweepCallback.folder, SweepCallback.search = folder, search


def is_search(hydra_cfg: Any) -> bool:
    """Whether a sweeper chooses the settings by the jobs' results."""
    return not hydra_cfg.sweeper["_target_"].endswith(".BasicSweeper")


def chooses_by_validation(hydra_cfg: Any) -> bool:
    """Return whether a sweeper chooses the settings by validation numbers of the jobs."""
    return is_search(hydra_cfg) and not set(hydra_cfg.sweeper.get("objectives") or ["neg_elbo"]) <= set(
        RECORD_OBJECTIVES
    )


def run_job(cfg: DictConfig) -> float:
    """Run a job of a sweep, in a folder that may hold an earlier try of it.

    A finished or pruned job is kept. A job that was interrupted, or failed after its training, is resumed from its last
    checkpoint. Any other failed job starts again.

    Returns:
        The validation metric that the run monitors, or nan if the job has none.

    Raises:
        UserError: If the folder holds other files, or a job with other settings.
    """
    hydra_cfg = HydraConfig.get()
    run = RunFolder(os.path.relpath(hydra_cfg.runtime.output_dir))
    claim_folder(run.path, RUN, "hydra.sweep.dir")
    with run.lock(wait=True):
        status = previous_status(run, cfg, list(hydra_cfg.overrides.task))
        if status in DONE_STATUSES:
            print(f"{run.path.name} is already {status}")
            return monitored_value(run, cfg)
        cfg.resume = str(run.path) if status == "interrupted" else None
        try:
            with gc_paused():  # here, so that finished jobs do not wait for torch
                from betavae.runtime.training import train
                from betavae.sweeps.pruning import pruning_callbacks
            train(cfg, pruning_callbacks(hydra_cfg, cfg.trainer.max_epochs), chooses_by_validation(hydra_cfg))
        except TrialPruned:
            return math.nan
        except Exception as error:
            mark_failed(run, error)
            print(f"failed: {error} ({run.path / 'train.log'})")
            if cfg.debug:
                traceback.print_exc()
            return math.nan  # for an error, Hydra would skip the remaining batches of jobs
        return monitored_value(run, cfg)


def monitored_value(run: RunFolder, cfg: DictConfig) -> float:
    """On validation images: test images choose nothing."""
    return run.read_metrics().get("validation", {}).get(cfg.callbacks.monitor, math.nan)


def objective_values(record: dict[str, Any], objectives: Sequence[str]) -> list[float]:
    """Return what a search makes small, of a finished job; nothing where one of them is missing: it never validated."""
    known = record.get("validation", {}) | {name: record[name] for name in RECORD_OBJECTIVES if name in record}
    return [float(known[name]) for name in objectives] if set(objectives) <= known.keys() else []


def previous_status(run: RunFolder, cfg: DictConfig, overrides: list[str]) -> str:
    """What an earlier try left in a job's folder: "finished", "pruned", "interrupted" (to be resumed), or "", cleared
    up."""
    record = run.read_metrics()
    status = record.get("status", "")
    # What was killed while it was drawn, failed after its training, could not be resumed, or has a damaged record has
    # good weights.
    undrawn = status == "finished" and not record.get("displayed", True)
    goes_on = status in (*UNFINISHED, "") or undrawn or (status == "failed" and record.get("resumable", False))
    goes_on = goes_on and run.last.exists()
    if goes_on or status in DONE_STATUSES:
        if difference := first_difference(run.path / "config.yaml", cfg):
            key, then, now = difference
            raise UserError(
                f"{run.path} holds a job with {key}={then}, and this one {key}={now}: name another hydra.sweep.dir, "
                "or delete that folder"
            )
        return "interrupted" if goes_on else status
    run.delete_outputs()
    write_yaml(run.path / "overrides.yaml", overrides)
    return ""


def first_difference(path: Path, cfg: DictConfig) -> tuple[str, Any, Any] | None:
    """The first setting that differs between a config file and `cfg`, and its two values; what cannot change a result,
    and settings that the file is too old to have, aside."""
    then, now = flatten(read_yaml(path)), flatten(to_plain(cfg))
    for key in sorted({*then, *now} - set(IGNORED_KEYS)):
        newer = key not in then and key.startswith(("trainer.", "callbacks.", "objective."))
        if not newer and not key.startswith("logger.") and then.get(key) != now.get(key):
            return key, then.get(key), now.get(key)
    return None


def mark_failed(run: RunFolder, error: Exception) -> None:
    """Leave status and traceback in the folder of a job that failed before `train` could.

    A job that was to be resumed keeps its checkpoint: the next try resumes it.
    """
    record = run.read_metrics()
    if (status := record.get("status")) in ("failed", "diverged"):
        return
    resumable = status in (*UNFINISHED, "finished")
    run.write_record(record | {"status": "failed", "error": f"{type(error).__name__}: {error}", "resumable": resumable})
    with open(run.path / "train.log", "a") as file:
        file.write("".join(traceback.format_exception(error)))


def read_jobs(sweep: Path) -> list[Job]:
    """The jobs in a sweep's folder, and those of its last command that have not begun."""
    if not sweep.is_dir():
        raise UserError(f"sweep: {sweep} is not a folder; name one like runs/sweeps/2026-01-31_12-00-00")
    found = [read_job(path.parent) for path in sorted(sweep.glob("*/overrides.yaml"))]
    found.sort(key=lambda job: [sort_key(value) for value in job.overrides.values()])
    begun = [sorted(job.overrides.items()) for job in found]
    for overrides in planned_jobs(sweep):
        if sorted(overrides.items()) not in begun:
            found.append(Job(sweep / "-", "missing", overrides, {}))
    return found


def read_job(folder: Path) -> Job:
    run = RunFolder(folder)
    overrides = parse_overrides(read_yaml(folder / "overrides.yaml", list))
    return Job(folder, run.status() or "running", overrides, run.read_metrics())


def planned_jobs(sweep: Path) -> list[dict[str, str]]:
    """The settings of every job of the grid that was last started in this folder."""
    path = sweep / "multirun.yaml"
    if not path.exists():
        return []
    settings = flatten(read_yaml(path), depth=3)
    params, task = settings.get("hydra.sweeper.params"), settings.get("hydra.overrides.task")
    overrides = [f"{key}={value}" for key, value in (params if isinstance(params, dict) else {}).items()]
    overrides += task if isinstance(task, list) else []
    values: dict[str, list[str]] = {}
    try:
        for item in OverridesParser.create().parse_overrides(list(map(str, overrides))):
            key, value = item.get_key_element(), item.value()
            if isinstance(value, ChoiceSweep | RangeSweep):
                value.shuffle = False  # which would list all numbers of a range
            texts = item.sweep_string_iterator() if item.is_sweep_override() else [item.get_value_element_as_str()]
            values[key] = [f"{key}={text}" for text in itertools.islice(texts, MAX_VALUES + 1)]
            if math.prod(map(len, values.values())) * len(values) > MAX_VALUES:
                raise UserError(f"{path} is too large: its jobs have more than {MAX_VALUES:,} settings")
    except (HydraException, RecursionError):  # a glob, whose jobs only the config folder knows, or a damaged file
        return []
    return [parse_overrides(list(job)) for job in itertools.product(*values.values())]


def parse_overrides(overrides: list[Any]) -> dict[str, str]:
    return dict(str(item).lstrip("+").split("=", 1) for item in overrides if "=" in str(item))


def sort_key(text: str) -> tuple[float, str]:
    """Numbers by value, before words."""
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text


@contextlib.contextmanager
def sweep_summary() -> Iterator[None]:
    """Print the summary of the sweep that runs in the body, if one does; exit with 1 if a job failed."""
    try:
        yield
    except BaseException as error:
        print_summary(interrupted=isinstance(error, KeyboardInterrupt | SystemExit))
        raise
    if print_summary():
        sys.exit(1)


def print_summary(interrupted: bool = False) -> bool:
    """After a sweep: a table of its jobs and the names of those that failed. Returns whether any failed or is missing
    (of a search: whether all did); nothing is printed where no job began."""
    if SweepCallback.folder is None:
        return False
    jobs = read_jobs(SweepCallback.folder) if SweepCallback.folder.is_dir() else []
    if all(job.status == "missing" for job in jobs):
        remove_empty_sweep(SweepCallback.folder)
        return False
    rows = [
        (
            job.folder.name if job.status != "missing" else " ".join(f"{k}={v}" for k, v in job.overrides.items()),
            job.status,
            *(f"{job.test[name]:.2f}" if job.test else "" for name in ("neg_elbo", "kl", "recon")),
            f"{job.record['seconds']:.0f}" if job.test else "",
        )
        for job in jobs
    ]
    header = ("job", "status", "neg. ELBO", "rate", "distortion", "seconds")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print("\ntest, in nats per image:")
    for row in (header, *rows):
        cells = (cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(cells).rstrip())
    print(status_summary(jobs))
    for note in sorted({job.record["note"] for job in jobs if job.test and "note" in job.record}):
        print(f"note  {note}")
    bad = [job for job in jobs if job.status in ("failed", "diverged")]
    for job in bad:
        print(f"failed: {job.record.get('error', '')} ({job.folder / 'train.log'})")
    if bad or interrupted:
        again = argument("hydra.sweep.dir", SweepCallback.folder)
        print(f"the same command with {again} keeps what is finished and retries the rest")
    print(f"sweep {SweepCallback.folder}")
    print(f"next  python scripts/sweep_report.py {argument('sweep', SweepCallback.folder)}", flush=True)
    if any(next(job.folder.glob("events.out.tfevents.*"), None) for job in jobs):  # another logger says it for each job
        print(f"      tensorboard --logdir {shlex.quote(str(SweepCallback.folder))}", flush=True)
    if SweepCallback.search:  # some settings may well fail
        return not any(job.status == "finished" for job in jobs)
    return bool(bad) or any(job.status == "missing" for job in jobs)


def status_summary(jobs: Sequence[Job]) -> str:
    """`30 jobs: 14 finished, 16 pruned`"""
    found = [job.status for job in jobs]
    return f"{len(jobs)} jobs: " + ", ".join(
        f"{found.count(status)} {status}" for status in STATUSES if status in found
    )


def remove_empty_sweep(sweep: Path) -> None:
    """The folder of a sweep that was stopped by an error before any job."""
    if sweep.is_dir() and {path.name for path in sweep.iterdir()} <= {"multirun.yaml", MARKER_FILE}:
        for name in ("multirun.yaml", MARKER_FILE):
            (sweep / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds something
            for folder in (sweep, *SweepCallback.made):
                folder.rmdir()
