"""Whole commands in a child forked from a process that has its imports done, so that killing one costs a second."""

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TINY = [
    "trainer=smoke",
    "model.hidden_dims=[16]",
    "model.latent_dim=3",
    "trainer.max_epochs=4",
    "trainer.limit_train_batches=8",
    "trainer.log_every_n_steps=3",
]


def main_of(script: str) -> Callable[[], None]:
    spec = importlib.util.spec_from_file_location("script", ROOT / script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


class Child:
    """`python script args...` in `cwd`, forked; `prepare` runs in the child first, to break something for real."""

    def __init__(
        self, args: list[str], cwd: Path, script: str = "train.py", prepare: Callable[[], object] | None = None
    ):
        import betavae.training  # noqa: F401 - before the fork

        self.output = cwd / "output.txt"
        sys.stdout.flush()
        self.started = time.perf_counter()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.chdir(cwd)
            torch.set_num_threads(1)
            sys.argv = [script, *args]
            main = main_of(script)
            if prepare:
                prepare()
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self) -> int:
        """The exit code; negative: the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill_after(self, seconds: float, number: int = signal.SIGKILL) -> int:
        time.sleep(max(0.0, self.started + seconds - time.perf_counter()))
        os.kill(self.pid, number)
        return self.wait()

    @property
    def text(self) -> str:
        return self.output.read_text()
