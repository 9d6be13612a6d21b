"""Sweeps: many jobs in one folder, that can be left alone, killed, started again and read afterwards. No torch here."""

import json
import logging
import math
import os
import re
import shutil
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from betavae.errors import UserError

log = logging.getLogger(__name__)

ONE_DEVICE = (
    "a sweep trains each job on one device: leave trainer.devices and trainer.num_nodes at 1 and run jobs side by side "
    "(hydra/launcher=joblib), or give up -m and start the runs on many devices one by one"
)


class Job(NamedTuple):
    """One job of a sweep, as its folder tells it."""

    folder: Path
    status: str  # finished, failed, diverged, interrupted, running, missing
    overrides: dict[str, str]
    record: dict[str, Any]  # metrics.json

    @property
    def test(self) -> dict[str, float]:
        return self.record.get("test", {}) if self.status == "finished" else {}


class Start(Callback):
    """Hydra calls this as a sweep starts (`hydra.callbacks` in train.yaml). It remembers the folder for `close`."""

    folder: Path | None = None
    search = False

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        trainer = config.trainer
        if any(item.lstrip("+").startswith("resume=") for item in config.hydra.overrides.task):
            raise SystemExit("error: resume goes with one run; go on with a sweep by hydra.sweep.dir=ITS_FOLDER")
        if trainer.num_nodes != 1 or (isinstance(trainer.devices, int) and trainer.devices not in (0, 1)):
            raise SystemExit(f"error: {ONE_DEVICE}")
        # Hydra turns an Exception of a callback into a warning, hence SystemExit above.
        Start.folder = Path(config.hydra.sweep.dir)
        Start.search = is_search(config.hydra)
        if Start.search:
            continue_study(config)


def is_search(hydra_cfg: Any) -> bool:
    """Whether a sweeper chooses the settings by the jobs' results; it must then hear which failed."""
    return not hydra_cfg.sweeper["_target_"].endswith(".BasicSweeper")


def job(task: Callable[[DictConfig], float], cfg: DictConfig) -> float:
    """Run a job; in a sweep, in a folder that may hold an earlier try of it: finished jobs are kept, interrupted ones
    go on from their last checkpoint, failed ones are tried afresh. Returns what a search minimises."""
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode != RunMode.MULTIRUN:
        return task(cfg)
    folder = Path(os.path.relpath(hydra_cfg.runtime.output_dir))
    # Held by the process that works here, and let go by the system when it dies, however it dies.
    with FileLock(folder / ".lock"):
        if (status := claim(folder, list(hydra_cfg.overrides.task))) == "finished":
            print(f"{folder.name} is finished already")
        else:
            cfg.resume = str(folder) if status == "interrupted" else None
            try:
                task(cfg)
            except Exception as error:
                failed(folder, error)
                print(f"failed: {error} ({folder / 'train.log'})")
                if cfg.debug:
                    traceback.print_exc()
                if is_search(hydra_cfg):
                    raise
                return math.nan  # and not an error, for which Hydra would leave out the batches to come
        return objective(folder)


def objective(folder: Path) -> float:
    """What a search goes by: the neg. ELBO on validation images, where there are any. Test images choose nothing."""
    record = read_record(folder)
    return record.get("validation", record["test"])["neg_elbo"]


def claim(folder: Path, overrides: list[str]) -> str:
    """What an earlier try left in a job's folder: "finished", "interrupted" (to be resumed), or "", cleared up."""
    listed = folder / "overrides.yaml"
    before = OmegaConf.to_container(OmegaConf.load(listed)) if listed.exists() else overrides
    if identity(before) != identity(overrides):  # type: ignore[arg-type]
        raise UserError(f"{folder} holds another job ({' '.join(before)}); choose another hydra.sweep.dir")  # type: ignore
    status = read_record(folder).get("status")
    if status == "finished":
        return "finished"
    if status in ("running", "interrupted") and (folder / "checkpoints" / "last.ckpt").exists():
        return "interrupted"
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (".lock", "train.log"):
            path.unlink()
    OmegaConf.save(OmegaConf.create(overrides), listed)
    return ""


def identity(overrides: list[str]) -> list[str]:
    """The overrides that make a job what it is: those that Hydra puts into the name of its folder."""
    ignored = HydraConfig.get().job.config.override_dirname.exclude_keys
    return sorted(item for item in overrides if item.split("=")[0].lstrip("+~") not in ignored)


def failed(folder: Path, error: Exception) -> None:
    """Leave status and traceback in the folder of a job that failed before `train` could."""
    record = read_record(folder)
    if record.get("status") in ("failed", "diverged"):
        return
    record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    with open(folder / "train.log", "a") as file:
        file.write("".join(traceback.format_exception(error)))


def read_record(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else {}


def read(sweep: Path) -> list[Job]:
    """The jobs in a sweep's folder, and those of its last command that have not begun."""
    if not sweep.is_dir():
        raise UserError(f"sweep: {sweep} is not a folder; name one like runs/sweeps/2026-01-31_12-00-00")
    found = [read_job(path.parent) for path in sorted(sweep.glob("*/overrides.yaml"))]
    found.sort(key=lambda job: [sort_key(value) for value in job.overrides.values()])
    begun = [sorted(job.overrides.items()) for job in found]
    for overrides in planned(sweep):
        if sorted(overrides.items()) not in begun:
            found.append(Job(sweep / "-", "missing", overrides, {}))
    return found


def read_job(folder: Path) -> Job:
    record = read_record(folder)
    status = record.get("status", "running")
    if status == "running":
        try:
            with FileLock(folder / ".lock", timeout=0):
                status = "interrupted"  # nobody holds it: its process was killed
        except (Timeout, OSError):
            pass
    listed: Any = OmegaConf.to_container(OmegaConf.load(folder / "overrides.yaml"))
    return Job(folder, status, as_settings(listed), record)


def planned(sweep: Path) -> list[dict[str, str]]:
    """The settings of every job of the grid that was last started in this folder."""
    path = sweep / "multirun.yaml"
    if not path.exists():
        return []
    hydra_cfg: Any = OmegaConf.load(path).hydra
    overrides = [f"{key}={value}" for key, value in (hydra_cfg.sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides(overrides + list(hydra_cfg.overrides.task))
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [as_settings(overrides) for batch in batches for overrides in batch]


def as_settings(overrides: list[str]) -> dict[str, str]:
    return dict(item.lstrip("+").split("=", 1) for item in overrides if "=" in item)


def sort_key(text: str) -> tuple[float, str]:
    """Numbers by value, before words."""
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text


def close(interrupted: bool = False) -> bool:
    """After a sweep: a table of its jobs and the names of those that failed. Returns whether any failed or is missing
    (of a search: whether all did); nothing is printed where no job began."""
    if Start.folder is None:
        return False
    jobs = read(Start.folder) if Start.folder.is_dir() else []
    if all(job.status == "missing" for job in jobs):
        if Start.folder.is_dir() and [path.name for path in Start.folder.iterdir()] == ["multirun.yaml"]:
            shutil.rmtree(Start.folder)  # stopped by an error before any job
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
    bad = [job for job in jobs if job.status in ("failed", "diverged")]
    for job in bad:
        print(f"failed: {job.record['error']} ({job.folder / 'train.log'})")
    if bad or interrupted:
        print(f"the same command with hydra.sweep.dir={Start.folder} keeps what is finished and retries the rest")
    print(f"sweep {Start.folder}\nnext  tensorboard --logdir {Start.folder}")
    print(f"      python scripts/sweep_report.py sweep={Start.folder}", flush=True)
    if Start.search:  # some settings may well fail
        return not any(job.status == "finished" for job in jobs)
    return bool(bad) or any(job.status == "missing" for job in jobs)


def continue_study(config: DictConfig) -> None:
    """Let an Optuna study go on where it was left: trials that were cut off are queued again (their folders hold their
    checkpoints), and `n_trials` counts those of earlier commands too."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="optuna")
    warnings.filterwarnings("ignore", message=".*is experimental")
    try:
        import optuna
        from optuna.trial import Trial, TrialState
    except ImportError:
        return  # Hydra says so
    sweeper = config.hydra.sweeper
    if "optuna" not in sweeper["_target_"] or not sweeper.storage or not sweeper.study_name:
        return
    Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)  # SQLite makes a file, no folder
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=sweeper.storage, study_name=sweeper.study_name, load_if_exists=True)
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.RUNNING:
            Trial(study, trial._trial_id).set_user_attr("interrupted", True)
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
    trials = study.get_trials(deepcopy=False)
    done = [t for t in trials if t.state != TrialState.WAITING and "interrupted" not in t.user_attrs]
    with open_dict(config):
        sweeper.n_trials = max(0, sweeper.n_trials - len(done))
        if sweeper.sampler.get("seed") is not None:
            sweeper.sampler.seed += len(trials)  # or it would propose the first trials again


def explain(error: Exception) -> str | None:
    """One sentence for an error of a launcher or a sweeper, or None."""
    text = str(error)
    if match := re.search(r"hydra/(launcher|sweeper)/(\w+)'|hydra_plugins\.hydra_(\w+?)_(?:launcher|sweeper)", text):
        name = match[2] or match[3]
        extra = {"joblib": "sweep", "submitit_slurm": "slurm", "submitit_local": "slurm", "submitit": "slurm"}.get(
            name, name
        )
        if extra in ("sweep", "optuna", "slurm", "ray"):
            return f'{name} is not installed; it comes with `pip install -e ".[{extra}]"`'
    if 'Could not detect "srun"' in text:
        return "there is no Slurm here; hydra/launcher=joblib runs the jobs on this machine"
    if Start.search and isinstance(error, ValueError):
        if "distribution" in text or "CategoricalDistribution" in text:
            return f"the study in {Start.folder} searched other values ({text}); choose another hydra.sweep.dir"
        if text in ("Record does not exist.", "No trials are completed yet."):
            return "no trial of this search has finished, so there is no best one"
    return None
