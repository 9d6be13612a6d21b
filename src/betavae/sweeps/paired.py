"""Sweeps whose lists are paired value by value. Does not import torch."""

from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from betavae.errors import UserError
from betavae.sweeps.results import combine_axes, list_values, make_axes


def run_paired(typed: list[str], config: DictConfig, launcher: Launcher, loader: ConfigLoader) -> None:
    """Run one job for the first values of all lists, one for the second values, and so on.

    The lists of the keys in `hydra.sweeper.crossed` are not paired: each of their values runs with every pair.

    Args:
        typed: The overrides of the command line.
        config: The config of the sweep.
        launcher: Hydra's launcher of jobs.
        loader: Hydra's loader of configs.

    Raises:
        UserError: If the paired lists differ in length, before anything is written.
    """
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    values = {}
    for override in OverridesParser.create(loader).parse_overrides([*params, *typed]):
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise UserError(f"{override.input_line} is invalid: expected a list of values, since no search runs")
        values[override.get_key_element()] = list_values(override)
    crossed = list(config.hydra.sweeper.crossed)
    lengths = {key: len(texts) for key, texts in values.items() if len(texts) > 1 and key not in crossed}
    if len(set(lengths.values())) > 1:
        found = " and ".join(f"{key} has {length} values" for key, length in lengths.items())
        raise UserError(f"sweep=paired: {found}; expected lists of the same length")
    jobs = combine_axes(make_axes(values, crossed))
    for job in jobs:
        loader.load_sweep_config(config, job)  # raises the error of an invalid job before the first job runs
    folder = Path(config.hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "multirun.yaml")
    for returned in launcher.launch(jobs, initial_job_idx=0):
        returned.return_value  # noqa: B018 - raises the error of a job that could not use its folder
