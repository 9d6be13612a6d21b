import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from betavae.data.datasets.mnist import load_mnist
from tests.commands import REPO, run, run_in_child

PID, run_backward = os.getpid(), torch.autograd.graph._engine_run_backward


def forbid_backward(*args: Any, **how: Any) -> Any:
    """Run the autograd engine in children only: once it has threads, no forked process can use it."""
    if os.getpid() == PID and not os.environ.get("PYTEST_CURRENT_TEST", "").startswith("tests/gpu"):
        raise RuntimeError("this test needs pytest.mark.forked, since it calls autograd")
    return run_backward(*args, **how)


def pytest_configure():
    """Forbid autograd in pytest's process, and not in a script that imports this file."""
    torch.autograd._engine_run_backward = torch.autograd.graph._engine_run_backward = forbid_backward


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Call a function with `pytest.mark.forked` in a child."""
    if pyfuncitem.get_closest_marker("forked"):
        names = pyfuncitem._fixtureinfo.argnames
        run_in_child(lambda: pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
        return True
    return None


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A data folder with MNIST, unpacked once for all tests."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        load_mnist(folder, split)
    return str(folder)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data_root):
    """A working folder outside of the repository, with the data folder in it."""
    folder = tmp_path_factory.mktemp("workdir")
    (folder / "data").symlink_to(data_root)
    return folder


class Clone:
    """A copy of the project whose code a test may change."""

    def __init__(self, folder: Path, data: str):
        self.folder = folder
        for name in ("train.py", "configs", "scripts", "src"):
            source = REPO / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "mnist_files"))
            else:
                shutil.copy(source, folder / name)
        files = Path("src", "betavae", "data", "datasets", "mnist_files")
        os.symlink(REPO / files, folder / files)
        os.symlink(data, folder / "data")

    def run(self, script: str, *args: str, **how: Any) -> str:
        """Run `python SCRIPT ARGS` in the copy and return its output."""
        return run(*args, cwd=self.folder, script=script, sources=self.folder, **how)


@pytest.fixture(scope="session")
def new_clone(tmp_path_factory, data_root):
    return lambda: Clone(tmp_path_factory.mktemp("clone"), data_root)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    torch.set_float32_matmul_precision("highest")


MODEL = {
    "network": "mlp",
    "hidden_dims": [400],
    "latent_dim": 20,
    "activation": "relu",
    "likelihood": "bernoulli",
    "image_shape": [1, 28, 28],
}
MODULE = {
    "model": MODEL,
    "objective": {"name": "elbo", "k": 1},
    "beta": 1.0,
    "beta_schedule": {"name": "constant"},
    "optimizer": {"name": "Adam", "lr": 1e-3},
    "lr_schedule": {"name": "constant", "warmup": 0.0},
}
DATA = {
    "name": "mnist",
    "validation_size": 5000,
    "batch_size": 128,
    "eval_batch_size": 1000,
    "binarize": "none",
    "seed": 0,
}
