"""What makes a run that was stopped, at any moment and by anything, go on as if it had never been."""

import signal
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from betavae.errors import DivergenceError, UserError
from betavae.module import VAEModule
from betavae.runtime import checkpoint
from betavae.runtime.lightning_workarounds import stop_after_this_step
from betavae.runtime.run_folder import RunFolder
from betavae.runtime.run_logger import run_loggers
from betavae.runtime.settings import check_settings, to_plain
from betavae.runtime.yaml_files import read_yaml

# What may change when a run goes on; everything else is the experiment itself.
RESUME_OVERRIDABLE = ("trainer.", "callbacks.", "data.root", "data.eval_batch_size", "debug")


class SignalHandler:
    """Ctrl-C, SIGTERM, and SIGUSR2 where a cluster's launcher listens to it. While `patient` they are noted, for the
    step under way to be finished; the second one, or one at any other time, ends the run at once."""

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
        """Also to be called when somebody has put handlers of their own in place."""
        for number in self.before:
            signal.signal(number, self.on_signal)

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, frame: Any) -> None:
        again, self.received = self.received, number
        if again or not self.deferring:
            raise KeyboardInterrupt

    def requeue(self) -> None:
        """Let a launcher's own handler queue the job again, if it was that which asked."""
        if self.received not in (None, signal.SIGINT, signal.SIGTERM):
            self.before[self.received](self.received, None)  # type: ignore[index]


class GracefulStop(Callback):
    """When asked by a signal, training ends after the step under way, with its state in `last.ckpt`.

    Of several processes each is asked on its own; they agree on the step where they log, `log_every_n_steps`.
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
        # Accumulated gradients are not in a checkpoint: wait for the step that uses them. And for a validation that is
        # due, which Lightning would leave in its middle.
        self.mid_epoch = True
        self.step_complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = trainer.is_last_batch or (batch_idx + 1) % trainer.val_check_batch == 0  # type: ignore[attr-defined,operator]
        # Several processes: where no half-made sums are left, which a checkpoint holds of the first one only.
        logged = (batch_idx + 1) % trainer.log_every_n_steps == 0 and module.automatic_optimization  # type: ignore[attr-defined]
        self.ranks_in_sync = trainer.world_size == 1 or logged or trainer.is_last_batch  # type: ignore[attr-defined]
        if not due and self.ranks_in_sync:
            self.stop_if_asked(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.ranks_in_sync:
            self.stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.mid_epoch, self.step_complete = False, True
        self.stop_if_asked(trainer)

    def stop_if_asked(self, trainer: L.Trainer) -> None:
        asked = self.signals.received is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked and self.step_complete:
            stop_after_this_step(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.signals.deferring = False

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        # At an epoch's end it has just been saved.
        if isinstance(exception, SIGTERMException):
            if self.mid_epoch:
                trainer.save_checkpoint(self.last)
            self.signals.requeue()


class ExactResume(Callback):
    """In each checkpoint what Lightning leaves out: random states, the place in the epoch, how far the loggers were."""

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint_: dict[str, Any]) -> None:
        checkpoint_["betavae_format"] = checkpoint.FORMAT
        checkpoint_["fingerprints"] = getattr(trainer.datamodule, "fingerprints", {})  # type: ignore[attr-defined]
        # One state of the random numbers per process.
        states: Any = trainer.strategy.all_gather(torch.get_rng_state().to(module.device))
        checkpoint_["random_state"] = states.view(trainer.world_size, -1).cpu()
        if (device := module.device).type != "cpu":
            states = trainer.strategy.all_gather(torch.get_device_module(device).get_rng_state().to(device))
            checkpoint_[f"{device.type}_random_state"] = states.view(trainer.world_size, -1).cpu()
        if (state_dict := getattr(trainer.train_dataloader, "state_dict", None)) is not None:
            checkpoint_["batches"] = state_dict()  # a DataLoader of somebody's own has none
        if trainer.is_global_zero:
            positions = [logger.resume_offsets() for logger in run_loggers(trainer)]
            checkpoint_["events"] = {name: size for position in positions for name, size in position.items()}

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint_: dict[str, Any]) -> None:
        self.restored = checkpoint_

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.world_size > 1:  # alike until here, for equal weights; from here each draws its own noise
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)
        content = self.__dict__.pop("restored", None)
        if content is None:
            return
        # Torch's fused Adam pairs weights and moments as they lie in memory, without a word where these differ (2.15):
        # as when a run was compiled (`compile_loss`) and goes on as it is, or the other way round.
        for optimizer in trainer.optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                        same_layout = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
                        state[name] = same_layout.copy_(value)
        # Lightning does not, once `estimated_stepping_batches` has asked for the loader.
        if "batches" in content:
            trainer.train_dataloader.load_state_dict(content["batches"])  # type: ignore[union-attr]
        states = content["random_state"]
        if len(states) == trainer.world_size:
            # A copy: torch 2.15 reads past a row that does not begin its storage.
            torch.set_rng_state(states[trainer.global_rank].clone())
        states = content.get(f"{module.device.type}_random_state", ())
        if len(states) == trainer.world_size:
            torch.get_device_module(module.device).set_rng_state(states[trainer.global_rank].clone())


class DivergenceGuard(Callback):
    """End a run whose loss or weights are not finite, before a checkpoint of it is saved. Raises Diverged."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def on_train_sums(self, trainer: L.Trainer, module: Any, names: list[str], rows: torch.Tensor) -> None:
        """Look at the rows that `Curves` reads: all processes see the same."""
        finite = rows.isfinite().all(1).tolist()
        good = finite.index(False) if not all(finite) else len(finite)
        if good:
            self.last = dict(zip(names, (rows[good - 1, 1:] / rows[good - 1, 0]).tolist(), strict=True))
        if good < len(finite):
            step = trainer.global_step - (len(finite) - 1 - good) // (
                trainer.accumulate_grad_batches * module.accumulate
            )
            raise DivergenceError(f"the loss of step {step} is not finite", self.last)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint_: dict[str, Any]) -> None:
        if isinstance(module, VAEModule) and len(module.window):
            module.read_window()
        if not torch.stack([p.isfinite().all() for p in module.parameters()]).all():
            raise DivergenceError(f"the weights after step {trainer.global_step} are not finite", self.last)


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint whose memory of the best one survives its run folder being moved."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        paths = {key: here(state[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {here(path): score for path, score in state["best_k_models"].items()}
        super().load_state_dict(state | paths | {"dirpath": self.dirpath, "best_k_models": best})


class ResumableEarlyStopping(EarlyStopping):
    """Early stopping that is still stopped after a resume, and takes a changed patience."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state | {"patience": self.patience})

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.wait_count >= max(1, self.patience):
            trainer.should_stop = True


def load_resumed_config(
    run: RunFolder, now: DictConfig, overrides: list[str]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Read the settings that `run` was started with, and its last checkpoint.

    Args:
        now: The config of this command.
        overrides: What this command changes; the changed values are those of `now`.

    Returns:
        The settings, and the checkpoint, or None if the run was stopped before its first.

    Raises:
        UserError: If the folder does not hold a run, or an override is not one of CHANGEABLE.
    """
    path = run.path / "config.yaml"
    if not path.is_file():
        raise UserError(f"resume: {run.path} is not a run folder (it has no config.yaml)")
    if not run.is_run():
        raise UserError(f"resume: {run.path} is not a run folder of betavae")
    settings = read_yaml(path)
    try:
        check_settings(settings)
    except UserError as error:
        raise UserError(f"resume: {path} does not hold the settings of a run: {error}") from error
    model = dict(settings["model"])
    for change in OverridesParser.create().parse_overrides(overrides):
        key = change.key_or_group
        if key == "resume":
            continue
        if change.is_delete() or not key.startswith(RESUME_OVERRIDABLE) or key == "trainer.steps_per_batch":
            raise UserError(
                f"resume: {change.input_line} cannot change when a run goes on (what can: trainer.* but "
                "steps_per_batch, callbacks.*, data.root, data.eval_batch_size, debug); start a new run for it"
            )
        if key == "trainer.accumulate_grad_batches" and settings["trainer"]["steps_per_batch"] > 1:
            raise UserError(
                "resume: trainer.accumulate_grad_batches cannot change where trainer.steps_per_batch is above 1"
            )
        set_nested(settings, key, to_plain(OmegaConf.select(now, key)))
    settings["resume"] = str(run.path)
    if not run.last.exists():
        return settings, None
    content = checkpoint.read_checkpoint(run.last)
    trained = {key: value for key, value in content["hyper_parameters"]["model"].items() if key != "image_shape"}
    if trained != model:
        key = next(key for key in {**model, **trained} if model.get(key) != trained.get(key))
        raise UserError(
            f"resume: {run.last} holds a model with {key}={trained.get(key)}, but config.yaml says {model.get(key)}; "
            "they are not from the same run"
        )
    return settings, content


def set_nested(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key, and add the groups that it lacks."""
    *groups, name = key.split(".")
    for group in groups:
        if not isinstance(settings.get(group), dict):
            settings[group] = {}
        settings = settings[group]
    settings[name] = value
