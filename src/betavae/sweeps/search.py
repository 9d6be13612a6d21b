"""A search: Optuna proposes settings, Hydra's launcher runs them as jobs, and the study keeps what came of each. No
torch here."""

import functools
import json
import logging
import math
import shlex
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from betavae.errors import UserError, first_line
from betavae.runtime.hydra_config import to_plain
from betavae.runtime.run_folder import RunFolder
from betavae.runtime.settings import NonEmptyStr, PositiveInt, Seed, Settings, check_settings, flatten, validate
from betavae.runtime.validation import METRICS, check_names, never_validates
from betavae.storage.files import STAMP, atomic_path
from betavae.sweeps.jobs import IGNORED_KEYS, RECORD_OBJECTIVES, SEARCH_FILE, objective_values

STARTUP_TRIALS = 5  # trials that run to their end before others are measured by them
PERCENTILES = {"quartile": 25.0, "median": 50.0}  # the percentage of the finished trials that a trial must be among


class SearchSettings(Settings):
    """`hydra.sweeper` of `sweep=optuna`."""

    study_name: NonEmptyStr
    storage: NonEmptyStr
    objectives: Annotated[list[NonEmptyStr], Field(min_length=1, max_length=2, examples=[["recon", "kl"]])]
    n_trials: PositiveInt
    n_jobs: PositiveInt
    sampler: Literal["tpe", "random"]
    pruner: Literal["quartile", "median", "hyperband", "none"]
    seed: Seed
    params: Annotated[
        dict[str, Any], Field(description="keys, each with what it may be, such as {beta: 'interval(0.5,4)'}")
    ]

    @property
    def prunes(self) -> bool:
        """Only a single number that is known after each epoch can say that a trial is hopeless."""
        return self.pruner != "none" and len(self.objectives) == 1 and self.objectives[0] not in RECORD_OBJECTIVES


def search_settings(hydra_cfg: Any) -> SearchSettings:
    """Of a search's Hydra config. Raises UserError for a setting that cannot be."""
    values = {key: value for key, value in to_plain(hydra_cfg.sweeper).items() if key not in ("_target_", "trial")}
    return validate(SearchSettings, values, "hydra.sweeper.")


def import_optuna() -> Any:
    """Optuna, and quiet. Raises UserError if it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError('optuna is not installed; it comes with `pip install -e ".[optuna]"`') from error
    logging.getLogger("alembic").setLevel(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def open_study(settings: SearchSettings, max_epochs: int) -> Any:
    """The study, made where there is none. Raises UserError if it cannot be opened."""
    optuna = import_optuna()
    pruner = optuna.pruners.NopPruner()
    if settings.prunes and settings.pruner in PERCENTILES:
        pruner = optuna.pruners.PercentilePruner(PERCENTILES[settings.pruner], n_startup_trials=STARTUP_TRIALS)
    elif settings.prunes:
        pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=max_epochs, reduction_factor=4)
    try:
        return optuna.create_study(
            study_name=settings.study_name,
            storage=open_storage(optuna, settings.storage),
            pruner=pruner,
            directions=["minimize"] * len(settings.objectives),
            load_if_exists=True,
        )
    except Exception as error:
        if "storage upgrade" in str(error):
            raise UserError(
                f"the study in {settings.storage} is of an older Optuna; bring it up to date by `optuna storage "
                f"upgrade --storage {shlex.quote(settings.storage)}`, or name another hydra.sweep.dir"
            ) from error
        raise UserError(f"hydra.sweeper.storage={settings.storage} cannot be opened ({first_line(error)})") from error


def open_storage(optuna: Any, storage: str) -> Any:
    """A database by its URL, or a journal by its path."""
    if "://" not in storage:
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    # Jobs side by side write to it: they wait for each other longer than SQLite's five seconds.
    patience = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(storage, engine_kwargs=patience)


def search_space(arguments: list[str], loader: ConfigLoader) -> tuple[list[str], dict[str, Any]]:
    """Of `key=value` arguments, the later over the earlier: those of every trial, and Optuna's distributions of the
    keys that are searched. Raises UserError for one that Optuna cannot search, and if there is none."""
    last = {item.get_key_element(): item for item in OverridesParser.create(loader).parse_overrides(arguments)}
    searched = {key: distribution(item) for key, item in last.items() if item.is_sweep_override()}
    if not searched:
        raise UserError("hydra.sweeper.params: nothing is searched; name a key, such as {beta: 'interval(0.5,4)'}")
    return [str(item.input_line) for key, item in last.items() if key not in searched], searched


def distribution(override: Override) -> Any:
    distributions = import_optuna().distributions
    value: Any = override.value()
    try:
        if override.is_interval_sweep():
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            make = distributions.IntDistribution if whole else distributions.FloatDistribution
            return make(value.start, value.end, log="log" in value.tags)
        values: list[Any] = list(override.sweep_iterator(transformer=Transformer.encode))
        if override.is_range_sweep():
            whole = all(isinstance(one, int) for one in values)
            make = distributions.IntDistribution if whole else distributions.FloatDistribution
            return make(min(values), max(values), step=abs(value.step))
        return distributions.CategoricalDistribution(values)
    except ValueError as error:
        raise UserError(f"{override.input_line} cannot be searched ({error})") from error


def check_objectives(first: DictConfig, objectives: list[str], searched: dict[str, Any]) -> None:
    """Raise UserError if trials, of which one is `first`, will not have the numbers that are to be made small."""
    values: Any = {key: to_plain(first[key]) for key in first if key != "hydra"}
    try:
        check_settings(OmegaConf.create(values))
    except UserError:  # of some trials perhaps, and those fail
        return
    groups = {key.lstrip("+").partition(".")[0] for key in searched}

    @functools.cache
    def data() -> Any:
        from betavae.runtime.builders import build_data  # late, since torch takes seconds

        return build_data(values["data"])

    def built() -> tuple[Any, Any]:
        from betavae.module import VAEModule
        from betavae.runtime.training import module_arguments

        return data().splits["validation"], VAEModule(**module_arguments(values, data()))

    known = set(objectives) <= set(RECORD_OBJECTIVES) or groups & {"data", "trainer"}
    sets = data().splits if not known and values["trainer"]["max_steps"] > 0 else None
    if not known and (why := never_validates(values, sets)):
        raise UserError(f"a search chooses by validation numbers, and its trials never validate ({why})")
    if not groups & {"objective", "callbacks"}:
        if objectives == [values["callbacks"]["monitor"]]:  # the default, so what was typed is the monitor
            check_names("callbacks.monitor", objectives, METRICS, values, built)
        else:
            check_names("hydra.sweeper.objectives", objectives, [*METRICS, *RECORD_OBJECTIVES], values, built)


def check_study(study: Any, config: DictConfig, settings: SearchSettings, searched: dict[str, Any]) -> None:
    """Raises UserError if a study's trials had other settings than this search, what is searched aside."""
    values: Any = {key: to_plain(config[key]) for key in config if key != "hydra"}
    keys = {key.lstrip("+") for key in searched}
    now = {key: value for key, value in flatten(values).items() if key not in keys and key not in IGNORED_KEYS}
    now["hydra.sweeper.objectives"] = settings.objectives
    if (then := study.user_attrs.get("settings")) is None:
        study.set_user_attr("settings", now)
        study.set_metric_names(settings.objectives)
        return
    for key in sorted(then.keys() & now.keys()):
        if then[key] != now[key]:
            raise UserError(
                f"the study in {config.hydra.sweep.dir} is of {key}={then[key]}, and this search of {key}={now[key]}; "
                "name another hydra.sweep.dir"
            )


def search(typed: list[str], config: DictConfig, launcher: Launcher, loader: ConfigLoader) -> None:
    """Run trials until `n_trials` have ended, those of earlier commands too; what was cut off then goes on first.

    Raises UserError for settings that cannot be, before anything is written.
    """
    optuna = import_optuna()
    settings = search_settings(config.hydra)
    fixed, searched = search_space([f"{key}={value}" for key, value in settings.params.items()] + typed, loader)
    some = {key: item.choices[0] if hasattr(item, "choices") else item.low for key, item in searched.items()}
    first = loader.load_sweep_config(config, trial_overrides(fixed, some, 0))
    check_objectives(first, settings.objectives, searched)
    epochs = first.trainer.max_epochs
    if settings.pruner != "none" and not settings.prunes:
        print(f"no trial is pruned: after an epoch, {' and '.join(settings.objectives)} cannot say which is hopeless")
    folder = Path(config.hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)  # SQLite makes a file, no folder
    study = open_study(settings, epochs)
    check_study(study, config, settings, searched)
    trials = study.get_trials(deepcopy=False)
    seed = (settings.seed + len(trials)) % 2**32  # or a search that goes on would propose its first trials again
    sampler = optuna.samplers.TPESampler if settings.sampler == "tpe" else optuna.samplers.RandomSampler
    study.sampler = sampler(seed=seed)
    with atomic_path(folder / SEARCH_FILE, "hydra.sweep.dir") as path:
        path.write_text(json.dumps({"made_by": STAMP, "objectives": settings.objectives}))

    interrupted_trials = []
    for trial in trials:
        if trial.state == optuna.trial.TrialState.RUNNING:
            if trial.params.keys() == searched.keys():
                interrupted_trials.append(trial)
            else:  # killed while it was drawn
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
    ended = [trial for trial in trials if trial.state.is_finished() and trial.params.keys() == searched.keys()]
    left, begun = settings.n_trials - len(ended), 0
    while left > 0:
        size = min(left, settings.n_jobs)
        batch, interrupted_trials = interrupted_trials[:size], interrupted_trials[size:]
        batch += [ask(study, searched, folder) for _ in range(size - len(batch))]
        jobs = [trial_overrides(fixed, trial.params, trial.number) for trial in batch]
        returned: Any
        for trial, returned in zip(batch, launcher.launch(jobs, initial_job_idx=begun), strict=True):
            if returned.status != JobStatus.COMPLETED:
                returned.return_value  # noqa: B018 - raises what no training could: the folder is somebody else's
            tell(study, trial.number, RunFolder(returned.hydra_cfg.hydra.runtime.output_dir), settings.objectives)
        left, begun = left - size, begun + size
    print_best(study, settings.objectives)


def trial_overrides(fixed: list[str], params: dict[str, Any], number: int) -> list[str]:
    """The command line of a trial's job."""
    return [*fixed, *(f"{key}={value}" for key, value in params.items()), f"hydra.sweeper.trial={number}"]


def ask(study: Any, searched: dict[str, Any], folder: Path) -> Any:
    try:
        return study.ask(searched)
    except ValueError as error:
        raise UserError(
            f"the study in {folder} searched other values ({error}); choose another hydra.sweep.dir"
        ) from error


def tell(study: Any, number: int, run: RunFolder, objectives: list[str]) -> None:
    """What became of a trial, as its folder says."""
    record = run.read_metrics()
    values = objective_values(record, objectives) if record.get("status") == "finished" else []
    if record.get("status") == "finished" and not values:
        print(f"trial {number} counts as failed: it ended before its first validation, so it has no {objectives}")
    states = import_optuna().trial.TrialState
    if values and all(map(math.isfinite, values)):
        study.tell(number, values, skip_if_finished=True)
    else:
        state = states.PRUNED if record.get("status") == "pruned" else states.FAIL
        study.tell(number, state=state, skip_if_finished=True)


def print_best(study: Any, objectives: list[str]) -> None:
    if not (best := study.best_trials):
        raise UserError("no trial of this search has finished, so there is no best one")
    for trial in best if len(objectives) > 1 else best[:1]:
        values = "  ".join(f"{name} {value:.2f}" for name, value in zip(objectives, trial.values, strict=True))
        print(f"best  {values}  {' '.join(f'{key}={value}' for key, value in trial.params.items())}")
