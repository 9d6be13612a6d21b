"""The one recipe that turns a composed config into a finished run folder."""

import contextlib
import copy
import logging
import math
import os
import platform
import signal
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from betavae.errors import DivergenceError, RunInterrupted, TrialPruned, UserError
from betavae.models.precision import set_float32_precision
from betavae.runtime import loggers
from betavae.runtime.builders import as_out_of_memory, build
from betavae.runtime.checkpoint import first_line
from betavae.runtime.command_line import argument
from betavae.runtime.distributed import broadcast_from_rank_zero, rank, started_by_lightning
from betavae.runtime.progress import DISPLAY_NAMES, EpochProgressBar, EpochSummary, ImageLogger, LastValidationMetrics
from betavae.runtime.resume import SignalHandler, load_resumed_config
from betavae.runtime.run_folder import RUN, RunFolder, claim_folder, git_commit
from betavae.runtime.run_logger import run_loggers
from betavae.runtime.settings import check_settings, has_words, to_plain
from betavae.runtime.terminal_log import close_log, silence_libraries, start_log, warn_on_error
from betavae.runtime.validation import never_validates
from betavae.runtime.yaml_files import write_yaml
from betavae.sweeps.jobs import ONE_DEVICE_MESSAGE, chooses_by_validation
from betavae.sweeps.pruning import pruning_callbacks

log = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "tensorboard")


def train(cfg: DictConfig) -> float:
    """Train and test as `cfg` says, in Hydra's run folder. Returns the test neg. ELBO in nats per image.

    Raises UserError for settings that cannot be, before anything is written.
    """
    hydra_cfg = HydraConfig.get()
    sweep = hydra_cfg.mode == RunMode.MULTIRUN
    overrides = list(hydra_cfg.overrides.task)
    run = RunFolder(os.path.relpath(hydra_cfg.runtime.output_dir))
    settings, state = to_plain(cfg), None
    resume = settings["resume"] is not None
    if resume:
        # A job of a sweep goes on with the very settings it has.
        settings, state = load_resumed_config(run, cfg, [] if sweep else overrides)
        done = run.read_metrics()
        if done.get("status") == "finished" and done.get("displayed", True) and len(overrides) == 1:
            log_to_terminal(
                f"{run.path} is finished; to train it longer: {argument('resume', run.path)} trainer.max_epochs=N"
            )
            return done["test"]["neg_elbo"]
    check_settings(settings)
    if state and settings["trainer"]["max_epochs"] <= state["epoch"]:
        raise UserError(
            f"resume: trainer.max_epochs={settings['trainer']['max_epochs']} is past: it is in epoch "
            f"{state['epoch'] + 1}"
        )
    with SignalHandler() as signals, claim_run_folder(run, new=not resume and not sweep, sweep=sweep):
        return TrainingRun(settings, run, overrides, sweep, state, signals).run()


@contextlib.contextmanager
def claim_run_folder(run: RunFolder, new: bool, sweep: bool) -> Iterator[None]:
    """A run folder for this process, or (of several) for all of this run; a `new` one must hold no run yet. What could
    not even begin is taken back."""
    if sweep or (started_by_lightning() and rank()):  # the job, or the first process, has seen to it
        yield
        return

    held = contextlib.ExitStack()

    def claim() -> bool:
        made = claim_folder(run.path, RUN, "hydra.run.dir")
        # One that was killed before it wrote its settings has left the mark alone.
        if new and not made and (run.path / "config.yaml").exists():
            raise UserError(
                f"{run.path} already holds a run; go on with it by {argument('resume', run.path)}, or choose another "
                "folder"
            )
        held.enter_context(run.lock())
        return made

    made = broadcast_from_rank_zero(claim)
    if rank():
        yield
        return
    with held:
        try:
            yield
        except UserError:
            if made and not run.read_metrics():
                close_log()
                run.delete()
            raise


class TrainingRun:
    """One run from its settings to its last line. In each method one stage of it."""

    def __init__(
        self,
        settings: dict[str, Any],
        run: RunFolder,
        overrides: list[str],
        sweep: bool,
        state: dict[str, Any] | None,
        signals: SignalHandler,
    ):
        self.settings, self.folder, self.overrides, self.sweep = settings, run, overrides, sweep
        self.state, self.signals = state, signals
        self.record: dict[str, Any] = {}

    def run(self) -> float:
        # The seed comes before anything is built, so that it decides the first weight too.
        L.seed_everything(self.settings["seed"], verbose=False)
        set_float32_precision(self.settings["trainer"]["matmul_precision"])
        silence_libraries()
        # A copy, since the user's own classes may change what they are given.
        settings = copy.deepcopy(self.settings)
        self.datamodule, self.module, self.trainer = build(settings, self.folder, self.signals)
        if self.sweep and self.trainer.world_size > 1:
            raise UserError(ONE_DEVICE_MESSAGE)
        search = self.sweep and chooses_by_validation(HydraConfig.get())
        if search and (why := never_validates(self.settings, self.datamodule.splits)):
            raise UserError(f"a search chooses by validation numbers, and this run never validates ({why})")
        found = self.datamodule.fingerprints
        known = self.state.get("fingerprints", {}) if self.state else found
        if changed := [split for split in found if found[split] != known.get(split)]:
            raise UserError(
                f"resume: {self.datamodule.source.root}: the {', '.join(changed)} images have changed since this run "
                "began; restore the data or pass a copy by data.root=PATH, or start a new run"
            )
        self.trainer.callbacks += pruning_callbacks(HydraConfig.get(), self.settings["trainer"]["max_epochs"])  # type: ignore[attr-defined]
        self.epoch_summary = next(c for c in self.trainer.callbacks if isinstance(c, EpochSummary))  # type: ignore[attr-defined]
        try:
            if rank() == 0:
                self.start()
            else:
                self.trainer.loggers = [DummyLogger()]  # Lightning's own callbacks ask for one
            self.fit()
            scalars = self.test()
            if rank() == 0:
                self.finish(scalars)
        except BaseException as error:
            ending = self.translate_error(as_out_of_memory(error) if isinstance(error, RuntimeError) else error)
            if ending is error:
                raise
            raise ending from error
        return scalars["neg_elbo"]

    def start(self) -> None:
        """The files that say what is run, before its first step."""
        if self.settings["resume"] is not None:
            self.folder.drop_regenerated()
        bar = isinstance(self.trainer.progress_bar_callback, EpochProgressBar)
        side_by_side = self.sweep and not HydraConfig.get().launcher["_target_"].endswith(".BasicLauncher")
        start_log(self.folder.path, not bar, f"{self.folder.path.name}  " if side_by_side else "")
        if self.settings["resume"] is None:
            write_yaml(self.folder.path / "overrides.yaml", self.overrides)
        # Also on resume: a run that is stopped again goes on with what this command changed.
        write_yaml(self.folder.path / "config.yaml", self.settings | {"resume": None})
        kept = loggers.make_loggers(self.settings["logger"], self.folder, self.state)
        self.trainer.loggers = list(kept.values())
        for logger in kept.values():
            logger.log_settings(flatten_hparams(self.settings))
        device = self.trainer.strategy.root_device
        self.record = {
            "status": "running",
            "pid": os.getpid(),
            "seed": self.settings["seed"],
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "git_commit": git_commit(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
            + (torch.cuda.get_device_name(device) if device.type == "cuda" else device.type),
            "versions": {p: version(p) for p in PACKAGES} | {"python": platform.python_version()},
        }
        if ids := {name: logger.version for name, logger in kept.items() if logger.version}:
            self.record["loggers"] = ids
        self.folder.write_record(self.record)

    def fit(self) -> None:
        if rank():
            start_log(self.folder.path, False, "")
        last = str(self.folder.last) if self.state else None
        self.trainer.fit(self.module, self.datamodule, ckpt_path=last)
        self.record |= {"epochs": self.trainer.current_epoch, "steps": self.trainer.global_step}
        # Now, since Lightning winds callbacks back to the checkpoint that is tested.
        self.record |= {
            "epoch_seconds": list(self.epoch_summary.epochs),
            "fit_seconds": round(self.epoch_summary.before, 2),
        }
        self.fitted = time.perf_counter()

    def test(self) -> dict[str, float]:
        """The test numbers of the best checkpoint, or the last where no images were kept for validation."""
        best = self.folder.best.exists() and len(self.datamodule.splits["validation"]) > 0
        best = self.trainer.strategy.broadcast(best)
        self.tested_checkpoint = self.folder.best if best else self.folder.last
        self.trainer.test(self.module, self.datamodule, ckpt_path=str(self.tested_checkpoint), verbose=False)
        metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        test = {name.removeprefix("test/"): value for name, value in metrics.items() if name.startswith("test/")}
        if not all(math.isfinite(value) for value in test.values()):
            raise DivergenceError(f"the test numbers of {self.tested_checkpoint} are not finite", {})
        if self.module.vae.likelihood.is_discrete(self.settings["data"]["binarize"]):
            test["bits_per_dimension"] = test["neg_elbo"] / math.log(2) / math.prod(self.module.vae.image_shape)
        return {name: round(value, 4) for name, value in test.items()}

    def finish(self, scalars: dict[str, float]) -> None:
        """Write the record; after it whatever is only displayed."""
        likelihood, binarize = self.module.vae.likelihood, self.settings["data"]["binarize"]
        record = self.record | {
            "status": "finished",
            "displayed": False,  # killed before it is, the run is tested and displayed again by a resume
            "checkpoint": str(self.tested_checkpoint.relative_to(self.folder.path)),
            "test": scalars,
            "threads": torch.get_num_threads(),
            "seconds": round(self.record["fit_seconds"] + time.perf_counter() - self.fitted, 2),
        }
        if self.tested_checkpoint == self.folder.best:
            # Of that very checkpoint: Lightning winds callbacks back to the one that is tested.
            validation = next(c for c in self.trainer.callbacks if isinstance(c, LastValidationMetrics))  # type: ignore
            record["validation"] = {name: round(value, 4) for name, value in validation.numbers.items()}
        if not likelihood.is_discrete(binarize):
            record["note"] = likelihood.describe(binarize)
        self.folder.write_record(record)
        self.record = record
        self.say(scalars)
        for logger in run_loggers(self.trainer):
            with warn_on_error(f"sending test numbers to {type(logger).__name__}"):
                logger.log_final_metrics(
                    flatten_hparams(self.settings), {f"test/{name}": value for name, value in scalars.items()}
                )
        next(c for c in self.trainer.callbacks if isinstance(c, ImageLogger)).finish(self.trainer, self.module.vae)  # type: ignore
        with warn_on_error("noting in metrics.json that all is drawn"):
            self.folder.write_record(record | {"displayed": True})
        if not self.sweep:
            log.info("      docs/numbers.md says what these numbers are")
            log.info("run   %s", self.folder.path)
            kept = [logger.view_command for logger in run_loggers(self.trainer) if logger.view_command]
            following = [*kept, f"python scripts/sample.py {argument('ckpt', self.tested_checkpoint)}"]
            log.info("next  %s", "\n      ".join(following))
        self.end_loggers("finished")

    def say(self, scalars: dict[str, float]) -> None:
        apart = ("active_units", "neg_elbo", "bits_per_dimension")
        main = {name: scalars[name] for name in scalars if name not in apart}
        terms = "  ".join(f"{DISPLAY_NAMES.get(name, name)} {value:.2f}" for name, value in main.items())
        log.info(
            "test  %s  neg. ELBO %.2f nats per image (%d active units, %s, trained in %.0f s)",
            *(
                terms,
                scalars["neg_elbo"],
                scalars["active_units"],
                self.tested_checkpoint.name,
                self.record["fit_seconds"],
            ),
        )
        if "bits_per_dimension" in scalars:
            log.info("      %.4f bits per dimension", scalars["bits_per_dimension"])
        if "note" in self.record:
            log.info("note  %s", self.record["note"])

    def end_loggers(self, status: str) -> None:
        for logger in run_loggers(self.trainer):
            with warn_on_error(f"closing {type(logger).__name__}"):
                logger.finish(status)

    def translate_error(self, error: BaseException) -> BaseException:
        """What to raise for a run that did not come to its end, after its folder says why."""
        if isinstance(error, MisconfigurationException):
            error = UserError(f"trainer: {first_line(error).rstrip('.')}")
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        if rank() == 0 and self.record:
            self.record_failure(error, stopped)
        if not stopped:
            return error
        asked = self.signals.received
        if isinstance(error, SystemExit) and asked not in (None, signal.SIGINT, signal.SIGTERM):
            return error  # of a launcher that has queued the job again
        return RunInterrupted(128 + (asked or signal.SIGINT))

    def record_failure(self, error: BaseException, stopped: bool) -> None:
        if self.record["status"] == "finished":
            log.info("stopped while pictures were drawn, after the test; draw them with")
            log.info("  python train.py %s", argument("resume", self.folder.path))
            self.end_loggers("finished")
            return
        named = {DivergenceError: "diverged", TrialPruned: "pruned"}
        status = "interrupted" if stopped else named.get(type(error), "failed")
        steps = self.trainer.global_step
        new = not self.sweep and self.settings["resume"] is None
        if status == "failed" and isinstance(error, UserError) and not steps and new:
            self.end_loggers(status)
            close_log()
            self.folder.delete_outputs()  # nothing ever began
            return
        self.record |= {"status": status, "epochs": self.trainer.current_epoch, "steps": steps}
        if status in ("failed", "diverged"):
            self.record |= {"error": f"{type(error).__name__}: {error}", "resumable": self.trainer.fit_loop.done}
            log.debug("%s", "".join(traceback.format_exception(error)))
        with contextlib.suppress(OSError):  # of a full disk: the error that is under way says it
            self.folder.write_record(self.record)
        if stopped:
            again = argument("resume", self.folder.path)
            log.info("interrupted at step %d; go on with\n  python train.py %s", steps, again)
        elif status == "pruned":
            log.info("pruned  %s", error)
        elif self.folder.last.exists():
            log.info("the last good checkpoint is %s", self.folder.last)
        self.end_loggers(status)


def log_to_terminal(line: str) -> None:
    print(line)


def flatten_hparams(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings for a table of hyper-parameters, each key's values of one type in all runs: null is left out."""
    values: dict[str, Any] = {"seed": settings["seed"], "beta": settings["beta"]}
    for group in ("model", "data", "objective", "beta_schedule", "optimizer", "lr_schedule", "trainer"):
        for key, value in settings[group].items():
            if value is not None:
                values[f"{group}.{key}"] = (
                    value if isinstance(value, int | float) and not has_words(group, key) else str(value)
                )
    return values
