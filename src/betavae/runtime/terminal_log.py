"""The log of a run, in the terminal and in `train.log`, without the notices of libraries."""

import contextlib
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from betavae.errors import first_line
from betavae.runtime import distributed

log = logging.getLogger(__name__)
WARNED: set[str] = set()  # warnings of this run


def silence_libraries() -> None:
    """Hide tips, device tables and notices about the internals of libraries."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # the table of trainer.profiler
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # Batches are indexed in memory, so more workers would not help.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    # Validation and test numbers are summed over the processes before they are logged.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=".*all_gather is deprecated.*")
    # With `overfit_batches` Lightning looks for a sampler that shuffles, and `BatchLoader` has none.
    warnings.filterwarnings("ignore", message=".*requested to overfit.*")


def start_log(folder: Path, console_lines: bool, label: str) -> None:
    """Log to `train.log` and the terminal.

    Args:
        folder: The run folder.
        console_lines: Whether the terminal shows a line per epoch.
        label: The start of every line in the terminal.
    """
    WARNED.clear()
    logging.raiseExceptions = False  # a full disk must not print a traceback for each line
    root = logging.getLogger()
    close_log()
    if distributed.rank():  # only the first of several processes logs
        root.addHandler(logging.NullHandler())
        return
    file = logging.FileHandler(folder / "train.log", encoding="utf-8", errors="surrogateescape")
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


def close_log() -> None:
    """Close train.log, so that its folder can be deleted."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def warn_on_error(what: str) -> Iterator[None]:
    """Turn an error of the body into one warning per run, with its traceback in `train.log`."""
    try:
        yield
    except Exception as error:
        log.debug("%s", "".join(traceback.format_exception(error)))
        if what not in WARNED:
            WARNED.add(what)
            reason = f"{type(error).__name__}: {first_line(error)}"
            log.warning("warning: %s failed (%s); the run is not affected", what, reason)
