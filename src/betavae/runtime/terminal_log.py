"""What the terminal and `train.log` show: our own lines, and nobody else's."""

import contextlib
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from betavae.runtime import distributed

log = logging.getLogger(__name__)
WARNED: set[str] = set()  # what this run has warned of


def silence_libraries() -> None:
    """No tips, device tables or notices about other libraries' insides."""
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
    # With `overfit_batches` Lightning looks for a sampler that shuffles; ours needs none.
    warnings.filterwarnings("ignore", message=".*requested to overfit.*")


def start_log(folder: Path, console_lines: bool, label: str) -> None:
    """Everything to `train.log` with the time; lines behind `label` to the terminal, each epoch's only if asked."""
    WARNED.clear()
    logging.raiseExceptions = False  # a full disk must not print a traceback for each line
    root = logging.getLogger()
    close_log()
    if distributed.rank():  # one process of several speaks for all
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
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def warn_on_error(what: str) -> Iterator[None]:
    """Turn an error in what is only displayed into a warning, once a run; its traceback goes to `train.log`."""
    try:
        yield
    except Exception as error:
        log.debug("%s", "".join(traceback.format_exception(error)))
        if what not in WARNED:
            WARNED.add(what)
            reason = (str(error).splitlines() or [""])[0]
            log.warning("warning: %s failed (%s: %s); the run is not affected", what, type(error).__name__, reason)
