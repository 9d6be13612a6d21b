"""A run that is stopped at any moment and resumed equals, bit for bit, a run that was never stopped."""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from betavae.module import VAEModule
from betavae.runtime.training import TrainingRun
from betavae.runtime.yaml_files import read_yaml
from tests.commands import TINY, Child, is_equal, run

pytestmark = pytest.mark.slow

# Random numbers in the data and the model, both schedules, figures, and early stopping.
RICH = [
    *TINY,
    "trainer.max_epochs=5",
    "data.binarize=dynamic",
    "beta_schedule=linear",
    "lr_schedule=cosine",
    "lr_schedule.warmup=0.1",
    "callbacks.early_stopping_patience=9",
    "callbacks.figures_every_n_epochs=2",
]


def outcome(folder: Path) -> dict[str, Any]:
    """Return everything that a run writes, except times and paths."""
    found: dict[str, Any] = {}
    for name in (path.stem for path in (folder / "checkpoints").glob("*.ckpt")):
        content = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "random_state", "batches", "epoch"):
            found[f"{name} {key}"] = content[key]
        states = content["callbacks"]
        found[f"{name} sums"] = content["train_metrics"]
        found[f"{name} epochs"] = len(states["EpochSummary"]["epochs"])  # the seconds of each
        scores = [(k.split("{")[0], v.get("best_model_score"), v.get("wait_count")) for k, v in states.items()]
        found[f"{name} scores"] = sorted(scores, key=str)
    record = json.loads((folder / "metrics.json").read_text())
    said = ("status", "epochs", "steps", "checkpoint", "test", "validation")
    found["record"] = {key: record.get(key) for key in said}
    found["epoch lines"] = len(record["epoch_seconds"])
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    for tag in events.Tags()["scalars"]:
        found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    for tag in events.Tags()["images"]:
        found[tag] = [(event.step, event.encoded_image_string) for event in events.Images(tag)]
    for picture in (folder / "figures").iterdir():
        found[picture.name] = picture.read_bytes()
    return found


def assert_same(folder: Path, expected: dict[str, Any]) -> None:
    found = outcome(folder)
    assert found.keys() == expected.keys()
    assert not [key for key in expected if not is_equal(found[key], expected[key])]


def run_whole(tmp: Path, args: list[str]) -> tuple[dict[str, Any], float]:
    child = Child(*args, "hydra.run.dir=whole/run", cwd=tmp)  # captions name the folder
    assert child.wait() == 0, child.text
    return outcome(tmp / "whole" / "run"), time.perf_counter() - child.started


def start_or_resume(tmp: Path, args: list[str], **kwargs: Any) -> Child:
    """Start the run in `run`, or resume it."""
    # Event files are sorted by the second in their names.
    while list((tmp / "run").glob(f"events.out.tfevents.{int(time.time())}.*")):
        time.sleep(0.05)
    if (tmp / "run" / "config.yaml").exists():
        return Child("resume=run", cwd=tmp, **kwargs)
    return Child(*args, "hydra.run.dir=run", cwd=tmp, **kwargs)


@pytest.fixture(scope="module")
def root(data_root: str) -> str:
    return f"data.root={data_root}"


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory, root: str) -> tuple[dict[str, Any], float]:
    return run_whole(tmp_path_factory.mktemp("whole"), [*RICH, root])


def test_a_run_killed_at_random_moments_resumes_exactly(
    tmp_path: Path, root: str, rich: tuple[dict[str, Any], float]
) -> None:
    expected, seconds = rich
    rng = random.Random(0)
    kills, chain, met = 0, 0, set()
    # Where a moment falls depends on the machine's load: kill until three different states were resumed.
    while (more := kills < 10 or len(met) < 3) or chain:
        assert kills < 60, met
        child = start_or_resume(tmp_path, [*RICH, root])
        # The same run is killed up to five times in a row, then it may finish.
        code = child.kill_after(rng.uniform(0.1, seconds)) if chain < 5 and more else child.wait()
        if code == -signal.SIGKILL:
            kills, chain = kills + 1, chain + 1
            last = tmp_path / "run" / "checkpoints" / "last.ckpt"
            met.add(torch.load(last, weights_only=True)["global_step"] if last.exists() else None)
            continue
        assert code == 0, child.text
        assert_same(tmp_path / "run", expected)
        shutil.rmtree(tmp_path / "run")
        chain = 0


def test_a_run_killed_while_saving_resumes_exactly(
    tmp_path: Path, root: str, rich: tuple[dict[str, Any], float]
) -> None:
    def die_while_saving() -> None:
        """Kill the process in the middle of the file after the second `last.ckpt`."""
        real, count = os.replace, 0

        def dying(file: int) -> None:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        def replace(source: Any, target: Any) -> None:
            nonlocal count
            real(source, target)
            if str(target).endswith("last.ckpt") and (count := count + 1) == 2:
                os.fsync = dying  # type: ignore[assignment]

        os.replace = replace

    child = start_or_resume(tmp_path, [*RICH, root], prepare=die_while_saving)
    assert child.wait() == -signal.SIGKILL
    (half,) = (tmp_path / "run" / "checkpoints").glob("*.part")
    assert re.fullmatch(r"best\.ckpt\.\w+\.part", half.name) and half.stat().st_size > 1000
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 16
    assert start_or_resume(tmp_path, [*RICH, root]).wait() == 0
    assert_same(tmp_path / "run", rich[0])
    assert not list(tmp_path.rglob("*.part"))


def test_a_run_killed_after_its_test_logs_no_point_twice(
    tmp_path: Path, root: str, rich: tuple[dict[str, Any], float]
) -> None:
    def die_late() -> None:
        TrainingRun.finish = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]

    assert start_or_resume(tmp_path, [*RICH, root], prepare=die_late).wait() == -signal.SIGKILL
    assert start_or_resume(tmp_path, [*RICH, root]).wait() == 0
    assert_same(tmp_path / "run", rich[0])


def signal_at(step: int, number: int) -> Callable[[], None]:
    """Return a fault: the child gets a signal in the middle of the first step after `step`."""

    def prepare() -> None:
        real = VAEModule.training_step

        def training_step(self: VAEModule, batch: Any, batch_idx: int) -> Any:
            if self.global_step >= step and not sent:
                sent.append(step)
                os.kill(os.getpid(), number)
            return real(self, batch, batch_idx)

        sent: list[int] = []
        VAEModule.training_step = training_step  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["trainer.accumulate_grad_batches=3", "trainer.val_check_interval=0.5", "optimizer=muon", "init=data"],
        ["trainer.max_steps=21", "trainer.max_epochs=99", "trainer.check_val_every_n_epoch=2"],
        [
            *("data.validation_size=0", "callbacks.early_stopping_patience=null"),
            *("model.likelihood=gaussian", "optimizer=sgd", "trainer.gradient_clip_val=1.0"),
        ],
        ["callbacks.early_stopping_patience=0", "optimizer.lr=0.3", "model=conv", "model.hidden_dims=[2]"],
        ["trainer.steps_per_batch=2", "optimizer=muon"],
    ],
    ids=["plain", "accumulate", "max_steps", "no_validation", "early_stop", "steps_per_batch"],
)
def test_a_signaled_run_saves_and_resumes_exactly(tmp_path: Path, root: str, args: list[str]) -> None:
    args = [*RICH, root, "trainer.max_epochs=4", *args]
    expected, _ = run_whole(tmp_path, args)
    steps: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM) * 20:
        at = steps[-1] + (0, 4, 9)[len(steps) % 3] if steps else 2
        child = start_or_resume(tmp_path, args, prepare=signal_at(at, number))
        code = child.wait()
        if code == 0:
            break
        assert code == 128 + number, child.text
        assert "python train.py resume=run" in child.text and "Traceback" not in child.text
        assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "interrupted"
        steps.append(torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])
        assert f"interrupted at step {steps[-1]};" in child.text
    assert len(steps) >= 2 and steps == sorted(steps)
    assert_same(tmp_path / "run", expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_signaled_during_its_test_is_tested_again(tmp_path: Path, root: str, number: int) -> None:
    def prepare() -> None:
        VAEModule.test_step = lambda *args: os.kill(os.getpid(), number)  # type: ignore[assignment,method-assign]

    args = [*TINY, root, "callbacks.figures_every_n_epochs=0", "trainer.max_epochs=1"]
    expected, _ = run_whole(tmp_path, args)
    child = start_or_resume(tmp_path, args, prepare=prepare)
    assert child.wait() == 128 + number, child.text
    assert "python train.py resume=run" in child.text and "Traceback" not in child.text
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "interrupted"
    assert "epoch " not in run("resume=run", cwd=tmp_path)
    assert_same(tmp_path / "run", expected)


def test_a_compiled_run_resumes_uncompiled(tmp_path, data_root):
    """Fused Adam pairs weights and moments by their layout in memory, which `compile_loss` changes."""
    args = [
        *TINY,
        f"data.root={data_root}",
        "model=conv",
        "model.hidden_dims=[4,8]",
        "callbacks.figures_every_n_epochs=0",
    ]

    def disable_compile() -> None:
        torch.compile = lambda function, **settings: function  # type: ignore[assignment]

    def weights(folder: str) -> dict[str, torch.Tensor]:
        return torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    run(*args, "hydra.run.dir=plain", cwd=tmp_path)
    run(
        *args,
        "trainer.compile=true",
        "hydra.run.dir=other",
        "trainer.max_epochs=2",
        cwd=tmp_path,
        prepare=disable_compile,
    )
    assert weights("other")["vae.encoder.2.weight"].is_contiguous(memory_format=torch.channels_last)
    run("resume=other", "trainer.compile=false", "trainer.max_epochs=4", cwd=tmp_path)
    for name, value in weights("plain").items():
        torch.testing.assert_close(weights("other")[name], value, rtol=1e-3, atol=1e-5)


def test_every_kind_of_setting_resumes(tmp_path, root):
    """Settings may be added, deleted or custom, and a text may look like an interpolation."""

    def register():
        from lightning.pytorch.callbacks import LearningRateMonitor

        from betavae.runtime.callbacks import CALLBACKS

        CALLBACKS["rate"] = LearningRateMonitor

    name = r"name='\${oc.env:HOME} [1]: # \'é\''"
    added = ["+trainer.benchmark=true", "+trainer.profiler=simple", "+optimizer.amsgrad=true", "~optimizer.fused"]
    added += ["+model.components=2", "model.likelihood=logistic_mixture", "logger=[tensorboard,csv]"]
    added += ["+callbacks.custom.rate={logging_interval: epoch}", "trainer.max_time='12:34:56:10'", name]
    run(*TINY, root, *added, "trainer.max_epochs=1", "hydra.run.dir=run", cwd=tmp_path, prepare=register)
    before = read_yaml(tmp_path / "run" / "config.yaml")
    assert before["name"] == "${oc.env:HOME} [1]: # 'é'"
    changes = ["trainer.max_epochs=2", "+trainer.benchmark=false", "+callbacks.custom.rate.logging_interval=step"]
    text = run("resume=run", *changes, cwd=tmp_path, prepare=register)
    assert "epoch   2/2" in text and "warning" not in text.lower()
    before["trainer"] |= {"max_epochs": 2, "benchmark": False}
    before["callbacks"]["custom"]["rate"]["logging_interval"] = "step"
    assert read_yaml(tmp_path / "run" / "config.yaml") == before
