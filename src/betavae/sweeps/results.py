"""Results of runs, read from their folders: jobs of a sweep and their metrics. Does not import torch."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep
from hydra.errors import HydraException

from betavae.errors import UserError
from betavae.runtime.run_folder import RunFolder, read_json, read_measurement
from betavae.runtime.settings import flatten
from betavae.runtime.yaml_files import read_yaml

STATUSES = ("finished", "failed", "diverged", "pruned", "interrupted", "running", "missing")
SEED_KEY = "seed"  # jobs that differ by it only repeat one setting
# Settings that do not change a result, so jobs that differ by them only are the same.
IGNORED_KEYS = (
    *("runs", "resume", "plugins", "tags", "traceback", "name"),
    *("callbacks.figures_every_n_epochs", "trainer.enable_progress_bar"),
)
UNNAMED_KEYS = ("sweep", "runs", "plugins", "tags", "traceback")  # as exclude_keys in configs/train.yaml
MAX_PLANNED_VALUES = 1_000_000  # values of all planned jobs of a sweep
SEARCH_FILE = "search.json"  # in the folder of a search: its objectives
RECORD_OBJECTIVES = ("seconds", "parameters")  # objectives of a search that are not validation metrics
MEASUREMENT_FILES = ("evaluation.json", "fidelity.json", "disentanglement.json")  # of scripts, in a run folder
METRIC_NAMES = {
    **{"neg_elbo": "neg. ELBO", "kl": "KL", "recon": "recon", "active_units": "active units"},
    **{"fid": "Fréchet distance", "mig": "MIG", "factor_vae_score": "FactorVAE score"},
}


class Job(NamedTuple):
    """One job of a sweep, as its folder records it."""

    folder: Path
    status: str  # one of STATUSES
    overrides: dict[str, str]
    record: dict[str, Any]  # metrics.json

    @property
    def test(self) -> dict[str, float]:
        return self.record.get("test", {}) if self.status == "finished" else {}


class SettingGroup(NamedTuple):
    """The jobs that differ by their seed only, and the values of the swept settings that they share."""

    values: dict[str, str]
    jobs: list[Job]

    @property
    def finished(self) -> list[Job]:
        return [job for job in self.jobs if job.status == "finished"]

    @property
    def label(self) -> str:
        return ", ".join(f"{shorten_key(key)}={value}" for key, value in self.values.items()) or "all jobs"

    def mean_sd(self, metric: str) -> tuple[float, float]:
        """Return the mean and the standard deviation of a metric over finished seeds."""
        return mean_sd([metrics[metric] for metrics in map(read_job_metrics, self.finished) if metric in metrics])


class EvaluatedRun(NamedTuple):
    """A run that `scripts/evaluate.py` has evaluated."""

    overrides: list[str]
    config: dict[str, Any]  # by dotted keys
    record: dict[str, Any]  # metrics.json
    evaluation: dict[str, Any]  # evaluation.json


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation; nan if there are no values, or only one."""
    return fmean(values) if values else math.nan, stdev(values) if len(values) > 1 else math.nan


def format_mean_sd(mean: float, sd: float, digits: int = 2) -> str:
    """Format a mean ± standard deviation, without those that are nan."""
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" + ("" if math.isnan(sd) else f" ± {sd:.{digits}f}")


def read_jobs(sweep: Path) -> list[Job]:
    """Read the jobs in a sweep's folder, and list those of its last command that have not started."""
    if not sweep.is_dir():
        raise UserError(f"sweep: {sweep} is not a folder; pass one such as runs/sweeps/2026-01-31_12-00-00")
    jobs = [read_job(path.parent) for path in sorted(sweep.glob("*/overrides.yaml"))]
    jobs.sort(key=lambda job: [get_sort_key(value) for value in job.overrides.values()])
    started = [sorted(job.overrides.items()) for job in jobs]
    for overrides in list_planned_jobs(sweep):
        if sorted(overrides.items()) not in started:
            jobs.append(Job(sweep / "-", "missing", overrides, {}))
    return jobs


def read_job(folder: Path) -> Job:
    run = RunFolder(folder)
    overrides = parse_overrides(read_yaml(folder / "overrides.yaml", list))
    status = run.status() or ("running" if run.is_locked() else "interrupted")
    return Job(folder, status, overrides, run.read_metrics())


def list_planned_jobs(sweep: Path) -> list[dict[str, str]]:
    """List the overrides of every job of the grid that was last started in this folder.

    Raises:
        UserError: If there are more than `MAX_PLANNED_VALUES`.
    """
    path = sweep / "multirun.yaml"
    if not path.exists():
        return []
    settings = flatten(read_yaml(path), depth=3)
    params, task = settings.get("hydra.sweeper.params"), settings.get("hydra.overrides.task")
    overrides = [f"{key}={value}" for key, value in (params if isinstance(params, dict) else {}).items()]
    overrides += task if isinstance(task, list) else []
    values: dict[str, list[str]] = {}
    axes: list[list[list[str]]] = []
    try:
        for item in OverridesParser.create().parse_overrides(list(map(str, overrides))):
            value = item.value()
            if isinstance(value, ChoiceSweep | RangeSweep):
                value.shuffle = False  # shuffling would list all numbers of a range
            values[item.get_key_element()] = list_values(item, MAX_PLANNED_VALUES + 1)
            axes = make_axes(values, settings.get("hydra.sweeper.crossed"))
            if math.prod(len(lists[0]) for lists in axes) * len(values) > MAX_PLANNED_VALUES:
                raise UserError(f"{path} is too large: its jobs have more than {MAX_PLANNED_VALUES:,} settings")
    except (HydraException, RecursionError):  # a glob, which needs the config folder, or a damaged file
        return []
    return [parse_overrides(job) for job in combine_axes(axes)]


def list_values(override: Override, limit: int | None = None) -> list[str]:
    """List the values of an override as `key=value`, at most `limit`."""
    swept = override.is_sweep_override()
    texts = override.sweep_string_iterator() if swept else iter([override.get_value_element_as_str()])
    return [f"{override.get_key_element()}={text}" for text in itertools.islice(texts, limit)]


def make_axes(values: dict[str, list[str]], crossed: Sequence[str] | None) -> list[list[list[str]]]:
    """Arrange the `key=value` of each key as the axes of a grid, each with the lists that vary together.

    Args:
        values: The `key=value` of each key.
        crossed: Keys with an axis of their own, while all other lists share one axis; None for a full grid.
    """
    paired = {k: v for k, v in values.items() if crossed is not None and len(v) > 1 and k not in crossed}
    alone = [[texts] for key, texts in values.items() if key not in paired]
    return [list(paired.values()), *alone] if paired else alone


def combine_axes(axes: Sequence[Sequence[Sequence[str]]]) -> list[list[str]]:
    """List the overrides of each job of a grid."""
    jobs = itertools.product(*(zip(*lists, strict=True) for lists in axes))
    return [list(itertools.chain.from_iterable(job)) for job in jobs]


def parse_overrides(overrides: Sequence[Any]) -> dict[str, str]:
    """Parse the overrides of a job, without those that its folder's name leaves out."""
    pairs = dict(str(item).lstrip("+").split("=", 1) for item in overrides if "=" in str(item))
    return {key: value for key, value in pairs.items() if key not in UNNAMED_KEYS}


def get_sort_key(text: str) -> tuple[float, str]:
    """Return a key that sorts numbers by value and before words."""
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text


def format_status_counts(jobs: Sequence[Job]) -> str:
    """Format how many jobs have which status: `30 jobs: 14 finished, 16 pruned`."""
    statuses = [job.status for job in jobs]
    counts = [f"{statuses.count(status)} {status}" for status in STATUSES if status in statuses]
    return f"{len(jobs)} jobs: {', '.join(counts)}"


def get_objectives(record: dict[str, Any], objectives: Sequence[str]) -> list[float]:
    """Return the objectives of a search from a job's record; empty if the job never validated."""
    known = record.get("validation", {}) | {name: record[name] for name in RECORD_OBJECTIVES if name in record}
    return [float(known[name]) for name in objectives] if set(objectives) <= known.keys() else []


def read_job_metrics(job: Job) -> dict[str, float]:
    """Read the metrics of a finished job: of its test, of later measurements, and its seconds.

    A later measurement has the name it has in its file, such as `fid`, or below a key of that file `mixture.fid`. The
    test metric wins over a measurement of the same name.
    """
    metrics: dict[str, float] = {}

    def add(prefix: str, content: dict[str, Any]) -> None:
        for key, value in content.items():
            mean = value.get("mean", value.get("value")) if isinstance(value, dict) else value
            if isinstance(mean, float):  # integers are settings of the measurement
                metrics[prefix + key] = mean
            elif isinstance(value, dict) and not prefix:
                add(f"{key}.", value)

    for file in MEASUREMENT_FILES:
        add("", read_measurement(job.folder / file))
    return {**metrics, **job.test, "seconds": job.record["seconds"]}


def find_latest_sweep(sweeps: Path) -> Path:
    found = [path for path in sweeps.glob("*") if any(path.glob("*/overrides.yaml"))]
    if not found:
        raise UserError(f"no sweep under {sweeps}/: run one by `python train.py -m beta=1,4`, or pass sweep=PATH")
    return max(found, key=lambda path: path.stat().st_mtime)


def group_jobs(sweep: Path) -> list[SettingGroup]:
    """Group the jobs of a sweep by their swept settings without the seed, sorted by value."""
    jobs = read_jobs(sweep)
    if not jobs:
        raise UserError(f"sweep: {sweep} holds no job of a sweep; pass the folder that holds the jobs' folders")
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    rows = [{key: get_value(job, key) for key in keys} for job in jobs]
    # As numbers, since 1 and 1.0 are one value.
    swept = [key for key in keys if key != SEED_KEY and len({get_sort_key(row[key]) for row in rows}) > 1]
    groups: dict[tuple[tuple[float, str], ...], SettingGroup] = {}
    for job, row in zip(jobs, rows, strict=True):
        group = SettingGroup({key: row[key] for key in swept}, [])
        groups.setdefault(tuple(get_sort_key(row[key]) for key in swept), group).jobs.append(job)
    return [groups[values] for values in sorted(groups)]


def get_value(job: Job, key: str) -> str:
    """Return the value of a setting from a job's command, or else from its config."""
    if key in job.overrides or job.status == "missing" or not (job.folder / "config.yaml").exists():
        return job.overrides.get(key, "default")
    value = flatten(read_yaml(job.folder / "config.yaml")).get(key)
    return "default" if value is None else str(value)


def shorten_key(key: str) -> str:
    return key.rsplit(".")[-1]


def read_evaluated_runs(runs: Path) -> list[EvaluatedRun]:
    """Read the evaluated runs under a folder, without those that were trained further since.

    Raises:
        UserError: If there is none, or one lacks a file.
    """
    found = []
    for path in sorted(runs.rglob("evaluation.json")):
        folder = path.parent
        if not (folder / "metrics.json").exists():  # no run, but evaluate.py with out=FOLDER
            continue
        try:
            record, evaluation = (json.loads(file.read_text()) for file in (folder / "metrics.json", path))
            overrides, config = read_yaml(folder / "overrides.yaml", list), read_yaml(folder / "config.yaml")
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is not a complete evaluated run: {error}") from error
        record["status"] = RunFolder(folder).status()  # a killed run is not running
        if read_measurement(path):
            found.append(EvaluatedRun(list(map(str, overrides)), flatten(config), record, evaluation))
    if not found:
        raise UserError(f"no evaluated run under {runs}/: evaluate one by `python scripts/evaluate.py ckpt=RUN_FOLDER`")
    return found


def find_unevaluated_runs(runs: Path) -> list[Path]:
    """Return finished runs under `runs` that are not evaluated with their weights, sorted by name."""
    finished = (
        path.parent for path in sorted(runs.rglob("metrics.json")) if read_json(path).get("status") == "finished"
    )
    return [folder for folder in finished if not read_measurement(folder / "evaluation.json")]
