"""The way from a command line to a function: Hydra, with errors said in one sentence."""

# mypy: disable-error-code="valid-type"

import atexit
import contextlib
import errno
import functools
import gc
import hashlib
import inspect
import io
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from betavae.errors import RunInterrupted, UserError
from betavae.runtime import distributed
from betavae.runtime.command_line import argument
from betavae.runtime.settings import (
    OptionalPathStr,
    PathStr,
    Seed63,
    Settings,
    dotted_keys,
    suggest,
    to_plain,
    validate,
)
from betavae.sweeps import jobs

# What a machine refuses, as opposed to what we got wrong.
USER_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)
# Beside the sources; with the package installed elsewhere, beside the script that runs or its folder.
CONFIG_ROOTS = (Path(__file__).parents[3], *Path(sys.argv[0]).resolve().parents[:2])
CONFIGS = next(
    (place / "configs" for place in CONFIG_ROOTS if (place / "configs" / "train.yaml").is_file()), Path("configs")
)


class ScriptSettings(Settings):
    """What every script shares; a script's own settings are a class of its own, in the script. The title of a field
    says what it is for, its type what it may be."""

    debug: bool = Field(False, title="true: errors come with their traceback")


class RunsSettings(ScriptSettings):
    """Of a script that looks for runs."""

    runs: PathStr = Field("runs", title="the folder in which runs are looked for")


class ModelSettings(RunsSettings):
    """Of a script that reads a checkpoint."""

    ckpt: OptionalPathStr = Field(None, title="a checkpoint file or a run folder; null: the newest finished run")


class DataSettings(ModelSettings):
    """Of a script that looks at images of the data that a model was trained on."""

    data_root: OptionalPathStr = Field(None, title="the data folder; null: the one it was trained with")


class SeedSettings(ScriptSettings):
    """Of a script that draws at random."""

    seed: Seed63 = Field(0, title="the same seed gives the same output")


def safe_name(text: Any) -> str:
    """Shorten a text to a folder name that needs no quoting in a shell, a URL or a Hydra override."""
    name = re.sub(r"[^A-Za-z0-9.,_-]+", "_", re.sub(r"[\[\]{}'\"]", "", str(text))).strip("_.")
    return name[:200]  # file systems allow 255 bytes


def job_name(overrides: str) -> str:
    """Name the folder of a sweep's job; different overrides have different names, even if case is ignored."""
    name = safe_name(overrides)
    # Nothing is lost but "=", and each value follows the last "_".
    plain = re.fullmatch(r"[a-z0-9._]+=[a-z0-9.-]+(,[a-z0-9._]+=[a-z0-9.-]+)*", overrides)
    if plain and name == overrides.replace("=", "_"):
        return name
    digest = hashlib.sha1(overrides.encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{name[:191].rstrip(',_')}_{digest}".lstrip("_") if overrides else "job"


class UniqueRunDir:
    """The resolver that names a run folder, which Hydra asks more than once; a process has one."""

    def __init__(self) -> None:
        self.known: dict[tuple[str | None, str], str] = {}
        self.made: list[Path] = []  # folders above the run's, the innermost first
        self.preexisting = {Path.cwd()}  # folders that were named, and were there before

    def __call__(self, resume: str | None, wanted: str) -> str:
        """`resume`, or `wanted`, where that is taken with a number, made here so that no other run gets it."""
        if resume is not None:
            if not Path(resume).is_dir():
                found = "a file; pass its run folder" if Path(resume).exists() else "not a run folder: no such folder"
                raise UserError(f"resume: {resume} is {found}")
            return resume
        if (resume, wanted) not in self.known:
            self.known[resume, wanted] = distributed.broadcast_from_rank_zero(lambda: self.make(Path(wanted)))
        return self.known[resume, wanted]

    def make(self, wanted: Path) -> str:
        parent = wanted.parent
        try:
            self.made.extend(path for path in (parent, *parent.parents) if not path.exists())
            parent.mkdir(parents=True, exist_ok=True)
            for number in range(1, 10**6):
                path = wanted if number == 1 else Path(f"{wanted}_{number}")
                with contextlib.suppress(FileExistsError):
                    path.mkdir()
                    return str(path)
        except OSError as error:
            raise UserError(f"runs: cannot make a folder in {parent} ({error.strerror})") from error
        raise UserError(f"runs: {wanted} and its numbers are all taken")

    def remove_empty(self) -> None:
        """Remove the run folder and what was made for it, where nothing lies there."""
        path = Path(HydraConfig.get().runtime.output_dir)
        for folder in (path, *self.made):
            if folder.resolve() not in self.preexisting:
                with contextlib.suppress(OSError):  # it holds something
                    folder.rmdir()


run_dir = UniqueRunDir()
OmegaConf.register_new_resolver("run_dir", run_dir)
OmegaConf.register_new_resolver("job_name", job_name)
OmegaConf.register_new_resolver("safe_name", safe_name)


class Command:
    """A function of a config as a command line of its own."""

    def __init__(self, task: Callable[[DictConfig], Any], name: str, keys: Callable[[], list[str]], folder: str | None):
        self.task, self.name, self.keys = task, name, keys
        self.failure: Exception | None = None
        self.composed = False
        # A function, whose name and file Hydra looks at.
        guarded = functools.wraps(task)(lambda cfg: self.run_guarded(cfg))
        self.hydra_main = hydra.main(version_base="1.3", config_path=folder, config_name=name)(guarded)

    def run_guarded(self, cfg: DictConfig) -> Any:
        self.composed = True
        try:
            return self.task(cfg)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            if self.name == "train":
                run_dir.remove_empty()
            self.failure = error  # past Hydra, which would print around it

    def __call__(self) -> None:
        # A shell leaves the ~ of `key=~/file` as it is, and Hydra cannot read it.
        sys.argv[1:] = [
            re.sub("^([^=]+=)~(?=/)", lambda m: m[1] + os.path.expanduser("~"), arg) for arg in sys.argv[1:]
        ]
        debug = any(re.fullmatch(r"\+{0,2}debug=(true|1|yes|on)", arg, re.IGNORECASE) for arg in sys.argv[1:])
        # Hydra then hands its errors on, instead of printing them its own way.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        # Our Slurm preset is whole, and bears the name of the plugin's own on purpose.
        warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/submitit_slurm' is validated")
        logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of a cache of fonts that it makes
        self.failure, self.composed = None, False
        jobs.SweepCallback.folder = None
        typed = (word.partition("=") for word in sys.argv[1:])
        named = [Path(value.strip("'\"")) for key, _, value in typed if key in ("resume", "hydra.run.dir")]
        # Hydra makes a named folder itself, with the folders above it.
        run_dir.made = [parent for path in named for parent in path.parents if not parent.exists()]
        run_dir.preexisting = {Path.cwd(), *(path.resolve() for path in named if path.is_dir())}
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")  # a path that is not UTF-8 is printed as it is
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            self.hydra_main()
            if self.failure:
                raise self.failure
        except (KeyboardInterrupt, SystemExit) as stop:
            code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
            jobs.print_summary(interrupted=True)
            if code in (130, 143) and not isinstance(stop, RunInterrupted) and distributed.rank() == 0:
                print("stopped before there was anything to keep", file=sys.stderr)
            sys.exit(code)
        except Exception as error:
            jobs.print_summary()
            if debug or not (sentence := self.describe_error(error)):
                raise
            rank = distributed.rank()
            print(f"error: {sentence}" if not rank else f"[rank {rank}] error: {sentence}", file=sys.stderr)
            sys.exit(1)
        if jobs.print_summary():
            sys.exit(1)

    def describe_error(self, error: Exception) -> str | None:
        return explain(error, not self.composed, self.keys())


def train_command(task: Callable[[DictConfig], Any]) -> Command:
    return Command(task, "train", all_keys, str(CONFIGS))


def script_command(settings: type[ScriptSettings]) -> Callable[[Callable[[Any], Any]], Command]:
    """Make a function of `settings` a command line; its module's docstring is its help, the class the defaults."""

    def decorate(task: Callable[[Any], Any]) -> Command:
        name = Path(inspect.getfile(task)).stem
        fields = settings.model_fields
        lines = [
            f"  {key}={format_default(field.default)}".ljust(28) + f"  {field.title}" for key, field in fields.items()
        ]
        words = (task.__globals__["__doc__"] or "").strip()
        node = {
            **{key: field.get_default(call_default_factory=True) for key, field in fields.items()},
            "defaults": ["_self_", {"override hydra/job_logging": "none"}],
            "hydra": {
                "output_subdir": None,
                "run": {"dir": "."},
                "job": {"chdir": False, "name": name},
                "help": {"app_name": name, "template": escape_interpolation(f"{words}\n\n" + "\n".join(lines) + "\n")},
            },
        }
        ConfigStore.instance().store(name=name, node=node)
        return Command(lambda cfg: task(validate(settings, to_plain(cfg))), name, lambda: dotted_keys(settings), None)

    return decorate


def escape_interpolation(text: str) -> str:
    return text.replace("${", "\\${")


def format_default(value: Any) -> str:
    """As it is typed on a command line."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Imports of torch and its like with the garbage collector off: it would look at their million objects many times
    over, for half a second. Nor does it look at them again later, which takes a third of a second each time (3.11)."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # or a library reports the rest as leaked
        atexit.register(gc.disable)  # Python looks once more at its end anyway


def explain(error: Exception, composing: bool, keys: list[str]) -> str | None:
    """One sentence for the person who typed the command, or None for a bug of ours. While the config is composed there
    is nothing of ours to fail."""
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, OSError) and error.errno in USER_ERRNOS:
        return f"{error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read as key=value; put quotes around values with special characters"
    if sentence := jobs.describe_launcher_error(error):
        return sentence
    if not composing and not isinstance(error, (UserError, HydraException, OmegaConfBaseException)):
        return None
    cause: BaseException | None = error
    messages = []
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        messages.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(messages)
    if match := re.search(r"Could not override '([^']+)'", text):
        if match[1] in keys:
            group, _, name = match[1].partition(".")
            files = sorted((CONFIGS / group).glob("*.yaml"))
            if options := [f"{group}={path.stem}" for path in files if name in OmegaConf.load(path)]:
                return f"{match[1]} is a setting of {' and '.join(options)}, and this run has another {group}"
            return f"{match[1]} is a setting of some runs that this one does not have: +{match[1]}=... adds it"
        return f"{match[1]} is not a setting{suggest(match[1], keys, '; `--help` and `--cfg job` show all settings')}"
    if match := re.search(r"Could not delete from config\. The value of '([^']+)' is ", text):
        return f"~{match[1]}=... deletes {match[1]} only if that is its value; `~{match[1]}` deletes it whatever it is"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        key, value = match[1].split("=", 1)
        return f"{match[1]} has a comma: with -m, a sweep; as one value, quote it twice: {argument(key, value)}"
    if match := re.search(r"(?:In '[^']+': )?Could not find '([^'/]+)/([^']+)'", text):
        options = sorted(path.stem for path in (CONFIGS / match[1]).glob("*.yaml"))
        return f"{match[1]}={match[2]} is not one of its options: {', '.join(options)}"
    return (messages[0].splitlines() or [type(error).__name__])[0]


def all_keys() -> list[str]:
    """Every dotted key that `configs/train.yaml` and what it is composed of have."""
    keys = [path.name for path in CONFIGS.iterdir() if path.is_dir()]
    for path in (CONFIGS / "train.yaml", *CONFIGS.glob("*/*.yaml")):
        content = OmegaConf.to_container(OmegaConf.load(path))
        own = {key: value for key, value in dict(content).items() if key not in ("defaults", "hydra")}  # type: ignore
        everywhere = path.parent == CONFIGS or "@package _global_" in path.read_text()
        nested = own if everywhere else {path.parent.name: own}
        keys += [key for item in jobs.flat_settings(nested) for key in key_prefixes(item)]
    return list(dict.fromkeys(keys))


def key_prefixes(key: str) -> list[str]:
    """a.b.c -> a, a.b, a.b.c"""
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
