"""The sweepers `Search` and `Paired`, in the package where Hydra looks for plugins."""

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Search(Sweeper):
    """Run a search by Optuna."""

    def __init__(self, **settings: Any):
        """Ignore the settings, which are also in the config."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self.context = config, launcher, hydra_context.config_loader

    def sweep(self, arguments: list[str]) -> None:
        from betavae.sweeps.search import run_search  # imported here, since every command imports this file

        run_search(arguments, *self.context)


class Paired(Search):
    """Run a sweep whose lists are paired value by value."""

    def sweep(self, arguments: list[str]) -> None:
        from betavae.sweeps.paired import run_paired

        run_paired(arguments, *self.context)
