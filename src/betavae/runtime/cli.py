"""Command lines with one-line errors, exit codes, and the `key=value` arguments of scripts.

This module imports no Hydra.
"""

import atexit
import contextlib
import errno
import gc
import io
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from betavae.errors import RunInterrupted, UserError, first_line
from betavae.runtime import distributed, plugins
from betavae.runtime.settings import Label, NonEmptyStr, PathStr, Seed63, Settings, format_value, validate

# Errors of the machine or its permissions, which the user can fix; any other OSError is a bug of this project.
USER_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)


class ScriptSettings(Settings):
    """Settings of every script. A script subclasses it; a field's title is its line in `--help`."""

    traceback: bool = Field(False, title="true: show the traceback of an error")
    plugins: list[NonEmptyStr] = Field([], title="modules to import first, such as [mypkg.nets]: see docs/extending.md")


class RunsSettings(ScriptSettings):
    """Settings of a script that looks for runs."""

    runs: PathStr = Field("runs", title="the folder in which runs are looked for")


class ModelSettings(RunsSettings):
    """Settings of a script that reads a checkpoint."""

    ckpt: PathStr | None = Field(None, title="a checkpoint file or a run folder; null: the newest finished run")


class DataSettings(ModelSettings):
    """Settings of a script that reads the data a model was trained on."""

    data_root: PathStr | None = Field(None, title="the data folder; null: the one of the training")


class SeedSettings(ScriptSettings):
    """Settings of a script that draws random numbers."""

    seed: Seed63 = Field(0, title="random seed; the same seed gives the same output")


class LabelSettings(ScriptSettings):
    """Settings of a script that passes images to a conditional model."""

    label: Label | None = Field(None, title="label of all images, for a conditional model; null: their own labels")


S = TypeVar("S", bound=ScriptSettings)


def script_command(settings: type[S]) -> Callable[[Callable[[S], None]], Callable[[], None]]:
    """Turn a function of settings into a command; its module's docstring starts `--help`."""

    def decorate(task: Callable[[S], None]) -> Callable[[], None]:
        def command() -> None:
            with report_errors(describe_error):
                if {"--help", "-h"} & set(sys.argv[1:]):
                    print(f"{(task.__globals__['__doc__'] or '').strip()}\n")
                    for key, field in settings.model_fields.items():
                        print(f"  {key}={format_value(field.default)}".ljust(28) + f"  {field.title}")
                else:
                    values = validate(settings, parse_arguments(sys.argv[1:]))
                    plugins.load_plugins(values.plugins)
                    task(values)

        return command

    return decorate


def parse_arguments(words: list[str]) -> dict[str, Any]:
    """Parse the `key=value` arguments of a script. A key may have dashes, as in `--k=100`."""
    for word in words:
        if "=" not in word:
            raise UserError(f"{word} is not an argument: expected key=value (--help lists the keys)")
    pairs = [word.removeprefix("--").partition("=")[::2] for word in words]
    return {"ckpt" if key == "ckpt_path" else key: parse_value(text) for key, text in pairs}


def parse_value(text: str) -> Any:
    """Parse a value as Hydra does.

    It is true, false, null, a number, a [list, of, values], a "text", or any other text.
    """
    text = text.strip()
    if (lower := text.lower()) in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[lower]
    # Python would also take 007, infinity and digits of other scripts for numbers; in Hydra they are texts.
    looks_numeric = re.fullmatch(r"[+-]?(inf|nan|[0-9._]+(e[+-]?[0-9_]+)?)", text, re.IGNORECASE)
    if looks_numeric and not re.fullmatch(r"[+-]?0[0-9_]+", text):
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(text)
    if re.fullmatch(r"\[.*\]", text, re.DOTALL):
        items = re.findall(r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,])+""", text[1:-1].strip(), re.DOTALL)
        return [parse_value(item.strip()) for item in items]
    if match := re.fullmatch(r"""(["'])(.*)\1""", text, re.DOTALL):
        # Half of the backslashes before a quote, the end or an interpolation are escapes.
        return re.sub(rf"(\\+)({match[1]}|\Z|\$\{{)", lambda m: m[1][: len(m[1]) // 2] + m[2], match[2])
    return text


def argument(key: str, value: str | Path) -> str:
    """Format `key=value` for a shell."""
    return shlex.quote(f"{key}={quote_value(value)}")


def quote_value(value: str | Path) -> str:
    """Quote a value where Hydra or a script would not read it as that text."""
    text = f"./{value}" if str(value).startswith("~") else str(value)  # which a shell and Hydra expand
    if not re.fullmatch(r"[A-Za-z0-9_./-]*[A-Za-z_/][A-Za-z0-9_./-]*", text) or parse_value(text) != text:
        escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
        text = '"' + re.sub(r'(\\*)("|\Z)', lambda m: 2 * m[1] + ("\\" + m[2] if m[2] else ""), escaped) + '"'
    return text


def run_argument(key: str, path: str | Path) -> str:
    """Format the path of a run for a shell, and the `plugins=[...]` of this process."""
    named = ",".join(name for name, package in plugins.LOADED.items() if not package)
    return argument(key, path) + (f" 'plugins=[{named}]'" if named else "")


def adapt_commands(text: str) -> str:
    """Rewrite the commands of a clone in a message as those of `betavae`.

    This happens only if `betavae` started this process.
    """
    if "BETAVAE_CONSOLE" not in os.environ:
        return text
    text = re.sub(r'pip install -e "\.(\[\w+\])"', r'pip install "betavae\1"', text)
    return re.sub(r"python (?:scripts/)?(\w+)\.py", r"betavae \1", text)


def describe_error(error: Exception) -> str | None:
    """Describe an error in one sentence for the user, or return None for a bug of this project."""
    if isinstance(error, OSError) and error.errno in USER_ERRNOS:
        return f"{error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, RuntimeError) and (match := re.search(r"allocate (\d+) bytes", str(error))):  # of torch
        return f"not enough memory for {int(match[1]) / 1e9:,.1f} GB at once; pass smaller numbers"
    if isinstance(error, OverflowError) or (isinstance(error, RuntimeError) and "without overflow" in str(error)):
        return f"a number is too large ({first_line(error)}); pass a smaller one"
    return str(error) if isinstance(error, UserError) else None


@contextlib.contextmanager
def report_errors(describe: Callable[[Exception], str | None]) -> Iterator[None]:
    """Print an error of the body as one line and exit: with 1, or with 128 plus the number of a signal.

    With the argument `traceback=true`, and for errors that `describe` does not know, the traceback is printed.
    """
    traceback = any(
        re.fullmatch(r"(\+{0,2}|--)traceback=(true|1|yes|on)", word, re.IGNORECASE) for word in sys.argv[1:]
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path that is not UTF-8 is printed as it is
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    rank = distributed.rank()
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if code in (130, 143) and not isinstance(stop, RunInterrupted) and rank == 0:
            print("stopped before the end", file=sys.stderr)
        sys.exit(code)
    except Exception as error:
        if traceback or not (sentence := describe(error)):
            raise
        print(f"[rank {rank}] " * bool(rank) + f"error: {adapt_commands(sentence)}", file=sys.stderr)
        sys.exit(1)


def skip_last_scan() -> None:
    """Keep Python from scanning all objects once more as it exits, which takes a second or more.

    The scan would flush open files in reference cycles, such as those of a custom callback. So they are flushed here.
    """
    for found in gc.get_objects():
        if issubclass(type(found), io.TextIOWrapper | io.BufferedWriter | io.BufferedRandom):
            with contextlib.suppress(ValueError, OSError):  # closed, or on a full disk
                found.flush()
    gc.freeze()


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pause garbage collection during imports of torch.

    The collector would scan the objects of torch again and again for 0.5 s.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # a later scan of these objects takes 0.3 s each time (Python 3.11)
        gc.enable()
        atexit.register(skip_last_scan)
