"""What a job tells its search while it trains, and the end of a trial that is hopeless."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from betavae.errors import TrialPruned, UserError
from betavae.sweeps.search import SearchSettings, import_optuna, open_study, search_settings


def pruning_callbacks(hydra_cfg: Any, max_epochs: int) -> list[Callback]:
    """For a trial of a search that prunes: `Pruning`. `trial`, its number, comes with the job's config, which every
    launcher hands on."""
    if hydra_cfg.sweeper.get("trial") is None or not (settings := search_settings(hydra_cfg)).prunes:
        return []
    return [PruningCallback(settings, hydra_cfg.sweeper.trial, max_epochs)]


class PruningCallback(Callback):
    """After each epoch with a validation, its objective goes to the study as step `epoch`, from 1 up. Raises Pruned as
    training ends, if that was early because the study's pruner finds the trial hopeless."""

    def __init__(self, settings: SearchSettings, number: int, max_epochs: int):
        self.settings, self.number, self.max_epochs = settings, number, max_epochs
        self.validated, self.reason = False, ""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        study = open_study(self.settings, self.max_epochs)
        frozen = next((trial for trial in study.get_trials(deepcopy=False) if trial.number == self.number), None)
        if frozen is None:
            raise UserError(
                f"hydra.sweeper.storage={self.settings.storage} does not know trial {self.number} here: all jobs "
                "must see one storage"
            )
        self.reported = set(frozen.intermediate_values)  # by a job that was then killed
        # There is no public way to a trial that another process has asked for.
        self.trial = import_optuna().Trial(study, frozen._trial_id)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.validated = True

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        (objective,) = self.settings.objectives
        epoch, value = trainer.current_epoch + 1, trainer.callback_metrics.get(f"val/{objective}")
        if not self.validated or value is None:
            return
        self.validated = False
        if epoch not in self.reported:
            self.trial.report(float(value), epoch)
        if epoch < self.max_epochs and self.trial.should_prune():  # at its end there is nothing left to spare
            self.reason = f"after epoch {epoch}, with a validation {objective} of {float(value):.2f}"
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.reason:
            raise TrialPruned(self.reason)
