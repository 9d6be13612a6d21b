"""The one recipe that turns a composed config into a finished run folder."""

import contextlib
import logging
import math
import os
import platform
import signal
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from betavae import figures
from betavae.callbacks import Bar, Board, EpochLines, NoProfiler, Pictures, SafeCheckpointIO
from betavae.data import MNISTDataModule
from betavae.errors import Diverged, UserError
from betavae.likelihoods import meaning
from betavae.module import VAEModule
from betavae.objectives import lr_factor
from betavae.resuming import GracefulStop, Patience, RunCheckpoint, reopen, rewind
from betavae.rules import check_arguments
from betavae.run_folder import discard, finished, git_commit, process_rank, quiet, start_log, write_metrics, write_whole
from betavae.settings import check_settings
from betavae.sweeps import ONE_DEVICE
from betavae.vae import VAE

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> float:
    """Train and test as `cfg` says, in Hydra's run folder. Returns the test neg. ELBO in nats per image.

    Raises UserError for settings that cannot be, before anything is written.
    """
    hydra_cfg = HydraConfig.get()
    folder = Path(os.path.relpath(hydra_cfg.runtime.output_dir))
    overrides = list(hydra_cfg.overrides.task)
    checkpoints = folder / "checkpoints"
    resume, state = cfg.resume is not None, None
    if resume:
        # A job of a sweep goes on with the very settings it has.
        cfg, state = reopen(folder, overrides if hydra_cfg.mode == RunMode.RUN else [])
        if (done := finished(folder)) and len(overrides) == 1:
            log.info("%s is finished; to train it longer: resume=%s trainer.max_epochs=N", folder, folder)
            return done["test"]["neg_elbo"]
    elif process_rank() == 0 and (folder / "metrics.json").exists():
        raise UserError(f"{folder} already holds a run; go on with it by resume={folder}, or choose another folder")
    check_settings(cfg)
    if state and cfg.trainer.max_epochs <= state["epoch"]:
        raise UserError(
            f"resume: trainer.max_epochs={cfg.trainer.max_epochs} is past: it is in epoch {state['epoch'] + 1}"
        )
    # The seed comes before anything is built, so that it decides the first weight too.
    L.seed_everything(cfg.seed, verbose=False)
    torch.set_float32_matmul_precision(cfg.trainer.matmul_precision)
    quiet()
    datamodule, module, trainer = build(cfg, folder, state)
    if hydra_cfg.mode == RunMode.MULTIRUN and trainer.world_size > 1:
        raise UserError(ONE_DEVICE)

    if resume and trainer.is_global_zero:
        rewind(folder, state)
    together = hydra_cfg.mode == RunMode.MULTIRUN and not hydra_cfg.launcher["_target_"].endswith(".BasicLauncher")
    start_log(folder, not isinstance(trainer.progress_bar_callback, Bar), f"{folder.name}  " if together else "")
    if not resume:
        write_whole(folder / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))
    # Also on resume: a run that is stopped again goes on with what this command changed.
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.merge(cfg, {"resume": None}), resolve=True))
    record = {
        "status": "running",
        "pid": os.getpid(),
        "seed": cfg.seed,
        "parameters": sum(p.numel() for p in module.parameters()),
        "git_commit": git_commit(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {module_device(trainer)}",
        "versions": {p: version(p) for p in ("torch", "torchvision", "lightning", "hydra-core", "tensorboard")}
        | {"python": platform.python_version()},
    }
    write_metrics(folder, record)
    started = time.perf_counter()
    last, best = checkpoints / "last.ckpt", checkpoints / "best.ckpt"
    try:
        trainer.fit(module, datamodule, ckpt_path=str(last) if state else None, weights_only=True)
        record |= {"epochs": trainer.current_epoch, "steps": trainer.global_step}
        fit_seconds = time.perf_counter() - started
        chosen = best if best.exists() else last
        trainer.test(module, datamodule, ckpt_path=str(chosen), weights_only=True, verbose=False)
        test = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
        if not all(math.isfinite(value) for value in test.values()):
            raise Diverged(f"the test numbers of {chosen} are not finite", module.train_means)
        scalars = {name.removeprefix("test/"): round(value, 4) for name, value in test.items()}
        log_hyperparameters(trainer, cfg, scalars)
        save_pictures(trainer, module, folder)
    except BaseException as error:
        keep = resume or hydra_cfg.mode == RunMode.MULTIRUN
        ending = ended_early(error, trainer, folder, record, keep)
        if ending is error:
            raise
        raise ending from error
    record |= {
        "status": "finished",
        "checkpoint": str(chosen.relative_to(folder)),
        "test": scalars,
        "epoch_seconds": next(c.seconds for c in trainer.callbacks if isinstance(c, EpochLines)),  # type: ignore
        "threads": torch.get_num_threads(),
        "fit_seconds": round(fit_seconds, 2),
        "seconds": round(time.perf_counter() - started, 2),
    }
    for callback in trainer.checkpoint_callbacks:
        if (best_score := getattr(callback, "best_model_score", None)) is not None:
            record["validation"] = {"neg_elbo": round(float(best_score), 4)}
    words, surrogate = meaning(cfg.model.likelihood, cfg.data.binarize)
    note = words if surrogate else None
    if note:
        record["note"] = note
    write_metrics(folder, record)
    closing_lines(folder, scalars, note, fit_seconds, chosen, hydra_cfg.mode == RunMode.MULTIRUN)
    return scalars["neg_elbo"]


def ended_early(
    error: BaseException, trainer: L.Trainer, folder: Path, record: dict[str, Any], keep: bool
) -> BaseException:
    """What to raise for a run that did not come to its end, after its folder says why; a folder of our own making, in
    which nothing ever began, is taken back unless it is to `keep`."""
    if isinstance(error, MisconfigurationException):
        error = UserError(f"trainer: {first_sentence(error)}")
    stopped = isinstance(error, KeyboardInterrupt | SystemExit)
    status = "interrupted" if stopped else "diverged" if isinstance(error, Diverged) else "failed"
    record |= {"status": status, "epochs": trainer.current_epoch, "steps": trainer.global_step}
    if not stopped:
        record["error"] = f"{type(error).__name__}: {error}"
        log.debug("%s", "".join(traceback.format_exception(error)))
        if isinstance(error, UserError) and status == "failed" and not trainer.global_step and not keep:
            discard(folder)
            return error
    with contextlib.suppress(OSError):  # of a full disk: the error that is under way says it
        write_metrics(folder, record)
    if not stopped:
        if (last := folder / "checkpoints" / "last.ckpt").exists():
            log.info("the last good checkpoint is %s", last)
        return error
    log.info("interrupted at step %d; go on with\n  python train.py resume=%s", trainer.global_step, folder)
    asked = next(c.asked for c in trainer.callbacks if isinstance(c, GracefulStop))  # type: ignore[attr-defined]
    if isinstance(error, SystemExit) and asked not in (signal.SIGINT, signal.SIGTERM):
        return error  # of a launcher that has queued the job again
    return SystemExit(128 + (asked or signal.SIGINT))


def build(
    cfg: DictConfig, folder: Path, state: dict[str, Any] | None = None
) -> tuple[MNISTDataModule, VAEModule, L.Trainer]:
    """The data, the module and the trainer of a config, to go on from `state`; only the data folder is touched."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    check_arguments("data", MNISTDataModule, plain["data"])
    datamodule = MNISTDataModule(**plain["data"])
    datamodule.setup()
    check_arguments("model", VAE, plain["model"] | {"image_shape": datamodule.image_shape})
    module = VAEModule(
        model=plain["model"] | {"image_shape": datamodule.image_shape},
        **{key: plain[key] for key in ("objective", "beta", "beta_schedule", "optimizer", "lr_schedule")},
    )
    check_arguments("objective", module.objective, module.objective_settings, "vae", "x", "noise", "beta")
    check_arguments("beta_schedule", module.beta_factor, module.beta_settings, "step", "total_steps")
    check_arguments("lr_schedule", lr_factor, plain["lr_schedule"], "step", "total_steps")
    if plain["init"] == "data":
        module.vae.centre(datamodule.sets["train"][0].float().mean(0) / 255)
    settings = plain["trainer"]
    if not plain["data"]["validation_size"]:
        settings["limit_val_batches"] = 0
    settings.pop("matmul_precision")
    if (steps := settings.pop("steps_per_batch")) > 1:
        lbfgs = plain["optimizer"]["name"] == "LBFGS"
        if lbfgs or settings["gradient_clip_val"] or settings["accumulate_grad_batches"] > 1:
            raise UserError(
                f"trainer.steps_per_batch={steps} cannot be with clipped or accumulated gradients, or LBFGS: make it 1"
            )
        module.automatic_optimization, datamodule.steps_per_batch = False, steps
    if mode := settings.pop("compile"):
        module.compile_training(None if mode is True else mode)
    checkpoints: dict[str, Any] = {
        "dirpath": folder / "checkpoints",
        "enable_version_counter": False,
    }
    callbacks: list[Callback] = [
        Pictures(plain["callbacks"]["figures_every"]),
        EpochLines(),
        GracefulStop(folder / "checkpoints" / "last.ckpt"),
        RunCheckpoint(filename="last", save_on_train_epoch_end=True, **checkpoints),
    ]
    if plain["data"]["validation_size"]:
        # Saved when it is validated, so before `last`, which remembers it.
        best = RunCheckpoint(filename="best", monitor="val/neg_elbo", save_on_train_epoch_end=False, **checkpoints)
        callbacks.append(best)
        if (patience := plain["callbacks"]["early_stopping_patience"]) is not None:
            callbacks.append(Patience("val/neg_elbo", patience=patience, check_on_train_epoch_end=False))
    if settings["enable_progress_bar"]:
        settings["enable_progress_bar"] = sys.stdout.isatty()
    if settings["enable_progress_bar"]:
        callbacks.append(Bar())
    plugins: list[Any] = [SafeCheckpointIO()]
    if SLURMEnvironment.detect():
        # Lightning would queue the job again itself, and restart all jobs of this folder from this one's checkpoint.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    settings.setdefault("profiler", NoProfiler())
    settings |= {
        "callbacks": callbacks,
        "logger": Board(folder, purge_step=state["global_step"] + 1 if state else None),
        "plugins": plugins,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
    }
    check_arguments("trainer", L.Trainer, settings)
    try:
        trainer = L.Trainer(**settings)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(f"trainer: {first_sentence(error)}") from error
    if not torch.cuda.is_available():
        # Lightning asks for the answer by NVML, and an optimiser asks at every step: without a GPU that is a search for
        # a library that is not there, a twentieth of a step.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    if trainer.strategy.root_device.type == "cpu":
        if cfg.trainer.precision.startswith("16"):
            raise UserError(f"trainer.precision={cfg.trainer.precision} needs a GPU; on a CPU: 32-true or bf16-mixed")
        if trainer.num_devices > (os.cpu_count() or 1):
            raise UserError(f"trainer.devices={cfg.trainer.devices} cannot be: there are {os.cpu_count()} CPU cores")
    # With max_steps, Lightning would count the epoch twice from whose end a run goes on.
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
    return datamodule, module, trainer


def first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".")


def module_device(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def log_hyperparameters(trainer: L.Trainer, cfg: DictConfig, scalars: dict[str, float]) -> None:
    """The HPARAMS tab: flat names, written once, with the final test numbers."""
    if trainer.logger is None or not trainer.is_global_zero:
        return
    from torch.utils.tensorboard.summary import hparams

    flat = {"seed": cfg.seed, "beta": cfg.beta}
    for group in ("model", "data", "objective", "beta_schedule", "optimizer", "lr_schedule", "trainer"):
        for key, value in cfg[group].items():
            flat[f"{group}.{key}"] = value if isinstance(value, int | float) else str(value)
    metrics = {f"test/{name}": value for name, value in scalars.items()}
    writer = trainer.logger.experiment._get_file_writer()  # type: ignore[attr-defined]
    # Without torch's first summary, the list of columns, TensorBoard works the list out itself, over all runs, and puts
    # the settings that differ first: in a sweep, what was swept.
    _, start, end = hparams(flat, metrics)
    writer.add_summary(start)
    writer.add_summary(end)
    trainer.logger.experiment.close()  # type: ignore[attr-defined]


@rank_zero_only
def save_pictures(trainer: L.Trainer, module: VAEModule, folder: Path) -> None:
    pictures = next(c for c in trainer.callbacks if isinstance(c, Pictures))  # type: ignore[attr-defined]
    for name, picture in pictures.draw(trainer, module).items():
        figures.save_picture(picture, folder / "figures" / f"{name}.png")


def closing_lines(
    folder: Path, scalars: dict[str, float], note: str | None, seconds: float, chosen: Path, sweep: bool
) -> None:
    log.info(
        "test  loss %.2f  recon %.2f  KL %.2f  neg. ELBO %.2f nats per image (%d active units, %s, trained in %.0f s)",
        *(scalars[name] for name in ("loss", "recon", "kl", "neg_elbo", "active_units")),
        chosen.name,
        seconds,
    )
    if note:
        log.info("note  %s", note)
    if not sweep:
        log.info("run   %s", folder)
        log.info("next  tensorboard --logdir %s\n      python scripts/sample.py ckpt=%s", folder.parent, chosen)
