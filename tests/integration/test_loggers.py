"""Every logger has the values of TensorBoard, also after a run was killed and resumed."""

import csv
import importlib.util
import json
import os
import signal
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from betavae.module import VAEModule
from betavae.runtime.callbacks import ImageLogger
from betavae.runtime.training import TrainingRun
from tests.commands import TINY, Child, run

HEAVY = [name for name in ("wandb", "mlflow") if importlib.util.find_spec(name)]
needs = {name: pytest.mark.skipif(name not in HEAVY, reason=f"{name} is not installed") for name in ("wandb", "mlflow")}
ALL = f"logger=[tensorboard,csv{''.join(f',{name}' for name in HEAVY)}]"
DRAWN = ("reconstructions", "samples", "traversal")


@pytest.fixture(scope="module")
def runs(workdir):
    """The working folder with the run `whole`, and `resumed`, which was killed in its third epoch."""
    for name in HEAVY:  # import them once for all child processes
        importlib.import_module(name)
    if "mlflow" in HEAVY:
        importlib.import_module("mlflow").MlflowClient(f"sqlite:///{workdir}/other.db")
    args = (*TINY, "callbacks.figures_every_n_epochs=2", ALL)
    text = run(*args, "hydra.run.dir=whole", cwd=workdir)
    child = Child(*args, "hydra.run.dir=resumed", cwd=workdir, prepare=die_at(23))
    assert child.wait() == -signal.SIGKILL, child.text
    first = json.loads((workdir / "resumed" / "metrics.json").read_text())
    again = run("resume=resumed", cwd=workdir)
    return SimpleNamespace(folder=workdir, text=text, first=first, again=again)


def die_at(step):
    """Kill the run at a step, after W&B has written the earlier steps to its file."""

    def written() -> list[Any]:
        return [record for part in Path("resumed").glob("wandb/offline-run-*/*.wandb") for record in records(part)]

    def prepare() -> None:
        real = VAEModule.training_step

        def training_step(self: VAEModule, *args: Any) -> Any:
            if self.global_step == step:
                while "wandb" in HEAVY and 22 not in history(written()):
                    time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, *args)

        VAEModule.training_step = training_step  # type: ignore[method-assign]

    return prepare


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the curves of TensorBoard, in single precision."""
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def single(value: Any) -> float:
    return float(np.float32(value))


def table(folder: Path) -> dict[str, list[tuple[int, float]]]:
    with open(folder / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in ("step", "made by betavae")]
    return {name: [(int(row["step"]), single(row[name])) for row in rows if row[name]] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "resumed"])
def test_csv_rows_equal_the_points_of_tensorboard(runs, name):
    expected = curves(runs.folder / name)
    assert table(runs.folder / name) == expected
    assert [step for step, _ in expected["train/loss"]] == [3, 6, 8, 11, 14, 16, 19, 22, 24, 27, 30, 32]
    assert [step for step, _ in expected["val/neg_elbo"]] == [8, 16, 24, 32]
    assert len(expected["test/kl"]) == 1


@pytest.mark.slow
def test_the_csv_logger_writes_figures(runs):
    figures = runs.folder / "whole" / "figures"
    names = {f"{name}_{step:06d}" for name in (*DRAWN, "latent_kl_per_dimension") for step in (16, 32)}
    assert {path.stem for path in figures.iterdir()} == names | set(DRAWN)
    for name in DRAWN:
        first, last, labeled = (Image.open(figures / f"{name}{end}.png") for end in ("_000016", "_000032", ""))
        assert first.size == last.size and first.tobytes() != last.tobytes()
        assert labeled.size[1] > last.size[1]  # it has a caption


@pytest.mark.slow
def test_a_resumed_csv_is_identical(runs, tmp_path, data_root):
    """The run is killed between two checkpoints, and after the test."""
    whole = (runs.folder / "whole" / "curves.csv").read_bytes()
    assert (runs.folder / "resumed" / "curves.csv").read_bytes() == whole
    assert not list(runs.folder.rglob("*part*"))

    def die_late() -> None:
        TrainingRun.finish = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]

    args = (*TINY, "callbacks.figures_every_n_epochs=0", "logger=csv", f"data.root={data_root}", "hydra.run.dir=run")
    folder = tmp_path / "run"
    assert Child(*args, cwd=tmp_path, prepare=die_late).wait() == -signal.SIGKILL
    assert (folder / "curves.csv").read_bytes() == whole  # with the row of the test
    child = Child("resume=run", cwd=tmp_path, prepare=die_late)
    assert child.wait() == -signal.SIGKILL and "epoch " not in child.text
    assert (folder / "curves.csv").read_bytes() == whole
    # Without a checkpoint the run starts again.
    (folder / "checkpoints" / "last.ckpt").unlink()
    text = run("resume=run", cwd=tmp_path)
    assert "epoch   1/4" in text and "tensorboard" not in text
    assert (folder / "curves.csv").read_bytes() == whole and not list(folder.glob("events.*"))
    assert "loggers" not in json.loads((folder / "metrics.json").read_text())


def test_a_foreign_csv_is_kept(tmp_path, data_root):
    def write_foreign_table() -> None:
        real = ImageLogger.on_train_epoch_end

        def on_train_epoch_end(*args: Any) -> None:
            Path("run/curves.csv").write_text("mine\n")
            real(*args)

        ImageLogger.on_train_epoch_end = on_train_epoch_end  # type: ignore[method-assign]

    args = (*TINY, "trainer.log_every_n_steps=99", "logger=csv", f"data.root={data_root}", "hydra.run.dir=run")
    args = (*args, "data.validation_size=0", "callbacks.early_stopping_patience=null", "trainer.max_epochs=1")
    text = run(*args, cwd=tmp_path, prepare=write_foreign_table, code=1)
    assert "error: logger=csv: run/curves.csv already exists and was not made by betavae" in text
    assert (tmp_path / "run" / "curves.csv").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("logger=wandbb", "logger=wandbb is invalid: expected one of csv, mlflow, none, tensorboard, wandb"),
        ("logger=[csv,wandbb]", "wandbb"),
        (
            "logger=wandb logger.wandb.mode=onlin",
            "logger.wandb.mode=onlin is invalid: expected one of offline, online; did you mean online?",
        ),
        ("logger=mlflow logger.mlflow.experiment=3", "logger.mlflow.experiment=3 is invalid: expected a text"),
        ("+logger.csv.rows=3", "logger.csv"),
        ("logger=wandb ~logger.wandb.project", "logger.wandb.project is missing"),
    ],
)
def test_an_invalid_logger_is_a_one_line_error(tmp_path, mistake, said):
    text = run(*mistake.split(), cwd=tmp_path, code=1)
    assert text.startswith("error: ") and text.count("\n") == 1 and said in text
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_logger_package_names_its_extra(tmp_path, data_root, name):
    def hide() -> None:
        import sys

        sys.modules[name] = None  # type: ignore[assignment]

    text = run(*TINY, f"logger=[csv,{name}]", f"data.root={data_root}", cwd=tmp_path, prepare=hide, code=1)
    assert text == f'error: logger={name} needs the package {name}: pip install -e ".[{name}]"\n'
    assert not any(tmp_path.iterdir())


def records(path: Path) -> list[Any]:
    """Read the records of a W&B file, a log in the format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts, found = path.read_bytes(), 7, b"", []
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        if kind == 0 or at + 7 + size > len(content):  # an incomplete record
            break
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a complete record, or the last part of one
            found.append(Record.FromString(parts))
            parts = b""
    return found


def rows(found: list[Any]) -> list[dict[str, Any]]:
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]


def history(found: list[Any]) -> dict[int, dict[str, Any]]:
    """Return everything that was logged at each step."""
    steps: dict[int, dict[str, Any]] = {}
    for row in rows(found):
        steps.setdefault(row["trainer/global_step"], {}).update(row)
    return steps


@pytest.mark.slow
@needs["wandb"]
def test_wandb_offline_has_curves_settings_and_figures(runs):
    folder = runs.folder / "whole"
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = records(file)
    steps = history(found)
    for tag, points in curves(folder).items():
        assert [(step, single(row[tag])) for step, row in steps.items() if tag in row] == points
    config = {i.key: json.loads(i.value_json) for r in found for i in (*r.config.update, *r.run.config.update)}
    assert config["model.latent_dim"] == 3 and config["optimizer.lr"] == 0.001 and config["seed"] == 42
    test = json.loads((folder / "metrics.json").read_text())["test"]
    summary = {i.key: json.loads(i.value_json) for r in found for i in r.summary.update}
    assert {name: summary[f"test/{name}"] for name in test} == test
    for name in (*(f"pictures/{name}" for name in DRAWN), "latent/kl_per_dimension"):
        for step in (16, 32):
            (shown,) = steps[step][f"{name}.filenames"]
            assert Image.open(file.parent / "files" / shown).size[0] > 100
    assert f"wandb sync {file.parent.relative_to(runs.folder)}\n" in runs.text and "WARNING" not in runs.text


@pytest.mark.slow
@needs["wandb"]
def test_wandb_resumes_under_the_same_id(runs):
    folder = runs.folder / "resumed"
    parts = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(parts) == 2 and {path.stem for path in parts} == {f"run-{runs.first['loggers']['wandb']}"}
    assert json.loads((folder / "metrics.json").read_text())["loggers"] == runs.first["loggers"]
    before, after = (history(records(part)) for part in parts)
    assert min(after) == 19  # the checkpoint is of step 16
    kept = [row for row in rows(records(parts[0])) if row["trainer/global_step"] <= 16]
    assert [row["_step"] for row in kept] == list(range(len(kept)))
    assert rows(records(parts[1]))[0]["_step"] == len(kept) == 6 + 2 + 4  # training, validation, figures
    (whole,) = (runs.folder / "whole").glob("wandb/offline-run-*/*.wandb")
    assert set(before) | set(after) == set(history(records(whole)))
    for tag, points in curves(folder).items():
        assert [(step, single(row[tag])) for step, row in (before | after).items() if tag in row] == points
    assert f"wandb sync --append {parts[1].parent.relative_to(runs.folder)}\n" in runs.again


@needs["wandb"]
def test_wandb_without_a_login_is_a_one_line_error(tmp_path, data_root):
    alone = {"WANDB_API_KEY": "", "HOME": str(tmp_path / "home"), "NETRC": "/dev/null", "WANDB_CONFIG_DIR": "/dev/null"}
    args = (*TINY, "logger=wandb", "logger.wandb.mode=online", f"data.root={data_root}")
    text = run(*args, cwd=tmp_path, code=1, environment=alone)
    assert text.startswith("error: logger.wandb: No API key") and "mode=offline" in text and text.count("\n") == 1
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.slow
@needs["mlflow"]
@pytest.mark.parametrize("name", ["whole", "resumed"])
def test_mlflow_has_curves_settings_and_figures(runs, name):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runs.folder}/runs/mlflow/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'betavae'")
    found_runs = client.search_runs([experiment.experiment_id])
    assert sorted(found.info.run_name for found in found_runs) == ["resumed", "whole"]
    found = next(found for found in found_runs if found.info.run_name == name)
    record = json.loads((runs.folder / name / "metrics.json").read_text())
    assert record["loggers"]["mlflow"] == found.info.run_id and found.info.status == "FINISHED"
    for tag, points in curves(runs.folder / name).items():
        logged = client.get_metric_history(found.info.run_id, tag)
        assert sorted((point.step, single(point.value)) for point in logged) == points
    assert found.data.params["model.latent_dim"] == "3" and found.data.params["model.hidden_dims"] == "[16]"
    here = runs.folder / "runs" / "mlflow" / "artifacts" / found.info.run_id / "artifacts"
    for picture in (*(f"pictures/{picture}" for picture in DRAWN), "latent/kl_per_dimension"):
        assert sorted(path.name for path in (here / picture).iterdir()) == ["000016.png", "000032.png"]
    assert (runs.folder / name / "figures" / "samples.png").exists()
    assert list(Image.open(here / "pictures/samples/000032.png").tobytes()) == list(
        Image.open(runs.folder / name / "figures" / "samples.png").tobytes()
    )
    assert not (runs.folder / "mlruns").exists()


@needs["mlflow"]
def test_an_invalid_mlflow_uri_is_a_one_line_error(tmp_path, data_root):
    args = (*TINY, "logger=mlflow", "logger.mlflow.tracking_uri=nonsense://x", f"data.root={data_root}")
    text = run(*args, cwd=tmp_path, code=1)
    assert text.startswith("error: logger.mlflow.tracking_uri=nonsense://x: ") and text.count("\n") == 1
    assert not any(tmp_path.iterdir())
