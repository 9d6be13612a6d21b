"""Exact resume: a run that was stopped at any moment continues as if it had not been stopped."""

import logging
import math
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from betavae.errors import DivergenceError, UserError
from betavae.module import VAEModule
from betavae.runtime.checkpoint import FORMAT, Checkpoint, read_checkpoint, save_checkpoint
from betavae.runtime.hydra_config import to_plain
from betavae.runtime.lightning_workarounds import stop_after_this_step
from betavae.runtime.plugins import LOADED, describe_missing
from betavae.runtime.run_folder import RunFolder
from betavae.runtime.run_logger import run_loggers
from betavae.runtime.settings import Config, check_settings
from betavae.runtime.yaml_files import read_yaml

log = logging.getLogger(__name__)
# Settings that may change on resume; all others define the experiment.
RESUME_OVERRIDABLE = ("trainer.", "callbacks.", "data.root", "data.eval_batch_size", "plugins", "tags", "traceback")


class SignalHandler:
    """Handle Ctrl-C, SIGTERM, and SIGUSR2 if a cluster's launcher handles it.

    While `deferring`, the first signal is only noted, so that the current step is finished. A second signal, or one at
    any other time, ends the run at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferring = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "SignalHandler":
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if sys.platform != "win32" and callable(signal.getsignal(signal.SIGUSR2)):
                numbers.append(signal.SIGUSR2)
            self.before = {number: signal.getsignal(number) for number in numbers}
            self.install()
        return self

    def install(self) -> None:
        """Install the handlers, again if a library has replaced them."""
        for number in self.before:
            signal.signal(number, self.on_signal)

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, frame: object) -> None:
        again, self.received = self.received, number
        if again or not self.deferring:
            raise KeyboardInterrupt

    def requeue(self) -> None:
        """Let the launcher queue the job again if the signal was the launcher's."""
        if self.received is not None and self.received not in (signal.SIGINT, signal.SIGTERM):
            self.before[self.received](self.received, None)


class GracefulStop(Callback):
    """End the training after the current step when a signal was received, with its state in `last.ckpt`.

    Each of several processes receives signals itself; all agree on the step every `log_every_n_steps`.
    """

    def __init__(self, signals: SignalHandler, last: Path):
        self.signals, self.last = signals, last
        self.mid_epoch, self.step_complete, self.ranks_in_sync = False, True, True

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.signals.install()
        self.signals.deferring = True

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Accumulated gradients are not in a checkpoint, so wait for the step that uses them; and for a validation that
        # is due, which Lightning would leave unfinished.
        self.mid_epoch = True
        self.step_complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = trainer.is_last_batch or (batch_idx + 1) % trainer.val_check_batch == 0  # type: ignore[operator]
        # Several processes stop right after logging: a checkpoint holds the sums of the first process only.
        logged = (batch_idx + 1) % trainer.log_every_n_steps == 0 and module.automatic_optimization  # type: ignore[attr-defined]
        self.ranks_in_sync = trainer.world_size == 1 or logged or trainer.is_last_batch
        if not due and self.ranks_in_sync:
            self.stop_if_signaled(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.ranks_in_sync:
            self.stop_if_signaled(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.mid_epoch, self.step_complete = False, True
        self.stop_if_signaled(trainer)

    def stop_if_signaled(self, trainer: L.Trainer) -> None:
        signaled = self.signals.received is not None
        if trainer.world_size > 1:
            signaled = trainer.strategy.reduce_boolean_decision(signaled, all=False)
        if signaled and self.step_complete:
            stop_after_this_step(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.signals.deferring = False

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            if self.mid_epoch:  # at the end of an epoch, it has just been saved
                trainer.save_checkpoint(self.last)
            self.signals.requeue()


class ExactResume(Callback):
    """Add to each checkpoint the state that Lightning leaves out.

    It adds the random states, the batch in the epoch, and the offsets of the loggers.
    """

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: Checkpoint) -> None:
        checkpoint |= {"betavae_format": FORMAT, "plugins": dict(LOADED)}
        datamodule = getattr(trainer, "datamodule", None)
        checkpoint["fingerprints"] = getattr(datamodule, "fingerprints", {})
        if datamodule is not None and hasattr(datamodule, "scaling"):
            checkpoint["scaling"] = asdict(datamodule.scaling)
            checkpoint["columns"] = datamodule.splits["train"].columns
        # A random state of each process.
        states: Any = trainer.strategy.all_gather(torch.get_rng_state().to(module.device))
        checkpoint["random_state"] = states.view(trainer.world_size, -1).cpu()
        if (device := module.device).type != "cpu":
            states = trainer.strategy.all_gather(torch.get_device_module(device).get_rng_state().to(device))
            checkpoint[f"{device.type}_random_state"] = states.view(trainer.world_size, -1).cpu()
        if (state_dict := getattr(trainer.train_dataloader, "state_dict", None)) is not None:
            checkpoint["batches"] = state_dict()  # a custom DataLoader has none
        if trainer.is_global_zero:
            offsets = [logger.resume_offsets() for logger in run_loggers(trainer)]
            checkpoint["events"] = {name: size for offset in offsets for name, size in offset.items()}

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: Checkpoint) -> None:
        self.restored = checkpoint

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.world_size > 1:  # equal seeds until here give equal weights; different ones give different noise
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)
        content = self.__dict__.pop("restored", None)
        if content is None:
            return
        # Fused Adam pairs weights and moments by their place in memory, even if their layouts differ (torch 2.15), as
        # they do if a compiled run (`compile_loss`) is resumed uncompiled, or the reverse.
        for optimizer in trainer.optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                        same_layout = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
                        state[name] = same_layout.copy_(value)
        # Lightning does not do this after `estimated_stepping_batches` has set the loader up.
        if "batches" in content:
            trainer.train_dataloader.load_state_dict(content["batches"])  # type: ignore[union-attr]
        states = content["random_state"]
        if len(states) == trainer.world_size:
            # A copy, because torch 2.15 reads beyond a row that does not start its storage.
            torch.set_rng_state(states[trainer.global_rank].clone())
        states = content.get(f"{module.device.type}_random_state", ())
        if len(states) == trainer.world_size:
            torch.get_device_module(module.device).set_rng_state(states[trainer.global_rank].clone())


class DivergenceGuard(Callback):
    """Raise DivergenceError if the loss or the weights are not finite.

    This happens before a checkpoint of them is saved.
    """

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def on_train_sums(self, trainer: L.Trainer, module: VAEModule, names: list[str], rows: torch.Tensor) -> None:
        """Check the rows of `VAEModule.read_window`, which are the same in all processes."""
        finite = rows.isfinite().all(1).tolist()
        good = finite.index(False) if not all(finite) else len(finite)
        if good:
            self.last = dict(zip(names, (rows[good - 1, 1:] / rows[good - 1, 0]).tolist(), strict=True))
        if good < len(finite):
            step = trainer.global_step - (len(finite) - 1 - good) // (
                trainer.accumulate_grad_batches * module.accumulate
            )
            raise DivergenceError(f"the loss of step {step} is not finite", self.last)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: Checkpoint) -> None:
        if isinstance(module, VAEModule) and len(module.window):
            module.read_window()
        if not torch.stack([p.isfinite().all() for p in module.parameters()]).all():
            raise DivergenceError(f"the weights after step {trainer.global_step} are not finite", self.last)


class SafeCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically, and read them as `read_checkpoint` does."""

    def save_checkpoint(self, checkpoint: Checkpoint, path: str | Path, storage_options: object = None) -> None:
        save_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> Checkpoint:
        return read_checkpoint(Path(path))


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint callback that finds its best checkpoint after its run folder was moved."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        def relocate(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        paths = {key: relocate(state[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {relocate(path): score for path, score in state["best_k_models"].items()}
        super().load_state_dict(state | paths | {"dirpath": self.dirpath, "best_k_models": best})


class ResumableEarlyStopping(EarlyStopping):
    """Early stopping that says so, stays stopped after a resume, and accepts a changed patience."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state | {"patience": self.patience})

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.wait_count >= max(1, self.patience):
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        early = trainer.should_stop and trainer.current_epoch < (trainer.max_epochs or math.inf)
        if early and self.wait_count >= max(1, self.patience):
            log.info(
                "early stopping: %s has not been below %.2f in the last %d validations",
                *(self.monitor, self.best_score.item(), self.wait_count),
            )


def load_resumed_config(run: RunFolder, now: DictConfig, overrides: list[str]) -> tuple[Config, Checkpoint | None]:
    """Read the settings and the last checkpoint of a run.

    Args:
        run: The folder of the run.
        now: The config of this command.
        overrides: The settings that this command changes to the values in `now`.

    Returns:
        The settings, and the checkpoint, or None if the run was stopped before its first.

    Raises:
        UserError: If the folder does not hold a run, or an override is not one of RESUME_OVERRIDABLE.
    """
    path = run.path / "config.yaml"
    if not path.is_file():
        raise UserError(f"resume: {run.path} is not a run folder (it has no config.yaml)")
    if not run.is_run():
        raise UserError(f"resume: {run.path} is not a run folder of betavae")
    if missing := describe_missing(run.read_metrics().get("plugins")):
        raise UserError(f"resume: {run.path} was {missing}")
    settings = read_yaml(path)
    try:
        check_settings(settings)
    except UserError as error:
        raise UserError(f"resume: {path} is not the config of a run: {error}") from error
    model = dict(settings["model"])
    for change in OverridesParser.create().parse_overrides(overrides):
        if change.key_or_group != "resume":
            check_resume_override(change, settings)
            set_nested(settings, change.key_or_group, to_plain(OmegaConf.select(now, change.key_or_group)))
    settings["resume"] = str(run.path)
    if not run.last.exists():
        return settings, None
    content = read_checkpoint(run.last)
    saved = content["hyper_parameters"]["model"]
    trained = {key: value for key, value in saved.items() if key not in ("image_shape", "classes")}
    # As `module_arguments` derives the arguments of the VAE from the settings.
    trained["conditional"] = "classes" in saved
    model["prior"] = settings["prior"]
    if trained != model:
        key = next(key for key in {**model, **trained} if model.get(key) != trained.get(key))
        raise UserError(
            f"resume: {run.last} has model.{key}={trained.get(key)}, and config.yaml {model.get(key)}; they are not "
            "from the same run"
        )
    return settings, content


def check_resume_override(change: Override, settings: Config) -> None:
    """Raise UserError for a setting that cannot change on resume."""
    key = change.key_or_group
    if change.is_delete() or not key.startswith(RESUME_OVERRIDABLE) or key == "trainer.steps_per_batch":
        raise UserError(
            f"resume: {change.input_line} cannot change on resume; start a new run for it (trainer.* except "
            "steps_per_batch, callbacks.*, data.root, data.eval_batch_size, plugins, tags and traceback can)"
        )
    if key == "trainer.accumulate_grad_batches" and settings["trainer"]["steps_per_batch"] > 1:
        raise UserError(
            "resume: trainer.accumulate_grad_batches cannot change on resume if trainer.steps_per_batch is above 1"
        )


def set_nested(settings: Config, key: str, value: object) -> None:
    """Set the value of a dotted key, and add missing groups."""
    *groups, name = key.split(".")
    for group in groups:
        if not isinstance(settings.get(group), dict):
            settings[group] = {}
        settings = settings[group]
    settings[name] = value
