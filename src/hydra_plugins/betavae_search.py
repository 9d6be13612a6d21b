"""Where Hydra looks for sweepers, and nowhere else. What this one does is in `betavae.sweeps.search`."""

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Search(Sweeper):
    def __init__(self, **settings: Any):
        """Hydra hands the settings over here as well as in the config."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self.given = config, launcher, hydra_context.config_loader

    def sweep(self, arguments: list[str]) -> None:
        from betavae.sweeps.search import search  # every command imports this file

        search(arguments, *self.given)
