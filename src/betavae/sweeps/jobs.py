"""Jobs of a sweep, which may be left alone, killed and started again. Does not import torch."""

import contextlib
import math
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from betavae.errors import TrialPruned, UserError
from betavae.runtime import distributed
from betavae.runtime.cli import adapt_commands, argument, gc_paused, run_argument
from betavae.runtime.distributed import ONE_DEVICE_MESSAGE
from betavae.runtime.hydra_config import drop_optimizer_defaults, to_plain
from betavae.runtime.plugins import load_plugins
from betavae.runtime.run_folder import MARKER_FILE, RUN, SWEEP, UNFINISHED, RunFolder, claim_folder
from betavae.runtime.settings import flatten
from betavae.runtime.yaml_files import read_yaml, write_yaml
from betavae.sweeps.results import IGNORED_KEYS, RECORD_OBJECTIVES, Job, format_status_counts, read_jobs

DONE_STATUSES = ("finished", "pruned")
COLUMNS = ("job", "status", "neg. ELBO", "KL", "recon", "seconds")  # of the summary


class SweepCallback(Callback):
    """Check and claim the folder of a sweep when it starts; train.yaml names this class."""

    folder: Path | None = None
    is_search = False
    new_parents: ClassVar[list[Path]] = []  # the innermost first

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            self.start(config)
        except UserError as error:  # Hydra turns an Exception of a callback into a warning
            raise SystemExit(adapt_commands(f"error: {error}")) from error

    def start(self, config: DictConfig) -> None:
        """Claim the folder. Raise UserError for settings that no sweep allows."""
        load_plugins(to_plain(config.plugins))
        trainer = config.trainer
        if any(word.lstrip("+").startswith("resume=") for word in config.hydra.overrides.task):
            raise UserError("resume is for single runs; resume a sweep by hydra.sweep.dir=ITS_FOLDER")
        many_devices = trainer.num_nodes != 1 or (isinstance(trainer.devices, int) and trainer.devices not in (0, 1))
        if many_devices or distributed.externally_launched():
            raise UserError(ONE_DEVICE_MESSAGE)
        if needs_validation(config.hydra) and config.data.validation_size == 0:
            raise UserError("data.validation_size=0 is invalid: expected validation images, since a search needs them")
        folder = Path(config.hydra.sweep.dir)
        SweepCallback.new_parents = [parent for parent in folder.parents if not parent.exists()]
        claim_folder(folder, SWEEP, "hydra.sweep.dir")
        SweepCallback.folder, SweepCallback.is_search = folder, is_search(config.hydra)


def is_search(hydra_cfg: HydraConf) -> bool:
    """Return whether the sweeper chooses settings by the results of earlier jobs."""
    return not hydra_cfg.sweeper["_target_"].endswith((".BasicSweeper", ".Paired"))


def needs_validation(hydra_cfg: HydraConf) -> bool:
    """Return whether the sweeper chooses settings by validation metrics."""
    objectives = hydra_cfg.sweeper.get("objectives") or ["neg_elbo"]
    return is_search(hydra_cfg) and not set(objectives) <= set(RECORD_OBJECTIVES)


def run_job(cfg: DictConfig) -> float:
    """Run a job of a sweep, in a folder that may hold an earlier try of it.

    - A finished or pruned job is kept.
    - A job that was interrupted, or failed after its training, is resumed from its last checkpoint.
    - Any other failed job starts again.

    Returns:
        The validation metric that the run monitors, or nan if the job has none.

    Raises:
        UserError: If the folder holds other files, or a job with other settings.
    """
    hydra_cfg = HydraConfig.get()
    drop_optimizer_defaults(cfg)
    run = RunFolder(os.path.relpath(hydra_cfg.runtime.output_dir))
    claim_folder(run.path, RUN, "hydra.sweep.dir")
    with run.lock(wait=True):
        status = find_previous_status(run, cfg)
        if status in DONE_STATUSES:
            print(f"{run.path.name} is already {status}")
            return read_monitored_metric(run, cfg)
        cfg.resume = str(run.path) if status == "interrupted" else None
        if cfg.resume is None:
            run.delete_outputs()
            write_yaml(run.path / "overrides.yaml", list(hydra_cfg.overrides.task))
        try:
            with gc_paused():  # here, so that finished jobs do not wait for torch
                from betavae.runtime.training import train
                from betavae.sweeps.pruning import make_pruning_callbacks
            train(cfg, make_pruning_callbacks(hydra_cfg, cfg.trainer.max_epochs), needs_validation(hydra_cfg))
        except TrialPruned:
            return math.nan
        except Exception as error:
            mark_failed(run, error)
            print(adapt_commands(f"failed: {error} ({run.path / 'train.log'})"))
            if cfg.traceback:
                traceback.print_exc()
            return math.nan  # for an error, Hydra would skip the remaining batches of jobs
        return read_monitored_metric(run, cfg)


def read_monitored_metric(run: RunFolder, cfg: DictConfig) -> float:
    """Read the validation metric that a run monitors, since test images must not choose anything."""
    return run.read_metrics().get("validation", {}).get(cfg.callbacks.monitor, math.nan)


def find_previous_status(run: RunFolder, cfg: DictConfig) -> str:
    """Return how an earlier try of a job ended: "finished", "pruned", "interrupted" (resumable), or "".

    Raises:
        UserError: If the earlier try had other settings.
    """
    record = run.read_metrics()
    status = record.get("status", "")
    # These have good weights: a job that was killed while it drew its figures, failed after its training, was not
    # resumed successfully, or has a damaged record.
    is_undrawn = status == "finished" and not record.get("displayed", True)
    is_resumable = status in (*UNFINISHED, "") or (status == "failed" and record.get("resumable", False))
    is_resumable = (is_resumable or is_undrawn) and run.last.exists()
    if not is_resumable and status not in DONE_STATUSES:
        return ""
    if difference := find_first_difference(run.path / "config.yaml", cfg):
        key, earlier, now = difference
        raise UserError(
            f"{run.path} holds a job with {key}={earlier}, and this job has {key}={now}; choose another "
            "hydra.sweep.dir, or delete that folder"
        )
    return "interrupted" if is_resumable else status


def find_first_difference(path: Path, cfg: DictConfig) -> tuple[str, Any, Any] | None:
    """Find the first setting that differs between a config file and `cfg`: its key and both values.

    Settings that do not change a result are ignored.
    """
    earlier, now = flatten(read_yaml(path)), flatten(to_plain(cfg))
    for key in sorted({*earlier, *now} - set(IGNORED_KEYS)):
        if not key.startswith("logger.") and earlier.get(key) != now.get(key):
            return key, earlier.get(key), now.get(key)
    return None


def mark_failed(run: RunFolder, error: Exception) -> None:
    """Write the status and the traceback of a job that failed before `train` could write them.

    A job that was to be resumed keeps its checkpoint, so that the next try resumes it.
    """
    record = run.read_metrics()
    if (status := record.get("status")) in ("failed", "diverged"):
        return
    is_resumable = status in (*UNFINISHED, "finished")
    message = f"{type(error).__name__}: {error}"
    run.write_record(record | {"status": "failed", "error": message, "resumable": is_resumable})
    with open(run.path / "train.log", "a") as file:
        file.write("".join(traceback.format_exception(error)))


@contextlib.contextmanager
def sweep_summary() -> Iterator[None]:
    """Print the summary of the sweep that runs in the body, if one does; exit with 1 if a job failed."""
    try:
        yield
    except BaseException as error:
        print_summary(is_interrupted=isinstance(error, KeyboardInterrupt | SystemExit))
        raise
    if print_summary():
        sys.exit(1)


def print_summary(is_interrupted: bool = False) -> bool:
    """Print a table of the sweep's jobs, the failed ones and the next commands, if any job started.

    Returns:
        Whether a job failed or is missing; for a search, whether no job finished.
    """
    folder = SweepCallback.folder
    if folder is None:
        return False
    jobs = read_jobs(folder) if folder.is_dir() else []
    if all(job.status == "missing" for job in jobs):
        remove_empty_sweep(folder)
        return False
    print("\ntest, in nats per image:")
    print_table([COLUMNS, *map(format_job, jobs)])
    print(format_status_counts(jobs))
    for note in sorted({job.record["note"] for job in jobs if job.test and "note" in job.record}):
        print(f"note  {note}")
    failed = [job for job in jobs if job.status in ("failed", "diverged")]
    for job in failed:
        print(adapt_commands(f"failed: {job.record.get('error', '')} ({job.folder / 'train.log'})"))
    if failed or is_interrupted:
        again = argument("hydra.sweep.dir", folder)
        print(f"the same command with {again} keeps finished jobs and retries the others")
    print(f"sweep {folder}")
    print(adapt_commands(f"next  python scripts/sweep_report.py {run_argument('sweep', folder)}"), flush=True)
    if any(next(job.folder.glob("events.out.tfevents.*"), None) for job in jobs):  # other loggers say it for each job
        print(f"      tensorboard --logdir {shlex.quote(str(folder))}", flush=True)
    if SweepCallback.is_search:  # some settings may fail
        return not any(job.status == "finished" for job in jobs)
    return bool(failed) or any(job.status == "missing" for job in jobs)


def format_job(job: Job) -> Sequence[str]:
    """Format a job as a row with the `COLUMNS` of the summary."""
    is_missing = job.status == "missing"
    name = " ".join(f"{key}={value}" for key, value in job.overrides.items()) if is_missing else job.folder.name
    if not job.test:
        return (name, job.status, *[""] * (len(COLUMNS) - 2))
    metrics = (f"{job.test[metric]:.2f}" for metric in ("neg_elbo", "kl", "recon"))
    return (name, job.status, *metrics, f"{job.record['seconds']:.0f}")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print aligned rows; the first two columns hold text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())


def remove_empty_sweep(sweep: Path) -> None:
    """Remove the folder of a sweep that was stopped by an error before any job."""
    if sweep.is_dir() and {path.name for path in sweep.iterdir()} <= {"multirun.yaml", MARKER_FILE}:
        for name in ("multirun.yaml", MARKER_FILE):
            (sweep / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a folder is not empty
            for folder in (sweep, *SweepCallback.new_parents):
                folder.rmdir()
