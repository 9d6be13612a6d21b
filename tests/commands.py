"""Run commands as a user types them.

Most run in children that are forked from this process after its imports, which take a fresh process three seconds.
`started` starts a fresh process.
"""

import atexit
import contextlib
import gc
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
# A complete but tiny run: 4 epochs of 8 steps.
TINY = [
    "trainer=smoke",
    "model.hidden_dims=[16]",
    "model.latent_dim=3",
    "trainer.max_epochs=4",
    "trainer.limit_train_batches=8",
    "trainer.log_every_n_steps=3",
]

with warnings.catch_warnings():  # pytest's own filters stay; the children get those that the imports set
    warnings.resetwarnings()
    for category in (ResourceWarning, ImportWarning, PendingDeprecationWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    import torch
    import torch.utils.tensorboard.summary
    from hydra.core.plugins import Plugins
    from omegaconf import OmegaConf

    import betavae.runtime.evaluation
    import betavae.runtime.training
    import betavae.sweeps.report  # noqa: F401
    from betavae.runtime import hydra_config

    Plugins.instance()
    # A child with an error would parse all YAML files for the names of the settings.
    hydra_config.all_keys()
    FILTERS = warnings.filters[:]
gc.collect()
gc.freeze()  # every child would scan these million objects
atexit.register(gc.unfreeze)  # a library would report frozen objects as leaked
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Child:
    """A forked process with one thread that runs `python SCRIPT ARGS`.

    Args:
        cwd: The working folder.
        script: The script, relative to `sources`.
        sources: The copy of the project whose code runs.
        prepare: A function to call in the child first, to inject a fault.
        terminal: A file descriptor to use as the terminal.
        environment: Variables to add.
    """

    def __init__(
        self,
        *args: str,
        cwd: Path,
        script: str = "train.py",
        sources: Path = REPO,
        prepare: Callable[[], object] | None = None,
        terminal: int | None = None,
        environment: dict[str, str] | None = None,
    ):
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - read after the child ended
        sys.stdout.flush()
        self.started = time.perf_counter()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            self.reset_process(self.output.fileno() if terminal is None else terminal)
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(ENVIRONMENT | (environment or {}))
            if sources != REPO:
                import_anew(sources)
            sys.argv = [script, *args]
            if prepare:
                prepare()
            runpy.run_path(str(sources / script), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else stop.code is not None
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    @staticmethod
    def reset_process(output: int) -> None:
        """Undo what pytest has changed, so that the child behaves as a fresh process."""
        import logging

        if output > 2:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", 1, closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
        sys.excepthook = sys.__excepthook__
        for handler in logging.root.handlers[:]:
            logging.root.removeHandler(handler)
        logging.root.setLevel(logging.WARNING)
        warnings.filters[:] = FILTERS
        warnings.simplefilter("default", FutureWarning, append=True)  # invalidates the caches of the filters
        warnings.showwarning = lambda message, category, file, line, *_: sys.stderr.write(
            warnings.formatwarning(message, category, file, line)
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(300)  # end a child that hangs
        torch.set_num_threads(1)

    def wait(self) -> int:
        """Wait for the end and return the exit code, or minus the number of the signal that killed the child."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def poll(self) -> int | None:
        """Return the exit code if the child has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill_after(self, seconds: float, number: int = signal.SIGKILL) -> int:
        time.sleep(max(0.0, self.started + seconds - time.perf_counter()))
        self.send(number)
        return self.wait()

    @property
    def text(self) -> str:
        """The output so far, with errors."""
        # `pread` keeps the offset, which the child shares.
        return os.pread(self.output.fileno(), os.fstat(self.output.fileno()).st_size, 0).decode(
            errors="surrogateescape"
        )


def load_script(script: Path) -> Any:
    """Import a script as a module, without running it."""
    spec = importlib.util.spec_from_file_location("script", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_anew(sources: Path) -> None:
    """Import this project from another copy of it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "betavae"]:
        del sys.modules[name]
    sys.path.insert(0, str(sources / "src"))
    OmegaConf.clear_resolvers()
    importlib.invalidate_caches()


def run(*args: str, cwd: Path, code: int = 0, **how: Any) -> str:
    """Run `python SCRIPT ARGS` and return its output; its exit status must be `code`."""
    child = Child(*args, cwd=cwd, **how)
    found = child.wait()
    assert found == code, f"{args} exited with {found}:\n{child.text}"
    return child.text


def run_in_child(work: Callable[[], object]) -> None:
    """Call a function in a forked process: it leaves nothing behind in this one."""

    def prepare() -> None:
        try:
            work()
        except SystemExit as stop:
            raise RuntimeError("the work ended the process") from stop
        sys.exit(0)

    run(cwd=Path(), prepare=prepare)


def started(*args: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start `python ARGS` in a fresh process, without the variables that are ""."""
    env = ENVIRONMENT | {"PYTHONPATH": str(REPO / "src")} | environment
    return subprocess.Popen(
        [sys.executable, *args],
        cwd=cwd,
        env={name: value for name, value in env.items() if value},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def fresh(*args: str, cwd: Path, code: int = 0, **environment: str) -> str:
    """Run `python ARGS` in a fresh process and return its output; its exit status must be `code`."""
    process = started(*args, cwd=cwd, **environment)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == code, f"{args} exited with {process.returncode}:\n{text}"
    return text


def read_record(folder: Path) -> dict[str, Any]:
    """Return the metrics.json of a run folder."""
    return json.loads((folder / "metrics.json").read_text())


def is_equal(a: object, b: object) -> bool:
    """Return whether two nested values are equal, their tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(is_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(is_equal, a, b))
    return a == b


def wait_for(folder: Path, pattern: str, process: Any, count: int = 1) -> None:
    """Wait for `count` files that match, while `process` (a `Child` or from `started`) runs."""
    while len(list(folder.glob(pattern))) < count:
        assert process.poll() is None, "the process ended before there was such a file"
        time.sleep(0.01)
