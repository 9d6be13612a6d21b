"""Whole searches: pruned, killed and resumed, side by side, and with two objectives."""

import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from betavae.module import VAEModule
from betavae.sweeps import report, results, search
from tests.commands import Child, fresh, run, wait_for
from tests.integration import sweep_commands
from tests.integration.sweep_commands import TRAIN, documented, find_job, read_metrics

optuna = pytest.importorskip("optuna")
from optuna.trial import TrialState  # noqa: E402

from tests.unit.sweeps.test_search import make_settings, tell_trial  # noqa: E402

SMALL = [*sweep_commands.SMALL, "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
# These replace the search space of the preset: a later override wins, and a plain value is not searched.
ONE = ["model.latent_dim=3", "model.hidden_dims=[16]"]
SEARCH = ["-m", "sweep=optuna", *SMALL, *ONE, "hydra.sweep.dir=study"]


def load_study(folder: Path) -> optuna.Study:
    """Load the study of a search."""
    return optuna.load_study(study_name="betavae", storage=f"sqlite:///{folder}/study.db")


@pytest.mark.slow
def test_a_search_survives_divergence_and_being_killed(tmp_path: Path, data: str) -> None:
    args = [*documented("n_trials=30"), *SMALL, *ONE, data, "trainer.max_epochs=6", "optimizer=sgd"]
    args += ["hydra.sweeper.n_trials=5", "optimizer.lr=choice(1e-4,1e-5,1e30)", "seed=range(1,1000)"]
    child = Child(*args, cwd=tmp_path)
    wait_for(tmp_path, "runs/sweeps/optuna/*/checkpoints/last.ckpt", child, count=2)
    child.send(signal.SIGKILL)
    child.wait()
    folder = tmp_path / "runs/sweeps/optuna"
    before = load_study(folder).trials
    assert before[-1].state == TrialState.RUNNING
    text = run(*args, cwd=tmp_path)
    assert "Traceback" not in text and "Warning" not in text
    trials = load_study(folder).trials
    assert len(trials) == 5 and [t.params for t in trials[: len(before)]] == [t.params for t in before]
    assert {(t.params["optimizer.lr"] == 1e30, t.state.name) for t in trials} >= {(True, "FAIL"), (False, "COMPLETE")}
    assert all(t.state == TrialState.FAIL for t in trials if t.params["optimizer.lr"] == 1e30)
    optuna_cli = [str(Path(sys.executable).with_name("optuna")), *documented("optuna trials")]
    listed = subprocess.run(optuna_cli, cwd=tmp_path, capture_output=True, text=True).stdout
    assert all(state.name in listed for state in {trial.state for trial in trials})
    for trial in trials:
        (job,) = (
            path.parent
            for path in folder.glob("*/config.yaml")
            if (config := yaml.safe_load(path.read_text()))["seed"] == trial.params["seed"]
            and float(config["optimizer"]["lr"]) == trial.params["optimizer.lr"]
        )
        assert (
            read_metrics(job)["status"]
            == {"COMPLETE": "finished", "FAIL": "diverged", "PRUNED": "pruned"}[trial.state.name]
        )
        if trial.state == TrialState.COMPLETE:
            assert trial.value == read_metrics(job)["validation"]["neg_elbo"]
            assert list(trial.intermediate_values) == list(range(1, 7))
            log = (job / "train.log").read_text()
            assert [log.count(f"epoch {epoch:>3}/6") for epoch in (1, 6)] == [1, 1]  # no epoch is trained twice
            shown = [f"{value:.2f}" for value in trial.intermediate_values.values()]
            assert shown == re.findall(r"val neg. ELBO (\S+)", log)
    best = min((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: t.value)
    assert f"best  neg_elbo {best.value:.2f}  optimizer.lr={best.params['optimizer.lr']}" in text
    again = run(*args, cwd=tmp_path)
    assert not re.search(r"epoch +\d", again) and len(load_study(folder).trials) == 5


def test_a_pruned_job_is_reported_kept_and_counted(tmp_path: Path, data: str) -> None:
    words = [*SEARCH, data, "optimizer.lr=choice(1e-9)"]  # too small to learn anything
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / ".betavae").write_text("a sweep of betavae\n")
    study = search.open_study(make_settings(f"sqlite:///{tmp_path}/study/study.db"), 2)
    for _ in range(search.STARTUP_TRIALS):
        tell_trial(study, [300.0, 200.0])
    text = run(*words, "hydra.sweeper.n_trials=1", cwd=tmp_path, code=1)
    (folder,) = (tmp_path / "study").glob("*/")
    found = read_metrics(folder)
    assert (found["status"], found["epochs"], "test" in found, "error" in found) == ("pruned", 1, False, False)
    assert (folder / "checkpoints" / "last.ckpt").exists() and "Traceback" not in text + (
        folder / "train.log"
    ).read_text()
    trial = study.trials[-1]
    assert trial.state == TrialState.PRUNED and trial.value == trial.intermediate_values[1] > 300
    assert f"pruned  after epoch 1, with a validation neg_elbo of {trial.value:.2f}" in text
    assert "1 jobs: 1 pruned" in text and "failed:" not in text
    before = (folder / "metrics.json").stat().st_mtime_ns
    text = run(*words, "hydra.sweeper.n_trials=2", cwd=tmp_path, code=1)  # the same settings are drawn again
    assert f"{folder.name} is already pruned" in text and (folder / "metrics.json").stat().st_mtime_ns == before
    assert [t.state.name for t in study.trials[-2:]] == ["PRUNED", "PRUNED"]
    table = report.format_markdown(results.group_jobs(tmp_path / "study"))
    assert "0/1 (1 pruned)" in table and "1 jobs: 1 pruned." in table.splitlines()


@pytest.mark.slow
def test_parallel_jobs_report_to_the_study(tmp_path: Path, data: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / ".betavae").write_text("a sweep of betavae\n")
    study = search.open_study(make_settings(f"sqlite:///{tmp_path}/study/study.db"), 2)
    for _ in range(search.STARTUP_TRIALS):
        tell_trial(study, [530.0, 500.0])
    for lr in (1e-9, 1e-2, 1e30):
        study.enqueue_trial({"optimizer.lr": lr})
    words = [*SEARCH, data, "hydra/launcher=joblib", "optimizer.lr=choice(1e-9,1e-2,1e30)"]
    words += ["hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=3", "hydra.launcher.n_jobs=2"]
    text = fresh(TRAIN, *words, cwd=tmp_path)
    assert [t.state.name for t in study.trials[-3:]] == ["PRUNED", "COMPLETE", "FAIL"], text
    assert [len(t.intermediate_values) for t in study.trials[-3:]] == [1, 2, 0]
    assert "3 jobs: 1 finished, 1 diverged, 1 pruned" in text and "Warning" not in text


def test_two_objectives_give_a_pareto_front(tmp_path: Path, data: str) -> None:
    words = ["hydra.sweeper.n_trials=3", "hydra.sweeper.pruner=hyperband", "callbacks.monitor=kl", *SMALL, *ONE, data]
    words += ["optimizer.lr=choice(1e-3)", "trainer.max_epochs=2"]
    text = run(*documented("objectives"), *words, cwd=tmp_path)
    assert text.startswith(
        "no trial is pruned: a pruner needs a single validation metric, and the objectives are recon"
    )
    folder = tmp_path / "runs/sweeps/front"
    study = load_study(folder)
    assert study.metric_names == ["recon", "kl"] and len(study.trials) == 3
    for trial in study.trials:
        job = find_job(folder, f"beta_{trial.params['beta']},")
        lines = re.findall(r"val neg. ELBO (\S+)", (job / "train.log").read_text())
        validation = read_metrics(job)["validation"]
        assert trial.values == [validation["recon"], validation["kl"]]
        assert f"{validation['recon'] + validation['kl']:.2f}" in lines  # of the same epoch
    run("sweep=runs/sweeps/front", "out=report", cwd=tmp_path, script="scripts/sweep_report.py")
    assert (tmp_path / "report" / "pareto.png").stat().st_size > 5000
    lines = (tmp_path / "report" / "table.md").read_text().split("Pareto front of validation recon and ")[1]
    front = sorted(study.best_trials, key=lambda trial: trial.values)
    assert re.findall(r"^\d\. (\S+) and (\S+): ", lines, re.MULTILINE) == [
        (f"{trial.values[0]:.2f}", f"{trial.values[1]:.2f}") for trial in front
    ]
    error = run(*documented("objectives"), *words, "hydra.sweeper.objectives=[kl,seconds]", cwd=tmp_path, code=1)
    assert "has hydra.sweeper.objectives=['recon', 'kl'], and this search has" in error


def test_validation_metrics_are_those_of_the_best_checkpoint(tmp_path: Path, data: str) -> None:
    # The KL is smallest before the model learns, so the first epoch is the best.
    words = [
        *SMALL,
        *ONE,
        data,
        "hydra.run.dir=run",
        "callbacks.monitor=kl",
        "trainer.max_epochs=4",
        "optimizer.lr=0.01",
    ]
    run(*words, cwd=tmp_path)
    validation = read_metrics(tmp_path / "run")["validation"]
    elbos = [float(x) for x in re.findall(r"val neg. ELBO (\S+)", (tmp_path / "run" / "train.log").read_text())]
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["epoch"]
    assert best < 3 and len({*elbos}) == 4
    assert validation["neg_elbo"] == pytest.approx(elbos[best], abs=0.006)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data.validation_size=0", "data.validation_size=0 is invalid: expected validation images"),
        (
            "hydra.sweeper.pruner=hyper",
            "hydra.sweeper.pruner=hyper is invalid: expected one of quartile, median, hyperband, none",
        ),
        (
            "hydra.sweeper.objectives=[a,b,c]",
            "is invalid: expected a list of 1 to 2 values",
        ),
        (
            "hydra.sweeper.objectives=[klx]",
            "hydra.sweeper.objectives=klx is invalid: expected one of loss, recon, kl, neg_elbo, active_units, "
            "seconds, parameters; did you mean kl?",
        ),
        ("hydra.sweeper.objectives=[klx] hydra.sweep.dir=new/sweep", "hydra.sweeper.objectives=klx is invalid"),
        ("callbacks.monitor=total_correlation", "callbacks.monitor=total_correlation is invalid: expected one"),
        ("trainer.check_val_every_n_epoch=5", "its trials never validate (trainer.check_val_every_n_epoch=5 is above"),
        ("trainer.max_steps=1", "its trials never validate (trainer.max_steps=1 ends it before the first validation,"),
        ("hydra.sweeper.n_trials=0", "hydra.sweeper.n_trials=0 is invalid: expected an integer > 0"),
        ("optimizer.lr=1e-3", "hydra.sweeper.params: no setting is searched"),
        ("optimizer.lrr=interval(0,1)", "optimizer.lrr is not a setting"),
        ("hydra.sweeper.storage=nosql://x", "hydra.sweeper.storage=nosql://x is not a storage of Optuna"),
    ],
)
def test_invalid_searches_are_rejected_before_any_file(tmp_path: Path, data: str, words: str, message: str) -> None:
    text = run(*SEARCH, *words.split(), data, cwd=tmp_path, code=1)
    assert text.startswith("error: ") and message in text and text.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_search_survives_a_trial_without_a_validation(tmp_path: Path, data: str) -> None:
    """The search cannot know in advance that max_time ends a training before its validation."""

    def slow() -> None:
        def step(*args: Any) -> Any:
            time.sleep(0.2)
            return real(*args)

        real, VAEModule.training_step = VAEModule.training_step, step  # type: ignore[method-assign]

    stop = ["trainer.check_val_every_n_epoch=2", "trainer.limit_train_batches=20", "trainer.max_time=00:00:00:01"]
    words = [*SEARCH, data, "hydra.sweeper.n_trials=2", "optimizer.lr=choice(1e-3,1e-2)"]
    text = run(*words, *stop, cwd=tmp_path, code=1, prepare=slow)
    study = load_study(tmp_path / "study")
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 2
    for number in (0, 1):
        assert f"trial {number} counts as failed: it ended before its first validation, so it has no" in text
    assert "error: no trial of this search has finished" in text and "Traceback" not in text
    text = run("sweep=study", cwd=tmp_path, script="scripts/sweep_report.py")
    assert "2 jobs: 2 finished" in text


def test_a_study_has_one_config_and_one_search_space(tmp_path: Path, data: str) -> None:
    words = [*SEARCH, data, "hydra.sweeper.n_trials=1", "optimizer.lr=choice(1e-3)"]
    words[words.index("hydra.sweep.dir=study")] = "hydra.sweep.dir=study2"
    run(*words, cwd=tmp_path)
    text = run(*words, "beta=4", cwd=tmp_path, code=1)
    assert "error: the study in study2 has beta=1.0, and this search has beta=4; choose another hydra.sweep.dir" in text
    text = run(*words, "optimizer.lr=choice(1,2)", "hydra.sweeper.n_trials=2", cwd=tmp_path, code=1)
    assert "error: the study in study2 has searched other values (" in text
    with sqlite3.connect(tmp_path / "study2" / "study.db") as file:
        file.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
    text = run(*words, cwd=tmp_path, code=1)
    assert "was made by an older Optuna; upgrade it by `optuna storage upgrade --storage sqlite:///study2/" in text
