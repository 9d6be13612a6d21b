"""Hydra's part of train.py: the config folder, the names of run folders, and one-line errors."""

import contextlib
import functools
import hashlib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from betavae.errors import UserError, first_line
from betavae.runtime import distributed
from betavae.runtime.cli import argument, describe_error, quote_value, report_errors
from betavae.runtime.settings import flatten, suggest_key

# Beside the sources; if the package is installed elsewhere, beside the script that runs, its folder or in the package.
CONFIG_ROOTS = (Path(__file__).parents[3], *Path(sys.argv[0]).resolve().parents[:2], Path(__file__).parents[1])
CONFIGS = next((root / "configs" for root in CONFIG_ROOTS if (root / "configs/train.yaml").is_file()), Path("configs"))
# Settings whose value is a path or a name, with any characters.
PATHS = ("data.root", "data.cache", "resume", "init_from", "runs", "name", "hydra.run.dir", "hydra.sweep.dir")
HYDRA_OPTIONS = ("--cfg", "--package", "--info", "--config-", "--experimental-rerun")  # those with a value
LAUNCHER_EXTRAS = {"joblib": "sweep", "submitit": "slurm", "ray": "ray"}  # the optional dependencies of each


def to_plain(cfg: Any) -> Any:
    """Return a config's values as plain Python. Raise UserError for a value that is `???`."""
    if OmegaConf.is_config(cfg):
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise UserError(f"{missing[0]}=??? is invalid: expected a value")
        return OmegaConf.to_container(cfg, resolve=True)
    return cfg


def safe_name(text: Any) -> str:
    """Convert a text to a short folder name that needs no quotes in a shell, a URL or a Hydra override."""
    name = re.sub(r"[^A-Za-z0-9.,_-]+", "_", re.sub(r"[\[\]{}'\"]", "", str(text))).strip("_.")
    return name[:200]  # file systems allow 255 bytes


def job_name(overrides: str) -> str:
    """Name the folder of a sweep's job; different overrides have different names, even if case is ignored."""
    name = safe_name(overrides)
    # If only "=" was replaced, each value follows the last "_", and the name is unique.
    plain = re.fullmatch(r"[a-z0-9._]+=[a-z0-9.-]+(,[a-z0-9._]+=[a-z0-9.-]+)*", overrides)
    if plain and name == overrides.replace("=", "_"):
        return name
    digest = hashlib.sha1(overrides.encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{name[:191].rstrip(',_')}_{digest}".lstrip("_") if overrides else "job"


class RunFolderResolver:
    """Choose and make the run folder of this process. Hydra resolves its name several times."""

    def __init__(self) -> None:
        self.resolved: dict[tuple[str | None, str], str] = {}
        self.new_parents: list[Path] = []  # the innermost first
        self.preexisting = {Path.cwd()}

    def note_named_folders(self, arguments: list[str]) -> None:
        """Note which folders of a command line exist before Hydra makes the named folder and its parents."""
        pairs = [word.partition("=")[::2] for word in arguments]
        named = [Path(value.strip("'\"")) for key, value in pairs if key in ("resume", "hydra.run.dir")]
        self.new_parents = [parent for path in named for parent in path.parents if not parent.exists()]
        self.preexisting = {Path.cwd(), *(path.resolve() for path in named if path.is_dir())}

    def __call__(self, resume: str | None, wanted: str) -> str:
        """Return `resume`, or a new folder `wanted`, made here, with a number behind it if the name is taken."""
        if resume is not None:
            if not Path(resume).is_dir():
                path = Path(resume)
                if path.is_file() and path.parts[-2:] == ("checkpoints", "last.ckpt"):
                    return str(path.parent.parent)
                found = (
                    f"a file; pass its run folder, which continues from checkpoints/last.ckpt, or start a new run by "
                    f"{argument('init_from', path)}"
                )
                raise UserError(f"resume: {path} is {found if path.exists() else 'not a run folder: no such folder'}")
            return resume
        if (resume, wanted) not in self.resolved:
            self.resolved[resume, wanted] = distributed.broadcast_from_rank_zero(lambda: self.make(Path(wanted)))
        return self.resolved[resume, wanted]

    def make(self, wanted: Path) -> str:
        parent = wanted.parent
        try:
            self.new_parents.extend(path for path in (parent, *parent.parents) if not path.exists())
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
        """Remove the run folder and its new parents if they are empty."""
        for folder in (Path(HydraConfig.get().runtime.output_dir), *self.new_parents):
            if folder.resolve() not in self.preexisting:
                with contextlib.suppress(OSError):  # it is not empty
                    folder.rmdir()


run_dir = RunFolderResolver()
OmegaConf.register_new_resolver("run_dir", run_dir)
OmegaConf.register_new_resolver("job_name", job_name)
OmegaConf.register_new_resolver("safe_name", safe_name)


def config_folders() -> list[Path]:
    """List the config folders in search order: the user's `configs/`, if there is one, and the package's."""
    own = Path("configs").absolute()
    return [own, CONFIGS] if own.is_dir() and not own.samefile(CONFIGS) else [CONFIGS]


class UserConfigs(SearchPathPlugin):
    """Search the user's folder of configs before the package's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in config_folders()[:-1]:
            search_path.prepend("user", f"file://{folder}", anchor="main")


def translate_arguments(words: list[str]) -> list[str]:
    """Translate the habits of Lightning and Hydra users into arguments that Hydra and the config accept.

    - `-m` may be anywhere.
    - A setting may have dashes, as in `--beta=4`.
    - An argument of Lightning's Trainer and an option of a group need no `+`.
    - `logger` and `callbacks` may be null, [], false or none; `ckpt_path` is `resume`.
    - A path needs no quotes beside those of the shell.
    """
    multirun = [word for word in words if word in ("-m", "--multirun")]
    return [*multirun[:1], *(translate_argument(word) for word in words if word not in multirun)]


def translate_argument(word: str) -> str:
    typed, equals, value = word.partition("=")
    if equals and typed.startswith("--") and not typed.startswith(HYDRA_OPTIONS):
        return translate_argument(word.removeprefix("--"))
    key = typed.lstrip("+")
    if not equals or key.startswith(("-", "~")):
        return word
    if key == "ckpt_path":
        typed = key = "resume"
    if any((folder / key).is_dir() for folder in config_folders()):
        typed = key
        if key in ("logger", "callbacks") and value.lower() in ("null", "[]", "false"):
            value = "none"
        elif value.lower() in ("true", "false"):  # Hydra's error for a boolean does not name the group
            value = f'"{value}"'
    elif key.startswith("trainer."):
        is_known = key.removeprefix("trainer.") in OmegaConf.load(CONFIGS / "trainer" / "default.yaml")
        typed = key if is_known else f"++{key}" if key.removeprefix("trainer.") in trainer_arguments() else typed
    elif key in PATHS and needs_quotes(key, value):
        value = quote_value(value)
    return f"{typed}={value}"


def needs_quotes(key: str, value: str) -> bool:
    """Return whether Hydra does not read a value as the path or the text that it is."""
    if not value or value[0] in "'\"" or re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", value):
        return False
    try:
        OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException:
        return True
    return os.path.exists(value)


def trainer_arguments() -> list[str]:
    """Return the names of the arguments of Lightning's Trainer, whose import takes seconds."""
    import lightning as L

    return [name for name in inspect.signature(L.Trainer.__init__).parameters if name != "self"]


def drop_optimizer_defaults(cfg: DictConfig) -> None:
    """Delete the optimizer defaults that the class named by a command does not take.

    Nothing changes if the command names no class.
    """
    typed = [item.lstrip("+").partition("=")[0] for item in HydraConfig.get().overrides.task]
    if "optimizer.name" not in typed:
        return
    from betavae.optim import optimizer_class, optimizer_names  # imported here, since torch takes a second

    if (name := cfg.optimizer.name) in optimizer_names():
        taken = inspect.signature(optimizer_class(name)).parameters
        kept = {"name", *(item.removeprefix("optimizer.") for item in typed)}
        with open_dict(cfg):
            for key in {str(key) for key in cfg.optimizer} - kept:
                is_list = OmegaConf.is_list(cfg.optimizer[key])  # the eps of Adafactor is a pair
                if key not in taken or isinstance(taken[key].default, tuple) != is_list:
                    del cfg.optimizer[key]


class JobOutcome:
    """The state of the only job of this process."""

    composed = False
    error: Exception | None = None


@contextlib.contextmanager
def hydra_command() -> Iterator[None]:
    """Run a `hydra.main` function in the body, with one-line errors instead of Hydra's own."""
    # A shell leaves the ~ of `key=~/file` as it is, and Hydra does not parse it.
    sys.argv[1:] = [re.sub("^([^=]+=)~(?=/)", lambda m: m[1] + os.path.expanduser("~"), arg) for arg in sys.argv[1:]]
    sys.argv[1:] = translate_arguments(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    # The Slurm preset is complete, and has the name of the plugin's own preset on purpose.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/submitit_slurm' is validated")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it reports the font cache that it makes
    run_dir.note_named_folders(sys.argv[1:])
    Plugins.instance().register(UserConfigs)
    with report_errors(lambda error: describe_config_error(error, not JobOutcome.composed)):
        yield
        if JobOutcome.error:
            raise JobOutcome.error


@contextlib.contextmanager
def hydra_job() -> Iterator[None]:
    """Keep an error of the body from Hydra, which would print around it; `hydra_command` raises it."""
    JobOutcome.composed = True
    try:
        yield
    except Exception as error:
        if is_multirun():
            raise
        JobOutcome.error = error
    if not is_multirun():
        run_dir.remove_empty()


def is_multirun() -> bool:
    """Return whether this job is one of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def describe_config_error(error: Exception, composing: bool) -> str | None:
    """Describe an error in one sentence, or return None for a bug of this project.

    Args:
        error: The error of a command.
        composing: Whether Hydra is composing the config, where no code of this project can fail.
    """
    if sentence := describe_error(error) or describe_launcher_error(str(error)):
        return sentence
    if isinstance(error, OverrideParseException):
        return f"{error.override} is not key=value; put quotes around values with special characters"
    if not composing and not isinstance(error, (HydraException, OmegaConfBaseException)):
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
        return describe_unknown_key(match[1], all_keys())
    if match := re.search(r"Could not delete from config\. The value of '([^']+)' is ", text):
        return f"~{match[1]}=... deletes {match[1]} only if that is its value; `~{match[1]}` deletes any value"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        key, value = match[1].split("=", 1)
        return f"{match[1]} has a comma: pass -m for a sweep, or quote one value twice: {argument(key, value)}"
    if match := re.search(r"(?:In '[^']+': )?Could not find '([^'/]+)/([^']+)'", text):
        options = sorted({path.stem for folder in config_folders() for path in (folder / match[1]).glob("*.yaml")})
        hint = suggest_key(match[1], ()) if match[1] == "debug" else ""
        return f"{match[1]}={match[2]} is invalid: expected one of {', '.join(options)}{hint}"
    return first_line(error)


def describe_unknown_key(key: str, keys: list[str]) -> str:
    """Describe a key that the config of this run does not have."""
    if key not in keys:
        return f"{key} is not a setting{suggest_key(key, keys, '; `--help` and `--cfg job` show all settings')}"
    group, _, name = key.partition(".")
    files = sorted((CONFIGS / group).glob("*.yaml"))
    if options := [f"{group}={path.stem}" for path in files if has_setting(path, name)]:
        return f"{key} is a setting of {' and '.join(options)}, and this run has another {group}"
    return f"{key} is a setting of some runs that this one does not have; add it by +{key}=..."


def has_setting(file: Path, name: str) -> bool:
    """Return whether an option of a config group, or one that it is based on, has a setting."""
    config: Any = OmegaConf.load(file)
    bases = [base for base in config.get("defaults", []) if isinstance(base, str) and base[0] not in "_/"]
    return name in config or any(has_setting(file.with_name(f"{base}.yaml"), name) for base in bases)


def describe_launcher_error(text: str) -> str | None:
    """Describe an error of a launcher or a sweeper in one sentence, or return None."""
    if match := re.search(r"hydra/(launcher|sweeper)/(\w+)'|hydra_plugins\.hydra_(\w+?)_(?:launcher|sweeper)", text):
        name = match[2] or match[3]
        if extra := LAUNCHER_EXTRAS.get(name.split("_")[0]):
            return f'{name} is not installed; install it by `pip install -e ".[{extra}]"`'
    if 'Could not detect "srun"' in text:
        return "hydra/launcher needs Slurm, which is not here; hydra/launcher=joblib runs the jobs on this machine"
    return None


@functools.cache
def all_keys() -> list[str]:
    """List the dotted keys of `configs/train.yaml` and of every option of its groups."""
    keys = [path.name for path in CONFIGS.iterdir() if path.is_dir()]
    for path in (CONFIGS / "train.yaml", *CONFIGS.glob("*/*.yaml")):
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        own = {key: value for key, value in content.items() if key not in ("defaults", "hydra")}
        is_global = path.parent == CONFIGS or "@package _global_" in path.read_text()
        for key in flatten(own if is_global else {path.parent.name: own}):
            parts = key.split(".")
            keys += [".".join(parts[:number]) for number in range(1, len(parts) + 1)]
    return list(dict.fromkeys(keys))
