"""Figures and loggers come after the test metrics, and their failure does not fail a run."""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from betavae import plotting
from betavae.module import VAEModule
from betavae.runtime.loggers import TensorBoard
from betavae.runtime.training import TrainingRun
from tests.commands import TINY, Child, read_record, run

SMALL = [*TINY, "data=arrays", "data.root=images.npy", "data.test_size=9", "data.validation_size=10"]
SMALL += ["data.batch_size=10", "callbacks.figures_every_n_epochs=2", "hydra.run.dir=run"]


def images(folder: Path, *shape: int) -> None:
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (60, *shape), dtype=np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "settings", "tile"),
    [
        ((10, 8), [], 10),
        ((3, 5, 9), ["trainer.precision=64-true"], 9),
        ((7, 1), ["trainer.precision=bf16-true", "model.latent_dim=2"], 7),
        ((1, 1), ["model.likelihood=logistic_mixture"], 1),
        ((2, 1500), ["data.test_size=40"], 585),  # 7 in a row
    ],
)
def test_figures_of_every_shape_and_precision(tmp_path, shape, settings, tile):
    images(tmp_path, *shape)
    text = run(*SMALL, *settings, cwd=tmp_path)
    assert "warning" not in text.lower(), text
    assert read_record(tmp_path / "run")["status"] == "finished"
    names = {"samples", "reconstructions", "traversal"} | ({"manifold"} if "model.latent_dim=2" in settings else set())
    assert {path.stem for path in (tmp_path / "run" / "figures").iterdir()} == names
    sprite = Image.open(tmp_path / "run" / "projector" / "posterior_means" / "sprite.png")
    assert sprite.size == (tile * (7 if tile == 585 else 3),) * 2 and max(sprite.size) <= 8192
    sizes = re.findall(r"single_image_dim: (\d+)", (tmp_path / "run" / "projector_config.pbtxt").read_text())
    assert sizes == [str(tile)] * 2


def break_matplotlib() -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        del sys.modules[name]
    sys.modules["matplotlib"] = None  # type: ignore[assignment]


def break_memory() -> None:
    def traversal(*args: Any) -> Any:
        raise RuntimeError("CUDA out of memory\nmore")

    plotting.traverse = traversal


def break_network() -> None:
    def fail(*args: Any) -> None:
        raise ConnectionError("no route to host")

    TensorBoard.log_image_grid = TensorBoard.log_final_metrics = TensorBoard.finish = fail  # type: ignore[method-assign]


def break_folder() -> None:
    def start(*args: Any) -> None:
        real(*args)
        Path("run/figures").write_text("a file of that name")

    real, TrainingRun.start = TrainingRun.start, start  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (break_matplotlib, ["sending figures to TensorBoard", "drawing the embedding projector"]),
        (break_memory, ["drawing figures of the model failed (RuntimeError: CUDA out of memory)"]),
        (
            break_network,
            ["sending figures to TensorBoard failed (ConnectionError: no route to host)", "test metrics", "closing"],
        ),
        (break_folder, ["writing figures to run/figures failed"]),
    ],
)
def test_a_failed_figure_is_one_warning(tmp_path, broken, said):
    images(tmp_path, 6, 6)
    text = run(*SMALL, cwd=tmp_path, prepare=broken)
    warnings = [line for line in text.splitlines() if "warning" in line]
    assert len(warnings) == len(said), text
    for line, words in zip(warnings, said, strict=True):
        assert line.startswith("warning: ") and words in line and line.endswith("the run is not affected")
    assert "Traceback" not in text and "next  " in text
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()
    found = read_record(tmp_path / "run")
    assert found["status"] == "finished" and found["test"]["neg_elbo"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_metrics_are_saved_before_figures(tmp_path, number):
    """A run that is stopped while the last figures are drawn is drawn by a resume, and a job by its sweep."""
    images(tmp_path, 6, 6)

    def die() -> None:
        def tiles(*args: Any) -> Any:
            os.kill(os.getpid(), number)
            return real(*args)

        real, plotting.make_tiles = plotting.make_tiles, tiles

    commands = {"a run": ([*SMALL[:-1], "hydra.run.dir='a run'"], ["resume='a run'"])}
    commands["sweep"] = (["-m", *SMALL[:-1], "beta=1", "hydra.sweep.dir=sweep"],) * 2
    tests = []
    for name, (command, again) in commands.items():
        child = Child(*command, cwd=tmp_path, prepare=die)
        assert child.wait() == (130 if number == signal.SIGINT else -number), child.text
        assert name == "sweep" or number == signal.SIGKILL or child.text.endswith("train.py 'resume=\"a run\"'\n")
        (folder,) = (path.parent for path in (tmp_path / name).rglob("metrics.json"))
        stopped = read_record(folder)
        assert stopped["status"] == "finished" and not (folder / "projector").exists()
        assert "epoch " not in run(*again, cwd=tmp_path) and (folder / "projector").exists()
        assert read_record(folder)["test"] == stopped["test"]
        drawn = (folder / "figures" / "samples.png").stat().st_mtime_ns
        assert "finished" in run(*again, cwd=tmp_path)
        assert (folder / "figures" / "samples.png").stat().st_mtime_ns == drawn
        tests.append(stopped["test"])
    assert tests[0] == tests[1]


def fails_at(hook: str) -> Any:
    def fail(*args: Any) -> None:
        raise RuntimeError("not today")

    return lambda: setattr(VAEModule, hook, fail)


@pytest.mark.parametrize("hook", ["on_fit_end", "test_step"])
def test_a_job_that_failed_after_training_is_not_retrained(tmp_path, hook):
    """The same command tests the job."""
    images(tmp_path, 6, 6)
    command = ["-m", *SMALL[:-1], "beta=2", "hydra.sweep.dir=sweep"]
    text = run(*command, cwd=tmp_path, prepare=fails_at(hook), code=1)
    assert "failed: RuntimeError: not today" in text and "epoch   4/4" in text
    (folder,) = (path.parent for path in (tmp_path / "sweep").glob("*/metrics.json"))
    trained = (folder / "checkpoints" / "last.ckpt").stat()
    assert "epoch " not in run(*command, cwd=tmp_path)
    assert read_record(folder)["status"] == "finished"
    kept = (folder / "checkpoints" / "last.ckpt").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (trained.st_ino, trained.st_mtime_ns)


@pytest.mark.parametrize("where", ["training", "drawing"])
def test_a_retry_without_its_data_keeps_the_checkpoint(tmp_path, where):
    images(tmp_path, 6, 6)
    command = ["-m", *SMALL[:-1], "beta=2", "hydra.sweep.dir=sweep"]

    def die(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def prepare() -> None:
        if where == "drawing":
            plotting.make_tiles = die
            return
        real = VAEModule.training_step
        step = lambda self, *args: real(self, *args) if self.global_step < 9 else die()  # noqa: E731
        VAEModule.training_step = step  # type: ignore[method-assign,assignment]

    assert Child(*command, cwd=tmp_path, prepare=prepare).wait() == -signal.SIGKILL
    (tmp_path / "images.npy").rename(tmp_path / "away.npy")
    assert "failed: " in run(*command, cwd=tmp_path, code=1)
    (tmp_path / "away.npy").rename(tmp_path / "images.npy")
    text = run(*command, cwd=tmp_path)
    assert "epoch   1/4" not in text and ("epoch " in text) == (where == "training")


def test_a_job_with_a_damaged_record_is_not_retrained(tmp_path):
    images(tmp_path, 6, 6)
    command = ["-m", *SMALL[:-1], "beta=2", "hydra.sweep.dir=sweep"]
    run(*command, cwd=tmp_path)
    (folder,) = (path.parent for path in tmp_path.glob("sweep/*/metrics.json"))
    trained = (folder / "checkpoints" / "last.ckpt").stat()
    (folder / "metrics.json").write_text("{")
    assert "epoch " not in run(*command, cwd=tmp_path)
    kept = (folder / "checkpoints" / "last.ckpt").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (trained.st_ino, trained.st_mtime_ns)
    assert read_record(folder)["status"] == "finished"


def test_a_job_that_failed_in_training_starts_again(tmp_path):
    images(tmp_path, 6, 6)
    command = ["-m", *SMALL[:-1], "beta=2", "hydra.sweep.dir=sweep"]

    def fail_later() -> None:
        def step(self: VAEModule, *args: Any) -> Any:
            if self.global_step == 9:
                raise RuntimeError("not today")
            return real(self, *args)

        real, VAEModule.training_step = VAEModule.training_step, step  # type: ignore[method-assign]

    assert "epoch   1/4" in run(*command, cwd=tmp_path, prepare=fail_later, code=1)
    assert "epoch   1/4" in run(*command, cwd=tmp_path)
