"""Build the data, the module and the trainer from validated settings."""

import os
import sys
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from betavae.data.datamodule import ImageDataModule
from betavae.errors import UserError, first_line
from betavae.module import VAEModule
from betavae.runtime import lightning_workarounds
from betavae.runtime.callbacks import (
    CALLBACKS,
    EpochProgressBar,
    EpochSummary,
    ImageLogger,
    LastValidationMetrics,
)
from betavae.runtime.compile import compile_loss
from betavae.runtime.cuda_graph import CUDAGraphSteps
from betavae.runtime.resume import (
    DivergenceGuard,
    ExactResume,
    GracefulStop,
    ResumableEarlyStopping,
    RunCheckpoint,
    SafeCheckpointIO,
    SignalHandler,
)
from betavae.runtime.run_folder import RunFolder
from betavae.runtime.settings import check_signature


def build_data(settings: dict[str, Any]) -> ImageDataModule:
    check_signature("data", ImageDataModule, settings)
    datamodule = ImageDataModule(**settings)
    datamodule.setup()
    return datamodule


def build_callbacks(
    settings: dict[str, Any], run: RunFolder, signals: SignalHandler, has_validation: bool
) -> list[Callback]:
    wanted, checkpoints = settings["callbacks"], {"dirpath": run.last.parent, "enable_version_counter": False}
    callbacks: list[Callback] = [
        DivergenceGuard(),
        ExactResume(),
        EpochSummary(),
        LastValidationMetrics(),
        ImageLogger(wanted["figures_every_n_epochs"], run.path / "figures"),
        GracefulStop(signals, run.last),
        RunCheckpoint(filename="last", save_on_train_epoch_end=True, **checkpoints),  # type: ignore[arg-type]
    ]
    if has_validation:
        monitor = f"val/{wanted['monitor']}"
        # Saved after validation, and therefore before `last`, which contains its path.
        callbacks.append(RunCheckpoint(filename="best", monitor=monitor, save_on_train_epoch_end=False, **checkpoints))  # type: ignore
        if (patience := wanted["early_stopping_patience"]) is not None:
            callbacks.append(ResumableEarlyStopping(monitor, patience=patience, check_on_train_epoch_end=False))
    if settings["trainer"]["enable_progress_bar"] and sys.stdout.isatty():
        callbacks.append(EpochProgressBar())
    for name, arguments in wanted["custom"].items():
        if name not in CALLBACKS:
            known = ", ".join(CALLBACKS) or "nothing"
            raise UserError(f"callbacks.custom.{name} is not in CALLBACKS of callbacks.py, which has {known}")
        check_signature(f"callbacks.custom.{name}", CALLBACKS[name], arguments or {})
        callbacks.append(CALLBACKS[name](**(arguments or {})))
    return callbacks


def build_trainer(
    settings: dict[str, Any],
    module: VAEModule,
    datamodule: ImageDataModule,
    callbacks: list[Callback],
) -> L.Trainer:
    wanted = dict(settings["trainer"])
    precision, accelerator = wanted["precision"], wanted["accelerator"]
    cpu = accelerator == "cpu" or (accelerator == "auto" and not gpu_available())
    if cpu and precision.startswith("16"):
        raise UserError(
            f"trainer.precision={precision} is invalid: it needs a GPU (on a CPU: 32-true, 64-true, bf16-mixed or "
            "bf16-true)"
        )
    if precision == "64-true" and (accelerator == "mps" or (not cpu and torch.backends.mps.is_available())):
        raise UserError(
            "trainer.precision=64-true is invalid: a Mac's GPU has no float64; pass trainer.accelerator=cpu"
        )
    if cpu and isinstance(wanted["devices"], int) and wanted["devices"] > (os.cpu_count() or 1):
        raise UserError(
            f"trainer.devices={wanted['devices']} is invalid: expected at most {os.cpu_count()}, the CPU cores"
        )
    wanted.pop("matmul_precision")
    mode, per_call, in_graph = wanted.pop("compile"), wanted.pop("steps_per_batch"), wanted.pop("cuda_graph")
    if in_graph:
        check_cuda_graph(settings)
    if mode in ("reduce-overhead", "max-autotune") and wanted["accumulate_grad_batches"] > 1 and not cpu:
        # The next replay overwrites the gradients of the last one (torch 2.11).
        raise UserError(f"trainer.compile={mode} is invalid with trainer.accumulate_grad_batches: expected true")
    if per_call > 1:
        clip, algorithm = wanted.pop("gradient_clip_val"), wanted.pop("gradient_clip_algorithm")
        accumulate = wanted.pop("accumulate_grad_batches")
        if clip and precision == "16-mixed":
            raise UserError(
                "trainer.gradient_clip_val with 16-mixed needs trainer.steps_per_batch=1 (trainer=fast makes it 10)"
            )
        module.set_steps_per_batch(per_call, datamodule.batch_size, accumulate, clip, algorithm)
        datamodule.batch_size *= per_call * accumulate
        module.cuda_graph = CUDAGraphSteps(module) if in_graph else None
    if mode:
        compile_loss(module, None if mode is True else mode)
    if not len(datamodule.splits["validation"]):
        wanted["limit_val_batches"] = 0
    wanted["profiler"] = wanted.get("profiler") or lightning_workarounds.NoProfiler()
    wanted["enable_progress_bar"] = any(isinstance(callback, EpochProgressBar) for callback in callbacks)
    wanted |= {
        "callbacks": callbacks,
        "logger": False,  # until the run begins
        "plugins": [SafeCheckpointIO(), *lightning_workarounds.cluster_plugins()],
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
    }
    check_signature("trainer", L.Trainer, wanted)
    try:
        trainer = L.Trainer(**wanted)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(f"trainer: {first_line(error).rstrip('.')}") from error
    lightning_workarounds.patch_trainer(trainer)
    return trainer


def check_cuda_graph(settings: dict[str, Any]) -> None:
    """Raise UserError for settings that `CUDAGraphSteps` does not support."""
    trainer, optimizer = settings["trainer"], settings["optimizer"]
    cuda = trainer["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    fused = optimizer["name"] in ("Adam", "AdamW") and optimizer.get("fused") is True
    clipped = trainer["gradient_clip_val"] and "mixed" in trainer["precision"]
    for wrong, remedy in (
        (not cuda, "a CUDA device"),
        (trainer["devices"] not in (1, [0]) or trainer["num_nodes"] > 1, "trainer.devices=1"),
        (trainer["precision"] == "16-mixed", "trainer.precision=bf16-mixed or 32-true"),
        (clipped, "trainer.gradient_clip_val=null with mixed precision"),
        (trainer["compile"] in ("reduce-overhead", "max-autotune"), "trainer.compile=true or false"),
        (trainer["steps_per_batch"] == 1, "trainer.steps_per_batch above 1, such as 50"),
        (trainer["accumulate_grad_batches"] > 1, "trainer.accumulate_grad_batches=1"),
        (trainer["detect_anomaly"], "trainer.detect_anomaly=false"),
        (settings["model"]["conditional"], "model.conditional=false"),
        (settings["prior"]["name"] != "standard", "prior=standard"),
        (not fused, "optimizer=adam or adamw with optimizer.fused=true"),
    ):
        if wrong:
            raise UserError(f"trainer.cuda_graph=true is invalid: it needs {remedy}")


def gpu_available() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()
