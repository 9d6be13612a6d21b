"""Commands as a person types them. Most run in children forked from this process, which has done their imports: a fresh
process spends its first three seconds on those. `started` is a fresh process, for what only that can show."""

import atexit
import contextlib
import gc
import importlib.util
import os
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
# A whole run, as small as it goes: 4 epochs of 8 steps.
TINY = [
    "trainer=smoke",
    "model.hidden_dims=[16]",
    "model.latent_dim=3",
    "trainer.max_epochs=4",
    "trainer.limit_train_batches=8",
    "trainer.log_every_n_steps=3",
]

with warnings.catch_warnings():  # pytest's; what libraries change as they are imported is for the children
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

    Plugins.instance()
    FILTERS = warnings.filters[:]
gc.collect()
gc.freeze()  # or every child looks at their million objects
atexit.register(gc.unfreeze)  # or a library reports them as leaked
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Child:
    """`python SCRIPT ARGS` in the folder `cwd`, forked, with one thread.

    `sources` is a copy of the project whose code it is to run. `prepare` runs in the child first, to break something
    for real. `terminal` is a file descriptor to stand for the terminal.
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
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - as long as it is asked for
        sys.stdout.flush()
        self.started = time.perf_counter()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            self.become_a_process_of_its_own(self.output.fileno() if terminal is None else terminal)
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(ENVIRONMENT | (environment or {}))
            if sources != REPO:
                import_anew(sources)
            sys.argv = [script, *args]
            main = module_of(sources / script).main
            if prepare:
                prepare()
            main()
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
    def become_a_process_of_its_own(output: int) -> None:
        """Without what pytest has put in place of a fresh process' things."""
        import logging

        if output > 2:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w", 1)
        sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace")
        sys.excepthook = sys.__excepthook__
        for handler in logging.root.handlers[:]:
            logging.root.removeHandler(handler)
        logging.root.setLevel(logging.WARNING)
        warnings.filters[:] = FILTERS
        warnings.simplefilter("default", FutureWarning, append=True)  # tells the others that the list has changed
        warnings.showwarning = lambda message, category, file, line, *_: sys.stderr.write(
            warnings.formatwarning(message, category, file, line)
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(300)  # a child that hangs ends
        torch.set_num_threads(1)

    def wait(self) -> int:
        """The exit code; negative: the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def poll(self) -> int | None:
        """The same if it has ended."""
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
        """All it has printed, errors too."""
        # With its offset left alone, which the child shares.
        return os.pread(self.output.fileno(), os.fstat(self.output.fileno()).st_size, 0).decode(
            errors="surrogateescape"
        )


def module_of(script: Path) -> Any:
    spec = importlib.util.spec_from_file_location("script", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_anew(sources: Path) -> None:
    """Everything of ours, from another copy of the project."""
    for name in [name for name in sys.modules if name.split(".")[0] == "betavae"]:
        del sys.modules[name]
    sys.path.insert(0, str(sources / "src"))
    OmegaConf.clear_resolvers()
    importlib.invalidate_caches()


def run(*args: str, cwd: Path, code: int = 0, **how: Any) -> str:
    """What `python SCRIPT ARGS` prints; its exit status must be `code`."""
    child = Child(*args, cwd=cwd, **how)
    found = child.wait()
    assert found == code, f"{args} exited with {found}:\n{child.text}"
    return child.text


def started(*args: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """`python ARGS` in a fresh process; a variable that is "" is not there."""
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
    """What `python ARGS` prints in a fresh process; its exit status must be `code`."""
    process = started(*args, cwd=cwd, **environment)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == code, f"{args} exited with {process.returncode}:\n{text}"
    return text


def wait_for(folder: Path, pattern: str, process: Any, count: int = 1) -> None:
    """Until so many such files are there, while `process` (a `Child`, or started) runs."""
    while len(list(folder.glob(pattern))) < count:
        assert process.poll() is None, "it ended before there was one"
        time.sleep(0.01)
