"""Pruning of trials: a callback that reports to the study of the search while a job trains."""

from typing import TYPE_CHECKING

import lightning as L
from hydra.conf import HydraConf
from lightning.pytorch.callbacks import Callback

from betavae.errors import TrialPruned, UserError
from betavae.sweeps.search import SearchSettings, import_optuna, open_study, parse_search_settings

if TYPE_CHECKING:
    from optuna import Trial


def make_pruning_callbacks(hydra_cfg: HydraConf, max_epochs: int) -> list[Callback]:
    """Return the `PruningCallback` of a trial, or nothing for other jobs.

    The number of the trial comes with the job's config, which every launcher passes on.
    """
    if hydra_cfg.sweeper.get("trial") is None or not (settings := parse_search_settings(hydra_cfg)).prunes:
        return []
    return [PruningCallback(settings, hydra_cfg.sweeper.trial, max_epochs)]


class PruningCallback(Callback):
    """Report the objective after each validated epoch, and stop a trial that the study's pruner rejects.

    Steps of the study are epochs from 1 on. TrialPruned is raised when training ends early.

    Args:
        settings: The settings of the search.
        number: The number of the trial.
        max_epochs: The epochs of a trial that is not pruned.
    """

    trial: "Trial"

    def __init__(self, settings: SearchSettings, number: int, max_epochs: int):
        self.settings, self.number, self.max_epochs = settings, number, max_epochs
        self.reported: set[int] = set()
        self.is_validated, self.reason = False, ""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        study = open_study(self.settings, self.max_epochs)
        frozen = next((trial for trial in study.get_trials(deepcopy=False) if trial.number == self.number), None)
        if frozen is None:
            raise UserError(
                f"hydra.sweeper.storage={self.settings.storage} has no trial {self.number}; all jobs of a search must "
                "share one storage"
            )
        self.reported = set(frozen.intermediate_values)  # by an earlier try of this job
        # Optuna has no public way to open a trial that another process has asked for.
        self.trial = import_optuna().Trial(study, frozen._trial_id)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.is_validated = True

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        (objective,) = self.settings.objectives
        epoch, value = trainer.current_epoch + 1, trainer.callback_metrics.get(f"val/{objective}")
        if not self.is_validated or value is None:
            return
        self.is_validated = False
        if epoch not in self.reported:
            self.trial.report(float(value), epoch)
        if epoch < self.max_epochs and self.trial.should_prune():  # after the last epoch, pruning saves nothing
            self.reason = f"after epoch {epoch}, with a validation {objective} of {float(value):.2f}"
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.reason:
            raise TrialPruned(self.reason)
