"""What makes a run that was stopped, at any moment and by anything, go on as if it had never been."""

import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from betavae import checkpoint
from betavae.errors import UserError

# What may change when a run goes on; everything else is the experiment itself.
CHANGEABLE = ("trainer.", "callbacks.", "data.root", "data.eval_batch_size", "debug")


class GracefulStop(Callback):
    """Ctrl-C and SIGTERM end the training after the step under way, with its state in `last.ckpt`; asked a second time,
    at once. So does SIGUSR2, by which a cluster's launcher is told to make room: its own handler, which queues the job
    again, comes after. Also marks in each checkpoint how far TensorBoard's files went.

    Not for several processes: their checkpoint needs them all, and the last one is at most an epoch old.
    """

    def __init__(self, last: Path):
        self.last = last
        self.asked: int | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            # Lightning's own handler ends its loop between two steps, and puts the old handlers back at the end.
            self.end_loop: Any = signal.getsignal(signal.SIGTERM)
            numbers = [signal.SIGINT, signal.SIGTERM]
            if sys.platform != "win32" and callable(requeue := signal.getsignal(signal.SIGUSR2)):
                self.requeue: Any = requeue
                numbers.append(signal.SIGUSR2)
            for number in numbers:
                signal.signal(number, self.ask)

    def ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Accumulated gradients are not in a checkpoint: wait for the step that uses them. And for a validation that is
        # due, which Lightning would leave in its middle.
        self.mid_epoch = True
        self.whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not trainer.is_last_batch and (batch_idx + 1) % trainer.val_check_batch:  # type: ignore[attr-defined,operator]
            self.stop_if_asked()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.stop_if_asked()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.mid_epoch, self.whole = False, True
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        if self.asked and self.whole:
            self.end_loop(signal.SIGTERM, None)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        # At an epoch's end it has just been saved.
        if self.asked and isinstance(exception, SIGTERMException):
            if self.mid_epoch:
                trainer.save_checkpoint(self.last)
            if self.asked not in (signal.SIGINT, signal.SIGTERM):
                self.requeue(self.asked, None)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.logger is not None and trainer.is_global_zero:
            trainer.logger.experiment.flush()  # type: ignore[attr-defined]
            checkpoint["events"] = {path.name: path.stat().st_size for path in event_files(self.last.parents[1])}


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint whose memory of the best one survives its run folder being moved."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        paths = {key: here(state[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {here(path): score for path, score in state["best_k_models"].items()}
        super().load_state_dict(state | paths | {"dirpath": self.dirpath, "best_k_models": best})


class Patience(EarlyStopping):
    """Early stopping that is still stopped after a resume, and takes a changed patience."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state | {"patience": self.patience})

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.wait_count >= max(1, self.patience):
            trainer.should_stop = True


def event_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("events.out.tfevents.*"))


def rewind(folder: Path, content: dict[str, Any] | None) -> None:
    """TensorBoard's files of a run as they were when its checkpoint was saved: what came later will come again."""
    sizes = content.get("events", {}) if content else {}
    for path in event_files(folder):
        if size := sizes.get(path.name):
            os.truncate(path, min(size, path.stat().st_size))
        else:
            path.unlink()
    for embedding in folder.glob("[0-9]*/posterior_means"):
        shutil.rmtree(embedding)


def reopen(folder: Path, overrides: list[str]) -> tuple[DictConfig, dict[str, Any] | None]:
    """The config that the run in `folder` was started with, with what this command changes; and its last checkpoint,
    None if the run was stopped before the first."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"resume: {folder} is not a run folder (it has no config.yaml)")
    try:
        cfg = OmegaConf.load(folder / "config.yaml")
        assert isinstance(cfg, DictConfig) and {"model", "trainer", "resume"} <= set(cfg), "settings are missing"
        # It was written with everything filled in; and what it names must not run.
        assert "${" not in str(OmegaConf.to_container(cfg)), "it holds an interpolation"
        model: Any = OmegaConf.to_container(cfg.model)
        OmegaConf.set_struct(cfg, True)
    except Exception as error:
        raise UserError(
            f"resume: {folder / 'config.yaml'} is damaged ({(str(error).splitlines() or ['unreadable'])[0]})"
        ) from error
    changes = [item for item in overrides if not item.lstrip("+").startswith("resume=")]
    for item in changes:
        if not item.startswith(CHANGEABLE) or "=" not in item or item.startswith("trainer.steps_per_batch"):
            raise UserError(
                f"resume: {item} cannot change when a run goes on (what can: trainer.* but "
                "steps_per_batch, callbacks.*, data.root, data.eval_batch_size, debug); start a new run for it"
            )
    cfg.merge_with_dotlist(changes)
    cfg.resume = str(folder)
    last = folder / "checkpoints" / "last.ckpt"
    if not last.exists():
        return cfg, None
    content = checkpoint.read(last)
    trained = {key: value for key, value in content["hyper_parameters"]["model"].items() if key != "image_shape"}
    if trained != model:
        key = next(key for key in {**model, **trained} if model.get(key) != trained.get(key))
        raise UserError(
            f"resume: {last} holds a model with {key}={trained.get(key)}, but config.yaml says {model.get(key)}; "
            "they are not from the same run"
        )
    return cfg, content
