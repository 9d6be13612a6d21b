"""Searches: Optuna proposes settings, Hydra's launcher runs the jobs, a study stores the results.

Does not import torch before a check needs it.
"""

import functools
import json
import logging
import math
import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from hydra.conf import HydraConf
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig
from pydantic import Field

from betavae.errors import UserError, first_line
from betavae.runtime.hydra_config import to_plain
from betavae.runtime.run_folder import RunFolder
from betavae.runtime.settings import NonEmptyStr, PositiveInt, Seed, Settings, check_settings, flatten, validate
from betavae.runtime.validation import METRICS, check_names, never_validates
from betavae.storage.files import STAMP, atomic_path
from betavae.sweeps.results import IGNORED_KEYS, RECORD_OBJECTIVES, SEARCH_FILE, get_objectives

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution as Distribution
    from optuna.storages import BaseStorage

    from betavae.data.datamodule import ImageDataModule

    Space = dict[str, Distribution]

STARTUP_TRIALS = 5  # trials that the pruner lets finish before it compares others with them
PERCENTILES = {"quartile": 25.0, "median": 50.0}  # of the finished trials that a trial must be among


class SearchSettings(Settings):
    """The settings `hydra.sweeper` of `sweep=optuna`."""

    study_name: NonEmptyStr
    storage: NonEmptyStr
    objectives: Annotated[list[NonEmptyStr], Field(min_length=1, max_length=2, examples=[["recon", "kl"]])]
    n_trials: PositiveInt
    n_jobs: PositiveInt
    sampler: Literal["tpe", "random"]
    pruner: Literal["quartile", "median", "hyperband", "none"]
    seed: Seed
    params: Annotated[
        dict[str, Any], Field(description="settings with their values, such as {beta: 'interval(0.5,4)'}")
    ]

    @property
    def prunes(self) -> bool:
        """Return whether trials may be pruned: only for a single objective that is known after each epoch."""
        return self.pruner != "none" and len(self.objectives) == 1 and self.objectives[0] not in RECORD_OBJECTIVES


def parse_search_settings(hydra_cfg: HydraConf) -> SearchSettings:
    values = {key: value for key, value in to_plain(hydra_cfg.sweeper).items() if key not in ("_target_", "trial")}
    return validate(SearchSettings, values, "hydra.sweeper.")


def import_optuna() -> Any:
    """Import Optuna and silence its log. Raise UserError if it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError('optuna is not installed; install it by `pip install -e ".[optuna]"`') from error
    logging.getLogger("alembic").setLevel(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def open_study(settings: SearchSettings, max_epochs: int) -> "Study":
    """Open the study of a search, or create it. Raise UserError if its storage is invalid."""
    optuna = import_optuna()
    pruner = optuna.pruners.NopPruner()
    if settings.prunes and settings.pruner in PERCENTILES:
        pruner = optuna.pruners.PercentilePruner(PERCENTILES[settings.pruner], n_startup_trials=STARTUP_TRIALS)
    elif settings.prunes:
        pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=max_epochs, reduction_factor=4)
    try:
        return optuna.create_study(
            study_name=settings.study_name,
            storage=open_storage(settings.storage),
            pruner=pruner,
            directions=["minimize"] * len(settings.objectives),
            load_if_exists=True,
        )
    except Exception as error:
        if "storage upgrade" in str(error):
            raise UserError(
                f"the study in {settings.storage} was made by an older Optuna; upgrade it by `optuna storage "
                f"upgrade --storage {shlex.quote(settings.storage)}`, or choose another hydra.sweep.dir"
            ) from error
        raise UserError(
            f"hydra.sweeper.storage={settings.storage} is not a storage of Optuna: {first_line(error)}"
        ) from error


def open_storage(storage: str) -> "BaseStorage":
    """Open a database by its URL, or a journal by its path."""
    storages = import_optuna().storages
    if "://" not in storage:
        return storages.JournalStorage(storages.journal.JournalFileBackend(storage))
    # Jobs side by side wait for each other longer than SQLite's five seconds.
    arguments = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {}
    return storages.RDBStorage(storage, engine_kwargs=arguments)


def parse_search_space(arguments: list[str], loader: ConfigLoader) -> "tuple[list[str], Space]":
    """Split `key=value` arguments, of which later ones win, into fixed and searched ones.

    Returns:
        The overrides that all trials share, and the distributions of the searched keys.

    Raises:
        UserError: If no key is searched, or Optuna has no such distribution.
    """
    last = {item.get_key_element(): item for item in OverridesParser.create(loader).parse_overrides(arguments)}
    searched = {key: make_distribution(item) for key, item in last.items() if item.is_sweep_override()}
    if not searched:
        raise UserError("hydra.sweeper.params: no setting is searched; pass one such as {beta: 'interval(0.5,4)'}")
    return [str(item.input_line) for key, item in last.items() if key not in searched], searched


def make_distribution(override: Override) -> "Distribution":
    """Convert Hydra's sweep syntax to a distribution of Optuna."""
    distributions = import_optuna().distributions
    value: Any = override.value()
    try:
        if override.is_interval_sweep():
            is_integer = isinstance(value.start, int) and isinstance(value.end, int)
            make = distributions.IntDistribution if is_integer else distributions.FloatDistribution
            return make(value.start, value.end, log="log" in value.tags)
        values: list[Any] = list(override.sweep_iterator(transformer=Transformer.encode))
        if override.is_range_sweep():
            is_integer = all(isinstance(number, int) for number in values)
            make = distributions.IntDistribution if is_integer else distributions.FloatDistribution
            return make(min(values), max(values), step=abs(value.step))
        return distributions.CategoricalDistribution(values)
    except ValueError as error:
        raise UserError(
            f"{override.input_line} is invalid: expected values that Optuna can search ({error})"
        ) from error


def check_objectives(first: DictConfig, objectives: list[str], searched: "Space") -> None:
    """Raise UserError if the first trial will not have the objectives."""
    values: Any = {key: to_plain(first[key]) for key in first if key != "hydra"}
    try:
        check_settings(values)
    except UserError:  # only some trials may have the invalid setting, and those fail
        return
    groups = {key.lstrip("+").partition(".")[0] for key in searched}

    @functools.cache
    def load_data() -> "ImageDataModule":
        from betavae.runtime.builders import build_data  # imported here, since torch takes seconds

        return build_data(values["data"])

    def build() -> tuple[Any, Any]:
        from betavae.module import VAEModule
        from betavae.runtime.training import module_arguments

        return load_data().splits["validation"], VAEModule(**module_arguments(values, load_data()))

    if not set(objectives) <= set(RECORD_OBJECTIVES) and not groups & {"data", "trainer"}:
        splits = load_data().splits if values["trainer"]["max_steps"] > 0 else None
        if reason := never_validates(values, splits):
            raise UserError(f"a search needs validation metrics, and its trials never validate ({reason})")
    if not groups & {"objective", "callbacks"}:
        if objectives == [values["callbacks"]["monitor"]]:  # the default, so the user typed the monitor
            check_names("callbacks.monitor", objectives, METRICS, values, build)
        else:
            check_names("hydra.sweeper.objectives", objectives, [*METRICS, *RECORD_OBJECTIVES], values, build)


def check_study(study: "Study", config: DictConfig, settings: SearchSettings, searched: "Space") -> None:
    """Raise UserError if a study has other fixed settings; store the settings of a new study."""
    values: Any = {key: to_plain(config[key]) for key in config if key != "hydra"}
    ignored = {key.lstrip("+") for key in searched} | set(IGNORED_KEYS)
    now = {key: value for key, value in flatten(values).items() if key not in ignored}
    now["hydra.sweeper.objectives"] = settings.objectives
    if (earlier := study.user_attrs.get("settings")) is None:
        study.set_user_attr("settings", now)
        study.set_metric_names(settings.objectives)
        return
    for key in sorted(earlier.keys() & now.keys()):
        if earlier[key] != now[key]:
            raise UserError(
                f"the study in {config.hydra.sweep.dir} has {key}={earlier[key]}, and this search has "
                f"{key}={now[key]}; choose another hydra.sweep.dir"
            )


def run_search(typed: list[str], config: DictConfig, launcher: Launcher, loader: ConfigLoader) -> None:
    """Run trials until `n_trials` have ended, including those of earlier commands.

    Interrupted trials come first.

    Args:
        typed: The overrides of the command line.
        config: The config of the sweep.
        launcher: Hydra's launcher of jobs.
        loader: Hydra's loader of configs.

    Raises:
        UserError: For invalid settings, before anything is written.
    """
    settings = parse_search_settings(config.hydra)
    fixed, searched = parse_search_space([f"{key}={value}" for key, value in settings.params.items()] + typed, loader)
    distributions: dict[str, Any] = searched
    sample = {key: item.choices[0] if hasattr(item, "choices") else item.low for key, item in distributions.items()}
    first = loader.load_sweep_config(config, format_trial_overrides(fixed, sample, 0))
    check_objectives(first, settings.objectives, searched)
    if settings.pruner != "none" and not settings.prunes:
        objectives = " and ".join(settings.objectives)
        print(f"no trial is pruned: a pruner needs a single validation metric, and the objectives are {objectives}")
    folder = Path(config.hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)  # SQLite does not make folders
    study = open_study(settings, first.trainer.max_epochs)
    check_study(study, config, settings, searched)
    set_sampler(study, settings)
    with atomic_path(folder / SEARCH_FILE, "hydra.sweep.dir") as path:
        path.write_text(json.dumps({"made_by": STAMP, "objectives": settings.objectives}))

    interrupted, remaining = find_interrupted_trials(study, searched, settings.n_trials)
    job_number = 0
    while remaining > 0:
        size = min(remaining, settings.n_jobs)
        batch, interrupted = interrupted[:size], interrupted[size:]
        batch += [ask_trial(study, searched, folder) for _ in range(size - len(batch))]
        jobs = [format_trial_overrides(fixed, trial.params, trial.number) for trial in batch]
        returned: Any
        for trial, returned in zip(batch, launcher.launch(jobs, initial_job_idx=job_number), strict=True):
            if returned.status != JobStatus.COMPLETED:
                returned.return_value  # noqa: B018 - raises the error of a job that could not use its folder
            tell_result(
                study, trial.number, RunFolder(returned.hydra_cfg.hydra.runtime.output_dir), settings.objectives
            )
        remaining, job_number = remaining - size, job_number + size
    print_best(study, settings.objectives)


def set_sampler(study: "Study", settings: SearchSettings) -> None:
    """Set the sampler of a study."""
    samplers = import_optuna().samplers
    # The seed depends on the number of trials, or a resumed search would propose its first trials again.
    seed = (settings.seed + len(study.get_trials(deepcopy=False))) % 2**32
    study.sampler = (samplers.TPESampler if settings.sampler == "tpe" else samplers.RandomSampler)(seed=seed)


def find_interrupted_trials(study: "Study", searched: "Space", n_trials: int) -> tuple[list[Any], int]:
    """Return the interrupted trials of earlier commands, and how many trials remain to be run."""
    states = import_optuna().trial.TrialState
    trials = study.get_trials(deepcopy=False)
    interrupted = []
    for trial in trials:
        if trial.state == states.RUNNING:
            if trial.params.keys() == searched.keys():
                interrupted.append(trial)
            else:  # killed while it was drawn
                study.tell(trial.number, state=states.FAIL, skip_if_finished=True)
    ended = [trial for trial in trials if trial.state.is_finished() and trial.params.keys() == searched.keys()]
    return interrupted, n_trials - len(ended)


def format_trial_overrides(fixed: list[str], params: dict[str, Any], number: int) -> list[str]:
    return [*fixed, *(f"{key}={value}" for key, value in params.items()), f"hydra.sweeper.trial={number}"]


def ask_trial(study: "Study", searched: "Space", folder: Path) -> "Trial":
    """Ask the study for a trial. Raise UserError if it has searched other values of a setting."""
    try:
        return study.ask(searched)
    except ValueError as error:
        raise UserError(
            f"the study in {folder} has searched other values ({error}); choose another hydra.sweep.dir"
        ) from error


def tell_result(study: "Study", number: int, run: RunFolder, objectives: list[str]) -> None:
    """Tell the study the result of a trial from its folder."""
    record = run.read_metrics()
    is_finished = record.get("status") == "finished"
    values = get_objectives(record, objectives) if is_finished else []
    if is_finished and not values:
        print(f"trial {number} counts as failed: it ended before its first validation, so it has no {objectives}")
    states = import_optuna().trial.TrialState
    if values and all(map(math.isfinite, values)):
        study.tell(number, values, skip_if_finished=True)
    else:
        state = states.PRUNED if record.get("status") == "pruned" else states.FAIL
        study.tell(number, state=state, skip_if_finished=True)


def print_best(study: "Study", objectives: list[str]) -> None:
    """Print the best trial, or the Pareto front of two objectives. Raise UserError if none has finished."""
    if not (best := study.best_trials):
        raise UserError("no trial of this search has finished, so there is no best one")
    for trial in best if len(objectives) > 1 else best[:1]:
        values = "  ".join(f"{name} {value:.2f}" for name, value in zip(objectives, trial.values, strict=True))
        print(f"best  {values}  {' '.join(f'{key}={value}' for key, value in trial.params.items())}")
