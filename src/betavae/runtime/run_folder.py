"""Run folders: their marker, lock, files and status."""

import contextlib
import errno
import functools
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from betavae.errors import UserError
from betavae.storage.files import TMP_PREFIX, TMP_SUFFIX, atomic_write_bytes, has_stamp, hash_file

MARKER_FILE = ".betavae"  # in every folder that this project makes, with its kind
RUN, SWEEP, REPORT = (f"{kind} of betavae\n" for kind in ("a run", "a sweep", "a report"))
# The files that a run writes. No others are ever deleted.
OUTPUT_FILES = ("config.yaml", "overrides.yaml", "metrics.json", "train.log", "projector_config.pbtxt")
OUTPUT_GLOBS = (
    *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "evaluation.json", "evaluation.part", "fidelity.json"),
    "disentanglement.json",
    *(f"projector/posterior_means/{name}" for name in ("metadata.tsv", "sprite.png", "tensors.tsv")),
    *("figures/*.png", "events.out.tfevents.*", "curves.csv"),
    *(kind + "[0-9a-f]" * 16 + ".pt" for kind in ("sampler_*_", "anomalies-")),
)
Record = dict[str, Any]  # the content of metrics.json
UNFINISHED = ("running", "interrupted")


def read_marker(path: Path) -> str | None:
    """Return the kind of a folder of this project, or None for any other folder."""
    try:
        return (path / MARKER_FILE).read_text()
    except (OSError, UnicodeDecodeError):
        return None


def check_claim(path: Path, kind: str, key: str) -> bool:
    """Return whether a folder is already claimed, without writing anything.

    Raises:
        UserError: If `claim_folder` would raise it.
    """
    if not path.is_dir():
        if os.path.lexists(path):
            raise UserError(f"{key}: {path} is a file; pass a folder")
        return False
    if (found := read_marker(path)) is not None and found != kind:
        raise UserError(f"{key}: {path} is {found.strip()}, not {kind.strip()}; pass another folder")
    if found is not None:
        return True
    if others := sorted(item.name for item in path.iterdir()):
        raise UserError(f"{key}: {path} is not empty and not {kind.strip()} (it has {others[0]}); pass another folder")
    return False


def claim_folder(path: Path, kind: str, key: str) -> bool:
    """Make a folder and its marker; return False if it has that marker already.

    Args:
        path: The folder, which may exist if it is empty.
        kind: RUN, SWEEP or REPORT.
        key: The setting that names the folder, for error messages.

    Raises:
        UserError: If the folder holds other files or is not writable.
    """
    try:
        if check_claim(path, kind, key):
            return False
        path.mkdir(parents=True, exist_ok=True)
        with open(path / MARKER_FILE, "x") as file:
            file.write(kind)
        return True
    except FileExistsError:  # another process was first
        return False
    except OSError as error:
        raise UserError(f"{key}: cannot make {path} ({error.strerror})") from error


def read_json(path: Path) -> Record:
    """Read a JSON object; return an empty one if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_measurement(path: Path) -> Record:
    """Read a JSON file of a script in a run folder.

    The result is empty if the checkpoint has other weights now.
    """
    content = read_json(path)
    checkpoint = path.parent / str(content.get("checkpoint"))
    if "sha256" in content and checkpoint.is_file():
        status = checkpoint.stat()
        if hash_version(checkpoint, status.st_mtime_ns, status.st_size) != content["sha256"]:
            return {}
    return content


@functools.cache
def hash_version(path: Path, mtime_ns: int, size: int) -> str:
    """Hash a file once for each time that it is written."""
    return hash_file(path)


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.ckpt"

    def is_run(self) -> bool:
        """Return whether betavae has made this folder for a run."""
        return read_marker(self.path) == RUN

    def read_metrics(self) -> Record:
        """Return the content of metrics.json, with the status and results of the run."""
        return read_json(self.path / "metrics.json")

    def write_record(self, record: Record) -> None:
        """Write metrics.json.

        On a full disk, at least a status that is true is written before the error is raised.
        """
        path, text = self.path / "metrics.json", json.dumps(record, indent=2) + "\n"
        try:
            atomic_write_bytes(path, text.encode())
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not full or not path.exists() or self.read_metrics().get("status") == record["status"]:
                raise
            # Write what fits into the blocks of the old file. A run whose results are lost is not finished.
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
        """Return finished, failed, diverged, pruned, interrupted or running, or "" for a run that never began."""
        status = self.read_metrics().get("status", "")
        return "interrupted" if status == "running" and not self.is_locked() else status

    @contextlib.contextmanager
    def lock(self, wait: bool = False) -> Iterator[None]:
        """Lock the folder. The lock is released when the process exits, even if it is killed.

        Raises:
            UserError: If another process holds the lock, unless `wait` is true.
        """
        try:
            with FileLock(self.path / ".lock", timeout=-1 if wait else 1):
                yield
        except Timeout:
            raise UserError(f"{self.path} is in use by another process; wait for its end") from None

    def is_locked(self) -> bool:
        """Return whether a process holds the lock. Tests with a shared lock, which several processes can hold."""
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
        """Delete the files that a run wrote, by name, and no others."""
        for name in OUTPUT_FILES:
            (self.path / name).unlink(missing_ok=True)
        for pattern in OUTPUT_GLOBS:
            for path in self.path.glob(pattern):
                if path.is_file() and is_own_output(path):
                    path.unlink()
        self.delete_partial_files()
        for name in ("checkpoints", "figures", "projector/posterior_means", "projector"):
            with contextlib.suppress(OSError):
                (self.path / name).rmdir()

    def delete_partial_files(self) -> None:
        """Delete the incomplete files of a process that was killed."""
        patterns = [f"{name}.*{TMP_SUFFIX}" for name in (*OUTPUT_FILES, "checkpoints/*.ckpt", "evaluation.part")]
        for pattern in (*patterns, f"{TMP_PREFIX}*", f"figures/{TMP_PREFIX}*"):
            for path in self.path.glob(pattern):
                if not path.is_dir():  # a folder may belong to an export that is running
                    path.unlink()

    def delete(self) -> None:
        """Delete a run that never began."""
        self.delete_outputs()
        for name in (".lock", MARKER_FILE):
            (self.path / name).unlink(missing_ok=True)

    def delete_regenerated(self) -> None:
        """Delete what a resumed run writes again."""
        embedding = self.path / "projector" / "posterior_means"
        for name in ("metadata.tsv", "sprite.png", "tensors.tsv"):
            (embedding / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # TensorBoard warns of a folder that exists
            embedding.rmdir()
        self.delete_partial_files()


def is_own_output(path: Path) -> bool:
    """Return whether this project wrote a file that has the name of one of its outputs."""
    if path.name.startswith("events."):
        return re.fullmatch(r"events\.out\.tfevents\.\d+\..+\.\d+\.\d+", path.name) is not None
    stamped = (
        path.parent.name == "figures"
        or path.suffix in (".pt", ".csv")
        or path.name in ("evaluation.json", "fidelity.json", "disentanglement.json")
    )
    return not stamped or has_stamp(path)


def git_commit() -> str | None:
    """Return the commit of the sources, or None outside of a repository.

    It ends in "-dirty" if the sources have changed since.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
