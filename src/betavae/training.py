"""The one recipe that turns a composed config into a finished run folder."""

import json
import logging
import os
import platform
import subprocess
import sys
import time
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from betavae import figures
from betavae.callbacks import Bar, Board, EpochLines, Pictures, SafeCheckpointIO
from betavae.data import MNISTDataModule
from betavae.errors import UserError
from betavae.module import VAEModule
from betavae.rules import check
from betavae.settings import RULES

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> float:
    """Train and test as `cfg` says, in Hydra's run folder. Returns the test neg. ELBO in nats per image.

    Raises UserError for settings that cannot be, before anything is written.
    """
    hydra_cfg = HydraConfig.get()
    folder = Path(os.path.relpath(hydra_cfg.runtime.output_dir))
    overrides = list(hydra_cfg.overrides.task)
    if cfg.resume is not None:
        cfg = resumed(Path(cfg.resume), overrides)
    elif (folder / "metrics.json").exists():
        raise UserError(f"{folder} already holds a run; go on with it by resume={folder}, or choose another folder")
    check(cfg, RULES)
    # The seed comes before anything is built, so that it decides the first weight too.
    L.seed_everything(cfg.seed, verbose=False)
    torch.set_float32_matmul_precision(cfg.trainer.matmul_precision)
    quiet()
    datamodule, module, trainer = build(cfg, folder)

    start_log(folder, console_lines=not isinstance(trainer.progress_bar_callback, Bar))
    if cfg.resume is None:
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        OmegaConf.save(OmegaConf.create(overrides), folder / "overrides.yaml")
    record = {
        "status": "running",
        "seed": cfg.seed,
        "parameters": sum(p.numel() for p in module.parameters()),
        "git_commit": git_commit(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {module_device(trainer)}",
        "versions": {p: version(p) for p in ("torch", "torchvision", "lightning", "hydra-core", "tensorboard")}
        | {"python": platform.python_version()},
    }
    write_metrics(folder, record)
    started = time.perf_counter()
    try:
        last = folder / "checkpoints" / "last.ckpt"
        trainer.fit(module, datamodule, ckpt_path=str(last) if cfg.resume is not None else None, weights_only=True)
        record |= {"epochs": trainer.current_epoch, "steps": trainer.global_step}
        if trainer.interrupted:
            raise KeyboardInterrupt
        fit_seconds = time.perf_counter() - started
        best = folder / "checkpoints" / "best.ckpt"
        chosen = best if best.exists() else last
        trainer.test(module, datamodule, ckpt_path=str(chosen), weights_only=True, verbose=False)
        test = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        record |= {"status": "interrupted" if interrupted else "failed", "error": f"{type(error).__name__}: {error}"}
        write_metrics(folder, record)
        log.debug("%s", traceback.format_exc())
        if interrupted:
            log.info("interrupted; go on with\n  python train.py resume=%s", folder)
        raise
    scalars = {name.removeprefix("test/"): round(value, 4) for name, value in test.items()}
    record |= {
        "status": "finished",
        "checkpoint": str(chosen.relative_to(folder)),
        "test": scalars,
        "epoch_seconds": next(c.seconds for c in trainer.callbacks if isinstance(c, EpochLines)),  # type: ignore
        "fit_seconds": round(fit_seconds, 2),
        "seconds": round(time.perf_counter() - started, 2),
    }
    note = likelihood_note(cfg)
    if note:
        record["note"] = note
    log_hyperparameters(trainer, cfg, scalars)
    save_pictures(trainer, module, folder)
    write_metrics(folder, record)
    closing_lines(folder, scalars, note, fit_seconds, chosen, hydra_cfg.mode == RunMode.MULTIRUN)
    return scalars["neg_elbo"]


def build(cfg: DictConfig, folder: Path) -> tuple[MNISTDataModule, VAEModule, L.Trainer]:
    """The data, the module and the trainer of a config; only the data folder is touched."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    datamodule = MNISTDataModule(**plain["data"])
    datamodule.setup()
    module = VAEModule(
        model=plain["model"] | {"image_shape": datamodule.image_shape},
        **{key: plain[key] for key in ("objective", "beta", "beta_schedule", "optimizer", "lr_schedule")},
    )
    if plain["init"] == "data":
        module.vae.centre(datamodule.sets["train"][0].float().mean(0) / 255)
    settings = plain["trainer"]
    if not plain["data"]["validation_size"]:
        settings["limit_val_batches"] = 0
    settings.pop("matmul_precision")
    if mode := settings.pop("compile"):
        module.compile_training(None if mode is True else mode)
    checkpoints: dict[str, Any] = {
        "dirpath": folder / "checkpoints",
        "enable_version_counter": False,
        "save_on_train_epoch_end": True,
    }
    callbacks: list[Callback] = [
        Pictures(plain["callbacks"]["figures_every"]),
        EpochLines(),
        ModelCheckpoint(filename="last", **checkpoints),
    ]
    if plain["data"]["validation_size"]:
        callbacks.append(ModelCheckpoint(filename="best", monitor="val/neg_elbo", **checkpoints))
        if (patience := plain["callbacks"]["early_stopping_patience"]) is not None:
            callbacks.append(EarlyStopping("val/neg_elbo", patience=patience, check_on_train_epoch_end=True))
    if settings["enable_progress_bar"]:
        settings["enable_progress_bar"] = sys.stdout.isatty()
    if settings["enable_progress_bar"]:
        callbacks.append(Bar())
    trainer = L.Trainer(
        **settings,
        callbacks=callbacks,
        logger=Board(folder),
        plugins=[SafeCheckpointIO()],
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    return datamodule, module, trainer


def resumed(folder: Path, overrides: list[str]) -> DictConfig:
    """The config that the run in `folder` was started with, and over it the plain `key=value` of this command."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"resume: {folder} is not a run folder (it has no config.yaml)")
    if not (folder / "checkpoints" / "last.ckpt").is_file():
        raise UserError(f"resume: {folder} has no checkpoints/last.ckpt yet, so there is nothing to go on from")
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    OmegaConf.set_struct(cfg, True)
    changes = [item for item in overrides if not item.startswith("resume=")]
    for item in changes:
        if isinstance(OmegaConf.select(cfg, item.split("=")[0]), DictConfig):
            raise UserError(
                f"resume: {item} swaps a whole group; only single settings (key=value) can change on resume"
            )
    cfg.merge_with_dotlist(changes)
    cfg.resume = str(folder)
    return cfg


def quiet() -> None:
    """Only our own lines on the terminal: no tips, device tables or notices about other libraries' insides."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # Batches come from memory by an index: there is no worker to add.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")


def start_log(folder: Path, console_lines: bool) -> None:
    """Everything to `train.log` with the time; plain lines to the terminal, those of each epoch only if asked."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / "train.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    console.addFilter(lambda record: console_lines or not getattr(record, "epoch_line", False))
    root.addHandler(file)
    root.addHandler(console)
    root.setLevel(logging.WARNING)
    logging.getLogger("betavae").setLevel(logging.DEBUG)
    logging.captureWarnings(True)


def write_metrics(folder: Path, record: dict[str, Any]) -> None:
    part = folder / "metrics.json.part"
    part.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(part, folder / "metrics.json")


def git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def module_device(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def likelihood_note(cfg: DictConfig) -> str | None:
    if cfg.model.likelihood == "bernoulli" and cfg.data.binarize == "none":
        return "grey pixels under a Bernoulli likelihood: the tutorial's surrogate, not a log-likelihood"
    return None


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
