import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A data folder that is unpacked once for all tests."""
    return str(tmp_path_factory.mktemp("data"))


class Clone:
    """A copy of the project in a folder of its own, where commands are run as a user runs them."""

    def __init__(self, folder: Path, data: str):
        self.folder = folder
        for name in ("train.py", "configs", "scripts", "src"):
            source = REPO / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "mnist_files"))
            else:
                shutil.copy(source, folder / name)
        os.symlink(REPO / "src" / "betavae" / "mnist_files", folder / "src" / "betavae" / "mnist_files")
        os.symlink(data, folder / "data")

    def run(self, *arguments: str, code: int = 0) -> str:
        """Standard output and error of `python ARGUMENTS`, in a new process whose exit status must be `code`."""
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.folder / "src")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, f"{arguments} exited with {done.returncode}:\n{done.stdout}"
        return done.stdout


@pytest.fixture(scope="session")
def new_clone(tmp_path_factory, data_root):
    return lambda: Clone(tmp_path_factory.mktemp("clone"), data_root)


@pytest.fixture(scope="session")
def clone(new_clone):
    return new_clone()


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
    "objective": {"name": "elbo", "k": 1, "free_bits": 0.0},
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
