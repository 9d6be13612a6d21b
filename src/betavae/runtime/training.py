"""From a composed config to a finished run folder."""

import contextlib
import copy
import logging
import math
import os
import platform
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import TypeVar

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from betavae.data.datamodule import ImageDataModule
from betavae.data.loader import BatchLoader
from betavae.data.scaling import describe_values_outside
from betavae.errors import DivergenceError, RunInterrupted, TrialPruned, UserError, first_line
from betavae.metrics.collapse import describe_collapse
from betavae.models.precision import set_float32_precision
from betavae.models.priors import Prior, VampPrior
from betavae.module import VAEModule
from betavae.objectives import OBJECTIVES, select_objective_kwargs
from betavae.objectives.schedules import BETA_SCHEDULES
from betavae.runtime import loggers
from betavae.runtime.builders import build_callbacks, build_data, build_trainer
from betavae.runtime.callbacks import DISPLAY_NAMES, EpochProgressBar, EpochSummary, ImageLogger, LastValidationMetrics
from betavae.runtime.checkpoint import Checkpoint, load_weights
from betavae.runtime.cli import adapt_commands, run_argument
from betavae.runtime.distributed import ONE_DEVICE_MESSAGE, broadcast_from_rank_zero, rank, started_by_lightning
from betavae.runtime.hydra_config import drop_optimizer_defaults, is_multirun, to_plain
from betavae.runtime.plugins import LOADED, load_plugins
from betavae.runtime.resume import SignalHandler, load_resumed_config
from betavae.runtime.run_folder import RUN, Record, RunFolder, claim_folder, git_commit
from betavae.runtime.run_logger import run_loggers
from betavae.runtime.settings import PRECISION_ALIASES, Config, accepts_text, check_settings, check_signature
from betavae.runtime.terminal_log import close_log, silence_libraries, start_log, warn_on_error
from betavae.runtime.validation import check_likelihood, check_validation, count_batches, never_validates
from betavae.runtime.yaml_files import write_yaml

log = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "tensorboard")
# Torch's own words.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "calculation overflowed")


def train(cfg: DictConfig, callbacks: Sequence[Callback] = (), needs_validation: bool = False) -> float:
    """Train and test a model in Hydra's run folder.

    Args:
        cfg: The composed config.
        callbacks: Callbacks beside those of the config.
        needs_validation: Whether a run that never validates is rejected.

    Returns:
        The test neg. ELBO in nats per image.

    Raises:
        UserError: For invalid settings, before anything is written.
    """
    sweep, overrides = is_multirun(), list(HydraConfig.get().overrides.task)
    drop_optimizer_defaults(cfg)
    folder = RunFolder(os.path.relpath(HydraConfig.get().runtime.output_dir))
    settings, state = to_plain(cfg), None
    load_plugins(settings["plugins"])
    resume = settings["resume"] is not None
    if resume:
        # A job of a sweep resumes with exactly the settings it has.
        settings, state = load_resumed_config(folder, cfg, [] if sweep else overrides)
        done = folder.read_metrics()
        unchanged = all(item.startswith(("resume=", "plugins=")) for item in overrides)
        if done.get("status") == "finished" and done.get("displayed", True) and unchanged:
            print(
                f"{folder.path} is finished; train longer by {run_argument('resume', folder.path)} trainer.max_epochs=N"
            )
            return done["test"]["neg_elbo"]
    check_settings(settings)
    if not sweep and (choice := HydraConfig.get().runtime.choices.get("sweep")):
        raise UserError(f"sweep={choice} needs -m: python train.py -m sweep={choice}")
    if state and settings["trainer"]["max_epochs"] <= state["epoch"]:
        raise UserError(
            f"trainer.max_epochs={settings['trainer']['max_epochs']} is invalid: expected at least "
            f"{state['epoch'] + 1}, the epochs that {folder.path} has begun"
        )
    fast = bool(settings["trainer"].get("fast_dev_run"))
    if fast and resume:
        raise UserError("trainer.fast_dev_run is invalid with resume: it saves nothing; start a new run for it")
    with SignalHandler() as signals, claim_run_folder(folder, not resume and not sweep, sweep, keep=not fast):
        run = TrainingRun(settings, folder, overrides, state, signals, sweep, callbacks, needs_validation)
        return run.run()


@contextlib.contextmanager
def claim_run_folder(folder: RunFolder, new: bool, sweep: bool, keep: bool) -> Iterator[None]:
    """Lock a run folder for all processes of this run; remove it if the run ends before it began.

    Args:
        folder: The run folder.
        new: Whether the folder must not hold a run yet.
        sweep: Whether the run is a job of a sweep, which has claimed the folder.
        keep: Whether the folder is kept after the run; a job of a sweep always keeps it.
    """
    if sweep or (started_by_lightning() and rank()):  # another process or function has claimed it
        yield
        return

    lock = contextlib.ExitStack()

    def claim() -> bool:
        made = claim_folder(folder.path, RUN, "hydra.run.dir")
        # A run that was killed before it wrote its settings has left only the marker.
        if new and not made and (folder.path / "config.yaml").exists():
            raise UserError(
                f"{folder.path} already holds a run; resume it by {run_argument('resume', folder.path)}, or pass "
                "another folder"
            )
        lock.enter_context(folder.lock())
        return made

    made = broadcast_from_rank_zero(claim)
    if rank():
        yield
        return
    with lock:
        try:
            yield
        except UserError:
            keep = keep and bool(folder.read_metrics())
            raise
        finally:
            if made and not keep:  # another folder may hold the outputs of an earlier run
                close_log()
                folder.delete()


def module_arguments(settings: Config, datamodule: ImageDataModule) -> Config:
    """Return the arguments of `VAEModule` for the settings of a run. Raise UserError for invalid ones."""
    objective = settings["objective"] | {"num_train_images": len(datamodule.splits["train"])}
    schedule, optimizer = settings["beta_schedule"], dict(settings["optimizer"])
    arguments = select_objective_kwargs(objective)
    check_signature("objective", OBJECTIVES[objective["name"]], arguments, "vae", "x", "noise", "beta")
    arguments = {name: value for name, value in schedule.items() if name != "name"}
    check_signature("beta_schedule", BETA_SCHEDULES[schedule["name"]], arguments, "step", "total_steps")
    clips, precision = settings["trainer"]["gradient_clip_val"], settings["trainer"]["precision"]
    if clips and "mixed" in precision and "fused" in optimizer:
        optimizer["fused"] = False  # a fused optimizer unscales gradients itself, after the clipping
    model = {key: value for key, value in settings["model"].items() if key != "conditional"}
    model |= {"image_shape": datamodule.image_shape, "prior": settings["prior"]}
    if settings["model"]["conditional"]:
        model["classes"] = datamodule.classes
    return {
        "model": model,
        "objective": objective,
        "optimizer": optimizer,
        **{key: settings[key] for key in ("beta", "beta_schedule", "lr_schedule")},
    }


def init_vamp_prior(prior: Prior, datamodule: ImageDataModule) -> None:
    """Start the pseudo-inputs of a `VampPrior` at random training images.

    Raises:
        UserError: If there are too few images.
    """
    if not isinstance(prior, VampPrior):
        return
    images, components = datamodule.splits["train"], len(prior.pseudo_inputs)
    if components > len(images):
        most = f"at most {len(images)}, the training images"
        raise UserError(f"prior.components={components} is invalid: expected {most}")
    chosen = torch.randperm(len(images))[:components]
    batches = BatchLoader(images, components, binarize=datamodule.binarize, scaling=datamodule.scaling)
    prior.init_from_images(batches.batch(chosen)[0])


def as_user_error(error: BaseException) -> BaseException:
    """Return a UserError for an error of memory or of Lightning's arguments, and any other error as it is."""
    if isinstance(error, MisconfigurationException):
        return UserError(f"trainer: {first_line(error).rstrip('.')}")
    if isinstance(error, RuntimeError) and any(words in first_line(error) for words in OUT_OF_MEMORY):
        return UserError(
            "the model does not fit into memory; reduce model.hidden_dims, model.latent_dim or data.batch_size"
        )
    return error


C = TypeVar("C", bound=Callback)


class TrainingRun:
    """One run: its data, module and trainer, and the stages from its first step to its last line."""

    def __init__(
        self,
        settings: Config,
        folder: RunFolder,
        overrides: Sequence[str] = (),
        state: Checkpoint | None = None,
        signals: SignalHandler | None = None,
        sweep: bool = False,
        callbacks: Sequence[Callback] = (),
        needs_validation: bool = False,
    ):
        """Build and check everything. Only the data folder is written to.

        Args:
            settings: The validated settings of `TrainConfig`.
            folder: The run folder.
            overrides: The arguments of the command.
            state: The checkpoint to resume from.
            signals: The handler of signals, if the process has one.
            sweep: Whether the run is a job of a sweep.
            callbacks: Callbacks beside those of the settings.
            needs_validation: Whether a run that never validates is rejected.

        Raises:
            UserError: For settings that are invalid for these data or this machine.
        """
        self.settings, self.folder, self.overrides, self.sweep, self.state = settings, folder, overrides, sweep, state
        self.signals = signals or SignalHandler()
        self.record: Record = {}
        # Before anything is built, so that the seed determines the first weight too.
        L.seed_everything(settings["seed"], verbose=False)
        set_float32_precision(settings["trainer"]["matmul_precision"])
        silence_libraries()
        settings = copy.deepcopy(settings)  # a custom class may change its arguments
        precision = settings["trainer"]["precision"]
        settings["trainer"]["precision"] = PRECISION_ALIASES.get(precision, precision)
        self.fast_dev_run = int(settings["trainer"].get("fast_dev_run", 0))
        self.datamodule = build_data(settings["data"])
        self.datamodule.has_conditions = settings["model"]["conditional"]
        splits = self.datamodule.splits
        try:
            self.module = VAEModule(**module_arguments(settings, self.datamodule))
        except TypeError as error:  # of the arguments of a network or a likelihood
            raise UserError(f"model: {error}") from error
        except RuntimeError as error:
            if (described := as_user_error(error)) is error:
                raise
            raise described from error
        if splits["train"].columns is not None and getattr(self.module.vae.encoder, "needs_images", False):
            raise UserError(f"model.network={settings['model']['network']} is invalid: expected mlp for a table")
        support = getattr(self.module.vae.likelihood, "support", "real numbers")
        check_likelihood(settings["model"]["likelihood"], support, self.datamodule.scaling)
        if settings["init"] == "data":
            pixels = splits["train"].pixels.index_select(0, torch.arange(min(len(splits["train"]), 60_000)))
            try:
                # A mean of large numbers would lose digits in float32.
                values = pixels if pixels.dtype == torch.float64 else pixels.float()
                self.module.vae.init_from_mean_image(self.datamodule.scaling.apply(values.mean(0)))
            except ValueError as error:
                raise UserError(str(error)) from error
        init_vamp_prior(self.module.vae.prior, self.datamodule)
        if settings["init_from"] is not None and not state:
            load_weights(self.module.vae, settings["init_from"], self.module.hparams["model"])
        self.callbacks = build_callbacks(settings, folder, self.signals, len(splits["validation"]) > 0)
        self.trainer = build_trainer(settings, self.module, self.datamodule, self.callbacks)
        # After the checkpoint callbacks, which Lightning moves to the end: a pruned epoch is saved first.
        self.trainer.callbacks += callbacks  # type: ignore[attr-defined]
        check_validation(settings, splits, self.module, self.trainer.world_size)
        if sweep and self.trainer.world_size > 1:
            raise UserError(ONE_DEVICE_MESSAGE)
        if needs_validation and (why := never_validates(settings, splits)):
            raise UserError(f"a search needs validation metrics, and this run never validates ({why})")
        found = self.datamodule.fingerprints
        known = state.get("fingerprints", {}) if state else found
        if changed := [name for name in found if found[name] != known.get(name)]:
            images = [name for name in changed if name in splits]
            what = f"{', '.join(images)} images" if images else ", ".join(changed)
            raise UserError(
                f"resume: {self.datamodule.source.root}: the {what} have changed since this run began; restore the "
                "data or pass a copy by data.root=PATH, or start a new run"
            )

    def callback(self, kind: type[C]) -> C:
        """Return the callback of a class."""
        return next(callback for callback in self.callbacks if isinstance(callback, kind))

    def run(self) -> float:
        """Train, test and report; return the test neg. ELBO in nats per image."""
        try:
            if rank() == 0:
                self.start()
            else:
                self.trainer.loggers = [DummyLogger()]  # Lightning's own callbacks require one
                start_log(self.folder.path, False, "")
            last = str(self.folder.last) if self.state else None
            self.trainer.fit(self.module, self.datamodule, ckpt_path=last)
            self.record_fit()
            scalars = self.test()
            if rank() == 0:
                self.finish(scalars)
        except BaseException as error:
            ending = self.translate_error(as_user_error(error))
            if ending is error:
                raise
            raise ending from error
        return scalars["neg_elbo"]

    def start(self) -> None:
        """Write the settings and the first record, and start the log and the loggers."""
        settings, folder = self.settings, self.folder
        if settings["resume"] is not None:
            folder.delete_regenerated()
        bar = isinstance(self.trainer.progress_bar_callback, EpochProgressBar)
        side_by_side = self.sweep and not HydraConfig.get().launcher["_target_"].endswith(".BasicLauncher")
        start_log(folder.path, not bar, f"{folder.path.name}  " if side_by_side else "")
        needs_unit_interval = getattr(self.module.vae.likelihood, "support", "") == "[0, 1]"
        can_be_outside = self.datamodule.scaling.mode == "minmax" and self.datamodule.binarize == "none"
        if needs_unit_interval and can_be_outside:
            for line in describe_values_outside(self.datamodule.scaling, self.datamodule.splits):
                log.warning("note  %s", line)
        if settings["resume"] is None:
            write_yaml(folder.path / "overrides.yaml", list(self.overrides))
        # Also on resume: if the run is stopped again, the next resume keeps what this command changed.
        write_yaml(folder.path / "config.yaml", settings | {"resume": None})
        named = {} if self.fast_dev_run else loggers.make_loggers(settings["logger"], folder, self.state)
        self.trainer.loggers = list(named.values())
        if self.fast_dev_run:
            self.trainer.loggers = [DummyLogger()]  # for callbacks that require one
        for logger in named.values():
            logger.log_settings(flatten_hparams(settings))
        device = self.trainer.strategy.root_device
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.record = {
            "status": "running",
            "pid": os.getpid(),
            "seed": settings["seed"],
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "git_commit": git_commit(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device_name}",
            "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        }
        if settings["tags"]:
            self.record["tags"] = settings["tags"]
        if LOADED:
            self.record["plugins"] = dict(LOADED)
        if ids := {name: logger.version for name, logger in named.items() if logger.version}:
            self.record["loggers"] = ids
        folder.write_record(self.record)

    def record_fit(self) -> None:
        """Record steps and times now, since Lightning restores callbacks from the checkpoint that is tested."""
        summary = self.callback(EpochSummary)
        self.record |= {
            "epochs": self.trainer.current_epoch,
            "steps": self.trainer.global_step,
            "epoch_seconds": list(summary.epochs),
            "fit_seconds": round(summary.before, 2),
        }
        self.fitted = time.perf_counter()

    def test(self) -> dict[str, float]:
        """Return the test metrics of the best checkpoint, or of the last one if nothing was validated.

        With fast_dev_run, which saves no checkpoint, they are those of the weights in memory.
        """
        best = self.folder.best.exists() and len(self.datamodule.splits["validation"]) > 0
        best = self.trainer.strategy.broadcast(best)
        self.tested_checkpoint = self.folder.best if best else self.folder.last
        path = None if self.fast_dev_run else str(self.tested_checkpoint)
        self.trainer.test(self.module, self.datamodule, ckpt_path=path, verbose=False)
        metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        test = {name.removeprefix("test/"): value for name, value in metrics.items() if name.startswith("test/")}
        if not all(math.isfinite(value) for value in test.values()):
            raise DivergenceError(f"the test metrics of {self.tested_checkpoint} are not finite", {})
        if self.module.vae.likelihood.is_discrete(self.settings["data"]["binarize"]):
            test["bits_per_dimension"] = test["neg_elbo"] / math.log(2) / math.prod(self.module.vae.image_shape)
        return {name: round(value, 4) for name, value in test.items()}

    def finish(self, scalars: dict[str, float]) -> None:
        """Write the record, then the figures, whose failure does not affect the run."""
        if self.fast_dev_run:
            self.folder.write_record(self.record | {"status": "finished", "test": scalars, "seconds": 0.0})
            self.log_test_metrics(scalars)
            log.info("fast_dev_run: training, validation and test ran without an error, and no file is kept")
            return
        vae, binarize = self.module.vae, self.settings["data"]["binarize"]
        record = self.record | {
            "status": "finished",
            "displayed": False,  # a run that is killed before is tested and displayed by a resume
            "checkpoint": str(self.tested_checkpoint.relative_to(self.folder.path)),
            "test": scalars,
            "test_images": self.count_test_images(),
            "threads": torch.get_num_threads(),
            "seconds": round(self.record["fit_seconds"] + time.perf_counter() - self.fitted, 2),
        }
        if self.tested_checkpoint == self.folder.best:
            # Lightning has restored the callback from the tested checkpoint.
            validation = self.callback(LastValidationMetrics).metrics
            record["validation"] = {name: round(value, 4) for name, value in validation.items()}
        if vae.classes or not vae.likelihood.is_discrete(binarize):
            values = self.datamodule.scaling.describe(vae.image_shape)
            record["note"] = vae.describe_numbers(binarize, values)
        if collapse := describe_collapse(scalars["active_units"], vae.latent_dim, scalars["kl"]):
            record["posterior_collapse"] = collapse
        self.folder.write_record(record)
        self.record = record
        self.log_test_metrics(scalars)
        named = {f"test/{name}": value for name, value in scalars.items()}
        for logger in run_loggers(self.trainer):
            with warn_on_error(f"sending test metrics to {type(logger).__name__}"):
                logger.log_final_metrics(flatten_hparams(self.settings), named)
        self.callback(ImageLogger).finish(self.trainer, self.module.vae, self.tested_checkpoint)
        with warn_on_error("writing to metrics.json that the figures are drawn"):
            self.folder.write_record(record | {"displayed": True})
        if not self.sweep:
            log.info("      docs/numbers.md explains these numbers")
            log.info("run   %s", self.folder.path)
            commands = [logger.view_command for logger in run_loggers(self.trainer) if logger.view_command]
            out = "" if self.datamodule.splits["train"].columns is None else " out=samples.csv"
            commands.append(f"python scripts/sample.py {run_argument('ckpt', self.tested_checkpoint)}{out}")
            log.info("next  %s", adapt_commands("\n      ".join(commands)))
        self.end_loggers("finished")

    def log_test_metrics(self, scalars: dict[str, float]) -> None:
        apart = ("active_units", "neg_elbo", "bits_per_dimension")
        terms = [f"{DISPLAY_NAMES.get(name, name)} {scalars[name]:.2f}" for name in scalars if name not in apart]
        covered, total = self.count_test_images(), len(self.datamodule.splits["test"])
        item = self.datamodule.splits["test"].item
        log.info(
            "test  %s  neg. ELBO %.2f nats per %s (%s%d active units, %s, trained in %.0f s)",
            "  ".join(terms),
            scalars["neg_elbo"],
            item,
            f"{covered:,} of {total:,} test {item}s, " if covered < total else "",
            scalars["active_units"],
            "no checkpoint" if self.fast_dev_run else self.tested_checkpoint.name,
            self.record["fit_seconds"],
        )
        if "bits_per_dimension" in scalars:
            log.info("      %.4f bits per dimension", scalars["bits_per_dimension"])
        if "note" in self.record:
            log.info("note  %s", self.record["note"])
        if "posterior_collapse" in self.record:
            log.info("note  %s", self.record["posterior_collapse"])

    def count_test_images(self) -> int:
        """Return the number of test images that the test metrics cover."""
        test, processes = self.datamodule.splits["test"], self.trainer.world_size
        batches = self.fast_dev_run or count_batches(self.settings, self.datamodule.splits, processes)[0]["test"]
        return min(len(test), batches * self.settings["data"]["eval_batch_size"] * processes)

    def end_loggers(self, status: str) -> None:
        for logger in run_loggers(self.trainer):
            with warn_on_error(f"closing {type(logger).__name__}"):
                logger.finish(status)

    def translate_error(self, error: BaseException) -> BaseException:
        """Record why the run ended early, and return the exception to raise for it."""
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        if rank() == 0 and self.record:
            self.record_failure(error, stopped)
        if not stopped:
            return error
        received = self.signals.received
        if isinstance(error, SystemExit) and received not in (None, signal.SIGINT, signal.SIGTERM):
            return error  # from a launcher that has queued the job again
        return RunInterrupted(128 + (received or signal.SIGINT))

    def record_failure(self, error: BaseException, stopped: bool) -> None:
        resume_command = adapt_commands(f"  python train.py {run_argument('resume', self.folder.path)}")
        if self.record["status"] == "finished":
            log.info("stopped after the test, while figures were drawn; draw them by\n%s", resume_command)
            self.end_loggers("finished")
            return
        named = {DivergenceError: "diverged", TrialPruned: "pruned"}
        status = "interrupted" if stopped else named.get(type(error), "failed")
        steps = self.trainer.global_step
        new = not self.sweep and self.settings["resume"] is None
        if status == "failed" and isinstance(error, UserError) and not steps and new:
            self.end_loggers(status)
            close_log()
            self.folder.delete_outputs()  # the run never took a step
            return
        self.record |= {"status": status, "epochs": self.trainer.current_epoch, "steps": steps}
        if status in ("failed", "diverged"):
            self.record |= {"error": f"{type(error).__name__}: {error}", "resumable": self.trainer.fit_loop.done}
            log.debug("%s", "".join(traceback.format_exception(error)))
        with contextlib.suppress(OSError):  # on a full disk, the error that is being raised says so
            self.folder.write_record(self.record)
        if stopped:
            log.info("interrupted at step %d; resume by\n%s", steps, resume_command)
        elif status == "pruned":
            log.info("pruned  %s", error)
        elif self.folder.last.exists():
            log.info("the last good checkpoint is %s", self.folder.last)
        self.end_loggers(status)


def flatten_hparams(settings: Config) -> Config:
    """Return settings for a table of hyper-parameters, with values of one type per column.

    Null is left out.
    """
    values: Config = {"seed": settings["seed"], "beta": settings["beta"]}
    if settings["tags"]:
        values["tags"] = ", ".join(settings["tags"])
    for group in ("model", "data", "prior", "objective", "beta_schedule", "optimizer", "lr_schedule", "trainer"):
        for key, value in settings[group].items():
            number = isinstance(value, int | float) and not accepts_text(group, key)
            if value is not None:
                values[f"{group}.{key}"] = value if number else str(value)
    return values
