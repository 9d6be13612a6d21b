"""A run folder: what is in it, whose it is, who works in it, and how it ended."""

import contextlib
import errno
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from betavae.errors import UserError
from betavae.storage.files import TMP_PREFIX, TMP_SUFFIX, atomic_write_bytes, has_stamp

MARKER_FILE = ".betavae"  # a file in every folder of ours, that says what it is
RUN, SWEEP, REPORT = (f"{kind} of betavae\n" for kind in ("a run", "a sweep", "a report"))
# All that a run writes: what is cleared away is on this list, and nothing else ever is.
OUTPUT_FILES = ("config.yaml", "overrides.yaml", "metrics.json", "train.log", "projector_config.pbtxt")
OUTPUT_GLOBS = (
    *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "evaluation.json", "evaluation.part", "fidelity.json"),
    "disentanglement.json",
    *(f"projector/posterior_means/{name}" for name in ("metadata.tsv", "sprite.png", "tensors.tsv")),
    *("figures/*.png", "events.out.tfevents.*", "curves.csv"),
    *(kind + "[0-9a-f]" * 16 + ".pt" for kind in ("sampler_*_", "anomalies-")),
)
UNFINISHED = ("running", "interrupted")


def read_marker(path: Path) -> str | None:
    try:
        return (path / MARKER_FILE).read_text()
    except (OSError, UnicodeDecodeError):
        return None


def check_mark(path: Path, mark: str, key: str) -> bool:
    """Return whether `path` is a folder with this mark already. Writes nothing.

    Raises UserError if `put_mark` would.
    """
    if not path.is_dir():
        if os.path.lexists(path):
            raise UserError(f"{key}: {path} is a file; name a folder")
        return False
    if (found := read_marker(path)) is not None and found != mark:
        raise UserError(f"{key}: {path} is {found.strip()}, not {mark.strip()}; name another folder")
    if found is not None:
        return True
    if others := sorted(item.name for item in path.iterdir()):
        raise UserError(
            f"{key}: {path} is not empty and not {mark.strip()} (it holds {others[0]}); name another folder"
        )
    return False


def claim_folder(path: Path, mark: str, key: str) -> bool:
    """Make `path` a folder of ours. False if it was one already.

    Raises UserError if anything else is there, or it cannot be made.
    """
    try:
        if check_mark(path, mark, key):
            return False
        path.mkdir(parents=True, exist_ok=True)
        with open(path / MARKER_FILE, "x") as file:
            file.write(mark)
        return True
    except FileExistsError:  # of two at once, the other was first
        return False
    except OSError as error:
        raise UserError(f"{key}: cannot make {path} ({error.strerror})") from error


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing, if it is not there or harmed."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


class RunFolder:
    """The folder of one run; `path` as it is shown to people."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.ckpt"

    def is_run(self) -> bool:
        return read_marker(self.path) == RUN

    def read_metrics(self) -> dict[str, Any]:
        """metrics.json, the one place that says how a run is or was."""
        return read_json(self.path / "metrics.json")

    def write_record(self, record: dict[str, Any]) -> None:
        path, text = self.path / "metrics.json", json.dumps(record, indent=2) + "\n"
        try:
            atomic_write_bytes(path, text.encode())
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not full or not path.exists() or self.read_metrics().get("status") == record["status"]:
                raise
            # On a full disk: what fits into the blocks that the file has. A run must not seem to be running, and one
            # whose numbers are lost is not finished.
            status = "failed" if record["status"] == "finished" else record["status"]
            short = json.dumps(
                {
                    "status": status,
                    "resumable": record.get("resumable", False),
                    "error": record.get("error", "OSError: the disk is full")[:200],
                }
            )
            with open(path, "r+b", buffering=0) as file:
                file.write(short.encode().ljust(path.stat().st_size))
            raise

    def status(self) -> str:
        """finished, failed, diverged, pruned, interrupted, running; or "" for a run that never began."""
        status = self.read_metrics().get("status", "")
        return "interrupted" if status == "running" and not self.is_locked() else status

    @contextlib.contextmanager
    def lock(self, wait: bool = False) -> Iterator[None]:
        """Worked in by this process alone; the system lets go when it dies, however it dies.

        Raises UserError if another works here, unless it is to `wait` for its end.
        """
        try:
            with FileLock(self.path / ".lock", timeout=-1 if wait else 1):
                yield
        except Timeout:
            raise UserError(f"{self.path} is being worked in by another process; wait for its end") from None

    def is_locked(self) -> bool:
        """Looked at by a shared lock, which two that look at once can both have."""
        try:
            import fcntl
        except ImportError:  # Windows
            return True
        try:
            with open(self.path / ".lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def delete_outputs(self) -> None:
        """Take away what a run wrote here, by name; what else lies here stays."""
        for name in OUTPUT_FILES:
            (self.path / name).unlink(missing_ok=True)
        for pattern in OUTPUT_GLOBS:
            for path in self.path.glob(pattern):
                if path.is_file() and is_own_output(path):
                    path.unlink()
        self.clear_parts()
        for name in ("checkpoints", "figures", "projector/posterior_means", "projector"):
            with contextlib.suppress(OSError):
                (self.path / name).rmdir()

    def clear_parts(self) -> None:
        """Half-written files of a process that was killed."""
        patterns = [f"{name}.*{TMP_SUFFIX}" for name in (*OUTPUT_FILES, "checkpoints/*.ckpt", "evaluation.part")]
        for pattern in (*patterns, f"{TMP_PREFIX}*", f"figures/{TMP_PREFIX}*"):
            for path in self.path.glob(pattern):
                if not path.is_dir():  # as that of an export into this folder, which may be under way
                    path.unlink()

    def delete(self) -> None:
        """Take back a run that could not even begin."""
        self.delete_outputs()
        for name in (".lock", MARKER_FILE):
            (self.path / name).unlink(missing_ok=True)

    def drop_regenerated(self) -> None:
        """Without what a run that goes on will make again whole."""
        embedding = self.path / "projector" / "posterior_means"
        for name in ("metadata.tsv", "sprite.png", "tensors.tsv"):
            (embedding / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # TensorBoard warns of a folder that exists
            embedding.rmdir()
        self.clear_parts()


def is_own_output(path: Path) -> bool:
    """Whether a file with one of our names in a run folder was made by us, as far as it can be told."""
    if path.name.startswith("events."):
        return re.fullmatch(r"events\.out\.tfevents\.\d+\..+\.\d+\.\d+", path.name) is not None
    stamped = (
        path.parent.name == "figures"
        or path.suffix in (".pt", ".csv")
        or path.name in ("evaluation.json", "fidelity.json", "disentanglement.json")
    )
    return not stamped or has_stamp(path)


def git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
