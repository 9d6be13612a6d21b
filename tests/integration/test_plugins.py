"""A package that is installed into a fresh environment adds to betavae, without a change to this repository."""

import json
import subprocess
import sys
import sysconfig

import pytest
import torch

from tests.commands import ENVIRONMENT, REPO, TINY, run

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "extras"
version = "1.5"

[project.entry-points."betavae.plugins"]
extras = "extras.additions"

[tool.setuptools]
packages = ["extras"]
"""
# A network, a likelihood, an objective, a data set, a callback and a logger.
ADDITIONS = """
import torch
from lightning.pytorch.callbacks import Callback

from betavae.data import DATASETS, USER_DATASETS
from betavae.data.image_set import ImageSet
from betavae.models.likelihoods import LIKELIHOODS
from betavae.models.networks import NETWORKS, MLPDecoder, MLPEncoder
from betavae.objectives import OBJECTIVES, elbo
from betavae.runtime.callbacks import CALLBACKS
from betavae.runtime.loggers import LOGGERS
from betavae.runtime.loggers import CSVRunLogger


class Encoder(MLPEncoder):
    def __init__(self, image_shape, hidden_dims, latent_dim, activation, gain):
        super().__init__(image_shape, hidden_dims, latent_dim, activation)
        self.gain = gain

    def forward(self, x):
        return self.gain * super().forward(x)


class Shifted(LIKELIHOODS["bernoulli"]):
    pass


def penalized(vae, x, noise, beta, weight):
    terms = elbo(vae, x, noise, beta)
    penalty = terms.posterior.mean.square().sum(1)
    return terms._replace(
        loss=terms.loss + weight * penalty.mean(), extra_terms={"penalty": penalty, "weight": torch.tensor(weight)}
    )


def load_noise(root, split):
    n = {"train": 300, "test": 100}.get(split)
    if n is None:
        return None
    pixels = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    return ImageSet(pixels, torch.arange(n) % 2)


class Greeter(Callback):
    def __init__(self, word):
        self.word = word

    def on_train_start(self, trainer, module):
        print(self.word)


class Lines(CSVRunLogger):
    FILE = "lines.csv"

    def __init__(self, run, state, suffix):
        super().__init__(run, state)
        self.suffix = suffix


NETWORKS["gained"] = (Encoder, MLPDecoder)
LIKELIHOODS["shifted"] = Shifted
OBJECTIVES["penalized"] = penalized
DATASETS["noise"] = load_noise
USER_DATASETS.add("noise")
CALLBACKS["greeter"] = Greeter
LOGGERS["lines"] = Lines
"""
SETTINGS = [
    *("model.network=gained", "+model.gain=0.5", "model.likelihood=shifted", "objective.name=penalized"),
    *("~objective.free_bits", "+objective.weight=0.25", "data.name=noise", "data.validation_size=50"),
    *("data.batch_size=50", "+callbacks.custom.greeter={word: hello}", "+logger.lines={suffix: x}", "trainer=smoke"),
    *("model.hidden_dims=[16]", "model.latent_dim=3", "trainer.limit_test_batches=1.0"),
]


def write_package(folder):
    (folder / "extras").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "extras" / "__init__.py").touch()
    (folder / "extras" / "additions.py").write_text(ADDITIONS)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Return a function that runs Python in a new environment which has the package."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "shared.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{REPO / 'src'}\n")
    write_package(folder / "source")
    (folder / "data").mkdir()  # the root of the data set, which scripts require
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([python, *install, "--target", site, folder / "source"], check=True, env=ENVIRONMENT)

    def call(*args, code=0):
        done = subprocess.run([python, *args], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return folder, call


@pytest.mark.slow
def test_an_installed_package_works_in_every_command(environment):
    folder, python = environment
    output = python(REPO / "train.py", *SETTINGS, "hydra.run.dir=first")
    assert "hello" in output and "penalty" in output and "weight 0.25" in output
    assert "weight" in (folder / "first" / "lines.csv").read_text().splitlines()[0]
    metrics = json.loads((folder / "first" / "metrics.json").read_text())
    assert metrics["plugins"] == {"extras.additions": "extras 1.5"} and metrics["test"]["weight"] == 0.25
    assert "epoch   3/3" in python(REPO / "train.py", "resume=first", "trainer.max_epochs=3")
    assert "64 samples" in python(REPO / "scripts/sample.py", "ckpt=first")
    assert "100" in python(REPO / "scripts/evaluate.py", "ckpt=first", "k=5", "probes=false")
    python(REPO / "scripts/export.py", "ckpt=first", "out=exported")
    swept = ("-m", "beta=1,2", "trainer.max_epochs=1", "hydra.sweep.dir=sweep", "hydra/launcher=joblib")
    assert "2 jobs: 2 finished" in python(REPO / "train.py", *SETTINGS, *swept)
    assert "samples.png" in python(REPO / "scripts/sweep_report.py", "sweep=sweep")
    # Without the package, a checkpoint names it and imports nothing.
    error = run("ckpt=first", script="scripts/sample.py", cwd=folder, code=1)
    assert "first/checkpoints/best.ckpt was trained with the plugins extras.additions; install extras 1.5" in error
    assert "install extras 1.5" in run("resume=first", "trainer.max_epochs=4", cwd=folder, code=1)


@pytest.mark.slow
def test_a_module_of_the_folder_works_in_every_command(tmp_path, data_root):
    (tmp_path / "mypkg.py").write_text(
        "from betavae.models.networks import NETWORKS, MLPDecoder, MLPEncoder\n"
        "NETWORKS['mine'] = (MLPEncoder, MLPDecoder)\n"
    )
    plugin = "plugins=[mypkg]"
    args = [*TINY, "model.network=mine", "trainer.max_epochs=1", f"data.root={data_root}", "hydra.run.dir=first"]
    assert "model.network=mine is invalid" in run(*args, cwd=tmp_path, code=1)
    output = run(*args, plugin, cwd=tmp_path)
    assert f"python scripts/sample.py ckpt=first/checkpoints/best.ckpt '{plugin}'" in output
    content = torch.load(tmp_path / "first" / "checkpoints" / "best.ckpt", weights_only=True)
    assert content["plugins"] == {"mypkg": ""}
    for command in ("train.py", "scripts/sample.py"):
        key = "resume" if command == "train.py" else "ckpt"
        error = run(f"{key}=first", script=command, cwd=tmp_path, code=1)
        assert f"trained with the plugins mypkg; pass '{plugin}'" in error
    run("resume=first", "trainer.max_epochs=2", plugin, cwd=tmp_path)
    run("ckpt=first", plugin, script="scripts/sample.py", cwd=tmp_path)
