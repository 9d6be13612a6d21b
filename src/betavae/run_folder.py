"""A run folder: its log, its metrics.json, and what an earlier run left in it."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from betavae.resuming import rewind


@rank_zero_only
def discard(folder: Path) -> None:
    """Take back the files of a run that could not even begin; what else is in the folder stays."""
    for handler in logging.getLogger().handlers:
        handler.close()
    for name in ("config.yaml", "overrides.yaml", "metrics.json", "train.log"):
        (folder / name).unlink(missing_ok=True)
    rewind(folder, None)
    with contextlib.suppress(OSError):
        (folder / "checkpoints").rmdir()


def finished(folder: Path) -> dict[str, Any] | None:
    """The record of a run that came to its end."""
    try:
        record = json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError):
        return None
    return record if record.get("status") == "finished" else None


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
    # Validation and test numbers are summed over the processes before they are logged.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=".*all_gather is deprecated.*")


def start_log(folder: Path, console_lines: bool, label: str) -> None:
    """Everything to `train.log` with the time; lines behind `label` to the terminal, each epoch's only if asked."""
    logging.raiseExceptions = False  # a full disk must not print a traceback for each line
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    if process_rank():  # one process of several speaks for all
        root.addHandler(logging.NullHandler())
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / "train.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO)
    console.setFormatter(logging.Formatter(label + "%(message)s"))
    console.addFilter(lambda record: console_lines or not getattr(record, "epoch_line", False))
    root.addHandler(file)
    root.addHandler(console)
    root.setLevel(logging.WARNING)
    logging.getLogger("betavae").setLevel(logging.DEBUG)
    logging.captureWarnings(True)


def process_rank() -> int:
    """0 in the one process of several that speaks and writes for all; known before there is a Trainer."""
    return getattr(rank_zero_only, "rank", 0)


def write_metrics(folder: Path, record: dict[str, Any]) -> None:
    write_whole(folder / "metrics.json", json.dumps(record, indent=2) + "\n")


@rank_zero_only
def write_whole(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
