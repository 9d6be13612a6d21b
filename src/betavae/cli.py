"""The way from a command line to a function: Hydra, with errors said in one sentence."""

import atexit
import contextlib
import difflib
import errno
import functools
import gc
import hashlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from betavae import sweeps
from betavae.errors import UserError

# What a machine refuses, as opposed to what we got wrong.
ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)
# Beside the sources; with the package installed elsewhere, beside the script that runs or its folder.
PLACES = (Path(__file__).parents[2], *Path(sys.argv[0]).resolve().parents[:2])
CONFIGS = next((place / "configs" for place in PLACES if (place / "configs" / "train.yaml").is_file()), Path("configs"))


def safe_name(text: Any) -> str:
    """A folder name that needs no quoting in a shell, a URL or a Hydra override."""
    name = re.sub(r"[^A-Za-z0-9.,_+-]+", "_", re.sub(r"[\[\]{}'\"]", "", str(text))).strip("_")
    # File systems take 255 bytes; two long names that begin alike must not become one.
    return name if len(name) <= 200 else f"{name[:191].rstrip(',_')}_{hashlib.sha1(name.encode()).hexdigest()[:8]}"


made: list[Path] = []  # by `run_dir` above the run folder, the innermost first


@functools.cache  # Hydra asks more than once; a process has one run folder
def run_dir(resume: str | None, wanted: str) -> str:
    """`resume`, or `wanted`, or where that is taken `wanted` with a number, made here so that no other run gets it."""
    if resume is not None:
        if not Path(resume).is_dir():
            raise UserError(f"resume: {resume} is not a run folder (there is no such folder)")
        return resume
    parent, number = Path(wanted).parent, 1
    try:
        made.extend(path for path in (parent, *parent.parents) if not path.exists())
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            path = Path(wanted if number == 1 else f"{wanted}_{number}")
            try:
                path.mkdir()
                return str(path)
            except FileExistsError:
                number += 1
    except OSError as error:
        raise UserError(f"runs: cannot make a folder in {parent} ({error.strerror})") from error


OmegaConf.register_new_resolver("run_dir", run_dir)
OmegaConf.register_new_resolver("safe_name", safe_name)


def command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make a function of a config a command line of its own: `configs/<config_name>.yaml` and its overrides."""

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        failures: list[Exception] = []
        begun: list[bool] = []

        @functools.wraps(task)
        def guarded(cfg: DictConfig) -> Any:
            begun.append(True)
            try:
                return task(cfg)
            except Exception as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    raise
                remove_empty_run_dir()
                failures.append(error)  # past Hydra, which would print around it

        hydra_main = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(guarded)

        def main() -> None:
            debug = any(re.fullmatch(r"\+{0,2}debug=(true|1|yes|on)", arg, re.IGNORECASE) for arg in sys.argv[1:])
            # Hydra then hands its errors on, instead of printing them its own way.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            # Our Slurm preset is whole, and bears the name of the plugin's own on purpose.
            warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/submitit_slurm' is validated")
            failures.clear()
            begun.clear()
            sweeps.Start.folder = None
            try:
                hydra_main()
                if failures:
                    raise failures[0]
            except (KeyboardInterrupt, SystemExit) as stop:
                sweeps.close(interrupted=True)
                sys.exit(130 if isinstance(stop, KeyboardInterrupt) else stop.code)
            except Exception as error:
                sweeps.close()
                if debug or not (sentence := explain(error, composing=not begun, config=config_name)):
                    raise
                print(f"error: {sentence}", file=sys.stderr)
                sys.exit(1)
            if sweeps.close():
                sys.exit(1)

        return main

    return decorate


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Imports of torch and its like with the garbage collector off: it would look at their million objects many times
    over, for half a second. Nor does it look at them again later, which takes a third of a second each time."""
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


def remove_empty_run_dir() -> None:
    path = Path(HydraConfig.get().runtime.output_dir)
    if path.is_dir() and path.resolve() != Path.cwd() and not any(path.iterdir()):
        path.rmdir()
        for parent in made:
            with contextlib.suppress(OSError):  # it holds something by now
                parent.rmdir()


def explain(error: Exception, composing: bool = False, config: str = "train") -> str | None:
    """One sentence for the person who typed the command, or None for a bug of ours. While the config is composed there
    is nothing of ours to fail."""
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, OSError) and error.errno in ENVIRONMENT:
        return f"{error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read as key=value; put quotes around values with special characters"
    if sentence := sweeps.explain(error):
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
        return f"{match[1]} is not a setting{nearest(match[1], all_keys(config))}"
    if match := re.search(r"(?:In '[^']+': )?Could not find '([^'/]+)/([^']+)'", text):
        folder = CONFIGS / match[1]
        options = sorted(path.stem for path in folder.glob("*.yaml"))
        return f"{match[1]}={match[2]} is not one of its options: {', '.join(options)}"
    return (messages[0].splitlines() or [type(error).__name__])[0]


def all_keys(config: str = "train") -> list[str]:
    """Every dotted key that `configs/<config>.yaml` and what it is composed of have."""
    keys, paths = [], [CONFIGS / f"{config}.yaml"]
    if config == "train":
        keys += [path.name for path in CONFIGS.iterdir() if path.is_dir()]
        paths += CONFIGS.glob("*/**/*.yaml")
    else:
        paths.append(CONFIGS / "script.yaml")
    for path in paths:
        prefix = [] if path.parent == CONFIGS else [path.parent.name]
        stack = [(prefix, OmegaConf.load(path))]
        while stack:
            at, node = stack.pop()
            for key in node if isinstance(node, DictConfig) else []:
                if key not in ("defaults", "hydra"):
                    keys.append(".".join([*at, str(key)]))
                    child = node._get_node(key)
                    if isinstance(child, DictConfig):
                        stack.append(([*at, str(key)], child))
    return keys


def nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; `--cfg job` prints all settings"
