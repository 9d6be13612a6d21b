"""Commands that run side by side in the background, each in a `Child`, until a test asks for their outcome."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tests.commands import Child

AT_ONCE = 10  # more processes would only take turns on the GPU
TIMEOUT = 200  # seconds until a command counts as hanging


class Command(NamedTuple):
    """`python SCRIPT ARGS`, started when the command named `after` has succeeded; `code` is its exit code."""

    args: Sequence[str]
    script: str = "train.py"
    after: str | None = None
    code: int = 0
    prepare: Callable[[], object] | None = None
    environment: dict[str, str] | None = None


class Commands:
    """Start commands in their order, `AT_ONCE` at a time, whenever somebody waits for one."""

    def __init__(self, commands: dict[str, Command], folder: Path):
        self.waiting, self.folder = dict(commands), folder
        self.running: dict[str, tuple[Command, Child]] = {}
        self.errors: dict[str, str] = {}  # of each command that has ended; "" for success
        self.texts: dict[str, str] = {}  # all that it has printed

    def wait(self, name: str) -> None:
        while name not in self.errors:
            self.advance()
            time.sleep(0.02)
        assert not self.errors[name], self.errors[name]

    def advance(self) -> None:
        for name, (command, child) in list(self.running.items()):
            found: int | str | None = child.poll()
            if found is None and time.perf_counter() - child.started > TIMEOUT:
                child.kill_after(0)
                found = f"nothing in {TIMEOUT} s"
            if found is not None:
                self.texts[name] = child.text
                line = f"{command.script} {' '.join(command.args)}"
                self.errors[name] = "" if found == command.code else f"{line} exited with {found}:\n{child.text}"
                del self.running[name]
        for name, command in list(self.waiting.items()):
            error = self.errors.get(command.after) if command.after else ""
            if error:
                self.errors[name] = f"{name} was not started: {error}"
                del self.waiting[name]
            elif error == "" and len(self.running) < AT_ONCE:
                how = {"script": command.script, "prepare": command.prepare, "environment": command.environment}
                self.running[name] = command, Child(*command.args, cwd=self.folder, **how)
                del self.waiting[name]

    def stop(self) -> None:
        for _, child in self.running.values():
            child.kill_after(0)


def has_cuda() -> bool:
    """Ask a child: a process that has initialized CUDA cannot fork children that use it."""
    pid = os.fork()
    if not pid:
        try:
            os._exit(not torch.cuda.is_available())
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0
