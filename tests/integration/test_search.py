"""Searches: what is proposed, what is pruned, what goes on after a kill, and what one or two objectives come to."""

import json
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from betavae.errors import TrialPruned, UserError
from betavae.module import VAEModule
from betavae.runtime.hydra_config import safe_name
from betavae.sweeps import jobs, pareto, report, search
from betavae.sweeps.pruning import PruningCallback, pruning_callbacks
from tests.commands import REPO, Child, fresh, run, wait_for

optuna = pytest.importorskip("optuna")
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

SMALL = [
    "trainer=smoke",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "callbacks.figures_every_n_epochs=0",
]
SMALL += ["trainer.limit_test_batches=1", "data.validation_size=200"]
# Replaces the shipped space: a later word on a key wins, and a plain value takes it out of the search.
ONE = ["model.latent_dim=3", "model.hidden_dims=[16]"]
SEARCH = ["-m", "sweep=optuna", *SMALL, *ONE, "hydra.sweep.dir=study"]
LOADER = SimpleNamespace()  # which nothing but a glob asks


@pytest.fixture(scope="module")
def data(data_root: str) -> str:
    return f"data.root={data_root}"


def readme(part: str) -> list[str]:
    """The arguments of the command with this in it, of the page on sweeps."""
    lines = (REPO / "docs" / "sweeps.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(("python ", "optuna ")) and part in line]
    return shlex.split(line)[2 if line.startswith("python") else 1 :]


def record(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="betavae", storage=f"sqlite:///{folder}/study.db")


def settings(storage: str, **changes: object) -> search.SearchSettings:
    """Those of the shipped search."""
    with initialize_config_dir(str(REPO / "configs"), version_base="1.3"):
        cfg = compose("train", ["sweep=optuna", f"hydra.sweeper.storage={storage}"], return_hydra_config=True)
    return search.search_settings(cfg.hydra).model_copy(update=changes)


def test_what_is_searched_is_what_was_written() -> None:
    typed = ["sweep=optuna", "beta=4", "optimizer.lr=tag(log,interval(1e-4,1e-2))", "a=int(interval(2,9))"]
    typed += ["b=interval(0,1)", "c=choice([128],[256,64],x,0.5)", "d=1,2", "e=range(1,10,4)", "f=range(0.5,2,0.5)"]
    typed += ["beta=interval(1,2)", "g=interval(0,1)", "g=0.5", "+callbacks.custom.x=choice(1,2)"]
    fixed, searched = search.search_space(typed, LOADER)
    assert fixed == ["sweep=optuna", "g=0.5"], "the later word on a key wins"
    assert searched == {
        "beta": FloatDistribution(1.0, 2.0),
        "optimizer.lr": FloatDistribution(1e-4, 1e-2, log=True),
        "a": IntDistribution(2, 9),
        "b": FloatDistribution(0.0, 1.0),
        "c": CategoricalDistribution(["[128]", "[256,64]", "x", 0.5]),
        "d": CategoricalDistribution([1, 2]),
        "e": IntDistribution(1, 9, step=4),
        "f": FloatDistribution(0.5, 1.5, step=0.5),
        "+callbacks.custom.x": CategoricalDistribution([1, 2]),
    }
    for wrong in ("x=interval(2,1)", "x=tag(log,interval(0,1))"):
        with pytest.raises(UserError, match=r"^x=.* cannot be searched \("):
            search.search_space([wrong], LOADER)
    with pytest.raises(UserError, match="nothing is searched"):
        search.search_space(["beta=4"], LOADER)


def told(study: optuna.Study, curve: list[float]) -> None:
    """A finished trial with these numbers after its epochs."""
    trial = study.ask()
    for epoch, value in enumerate(curve, start=1):
        trial.report(value, epoch)
        trial.should_prune()  # which notes who has come to a rung of Hyperband
    study.tell(trial, min(curve))


def epochs(callback: PruningCallback, values: list[float], most: int) -> list[int]:
    """The epochs that are trained if these are their numbers, as a trainer would call."""
    trainer = SimpleNamespace(should_stop=False, callback_metrics={})
    callback.on_train_start(trainer, None)
    done = []
    for epoch in range(most):
        trainer.current_epoch, trainer.callback_metrics = epoch, {"val/neg_elbo": torch.tensor(values[epoch])}
        callback.on_validation_end(trainer, None)
        callback.on_train_epoch_end(trainer, None)
        done.append(epoch + 1)
        if trainer.should_stop:
            break
    return done


@pytest.mark.parametrize(
    ("pruner", "values", "trained"),
    [
        ("median", [10.0, 9.0, 8.0, 7.0], [1, 2, 3, 4]),
        ("median", [10.0, 9.25, 8.75, 7.0], [1, 2, 3]),  # the medians are 10.5, 9.5, 8.5, 7.5
        ("median", [11.0, 9.0, 8.0, 7.0], [1]),
        ("median", [10.0, 9.0, 8.0, 9.0], [1, 2, 3, 4]),  # hopeless at its end, where there is nothing left to spare
        ("quartile", [9.5, 8.5, 7.75, 7.0], [1, 2, 3]),  # the quartiles are 9.5, 8.5, 7.5, 6.5
        ("quartile", [10.0, 8.0, 7.0, 6.0], [1]),
        ("quartile", [9.5, 8.5, 7.5, 6.5], [1, 2, 3, 4]),
    ],
)
def test_a_trial_ends_where_it_is_worse_than_a_share_of_those_that_finished(tmp_path, pruner, values, trained) -> None:
    chosen = settings(f"sqlite:///{tmp_path}/study.db", pruner=pruner)
    assert settings("x").pruner == "quartile" and (chosen.objectives, chosen.n_trials) == (["neg_elbo"], 30)
    study = search.open_study(chosen, 4)
    for offset in (-2.0, -0.5, 0.5, 2.0, 0.5)[: search.STARTUP_TRIALS]:
        told(study, [10.0 + offset, 9.0 + offset, 8.0 + offset, 7.0 + offset])
    trial = study.ask()
    callback = PruningCallback(chosen, trial.number, 4)
    assert epochs(callback, values, 4) == trained
    assert study.trials[trial.number].intermediate_values == dict(zip(trained, values, strict=False))
    if trained == [1, 2, 3, 4]:
        callback.on_train_end(None, None)
    else:
        with pytest.raises(TrialPruned, match=f"after epoch {trained[-1]}, with a validation neg_elbo of"):
            callback.on_train_end(None, None)


def test_what_a_killed_job_had_told_stands_and_is_not_told_twice(tmp_path, recwarn) -> None:
    chosen = settings(f"{tmp_path}/study.log")  # a journal
    study = search.open_study(chosen, 4)
    trial = study.ask()
    assert epochs(PruningCallback(chosen, trial.number, 4), [10.0, 9.0], 2) == [1, 2]
    assert epochs(PruningCallback(chosen, trial.number, 4), [10.5, 9.5, 8.0, 7.0], 4) == [1, 2, 3, 4]
    assert study.trials[0].intermediate_values == {1: 10.0, 2: 9.0, 3: 8.0, 4: 7.0}
    assert not list(recwarn) and (tmp_path / "study.log").is_file()
    with pytest.raises(UserError, match="does not know trial 7 here"):
        PruningCallback(chosen, 7, 4).on_train_start(None, None)


def test_hyperband_halves_by_the_epochs_of_a_run(tmp_path) -> None:
    chosen = settings(f"sqlite:///{tmp_path}/study.db", pruner="hyperband")
    study = search.open_study(chosen, 9)
    for _ in range(12):
        told(study, [1.0] * 9)
    # Which rungs a trial meets depends on its number; it is past none of them with the worst value.
    ends = {epochs(PruningCallback(chosen, study.ask().number, 9), [2.0] * 9, 9)[-1] for _ in range(6)}
    assert {1, 4} <= ends <= {1, 4, 9}


@pytest.mark.parametrize("changes", [{"pruner": "none"}, {"objectives": ["recon", "kl"]}, {"objectives": ["seconds"]}])
def test_what_does_not_prune(tmp_path, changes) -> None:
    chosen = settings(f"sqlite:///{tmp_path}/study.db", **changes)
    study = search.open_study(chosen, 4)
    assert isinstance(study.pruner, optuna.pruners.NopPruner) and len(study.directions) == len(chosen.objectives)
    cfg = OmegaConf.create({"sweeper": {"trial": 0} | chosen.model_dump()})
    assert pruning_callbacks(cfg, 4) == []
    cfg.sweeper.update({"pruner": "median", "objectives": ["kl"]})
    assert len(pruning_callbacks(cfg, 4)) == 1
    cfg.sweeper.trial = None  # a plain run
    assert pruning_callbacks(cfg, 4) == []


def test_a_search_survives_divergence_and_being_killed(tmp_path: Path, data: str) -> None:
    args = [*readme("n_trials=30"), *SMALL, *ONE, data, "trainer.max_epochs=6", "optimizer=sgd"]
    args += ["hydra.sweeper.n_trials=5", "optimizer.lr=choice(1e-4,1e-5,1e30)", "seed=range(1,1000)"]
    child = Child(*args, cwd=tmp_path)
    wait_for(tmp_path, "runs/sweeps/optuna/*/checkpoints/last.ckpt", child, count=2)
    child.send(signal.SIGKILL)
    child.wait()
    folder = tmp_path / "runs/sweeps/optuna"
    before = study_of(folder).trials
    assert before[-1].state == TrialState.RUNNING
    text = run(*args, cwd=tmp_path)
    assert "Traceback" not in text and "Warning" not in text
    trials = study_of(folder).trials
    assert len(trials) == 5 and [t.params for t in trials[: len(before)]] == [t.params for t in before]
    assert {(t.params["optimizer.lr"] == 1e30, t.state.name) for t in trials} >= {(True, "FAIL"), (False, "COMPLETE")}
    assert all(t.state == TrialState.FAIL for t in trials if t.params["optimizer.lr"] == 1e30)
    optuna_cli = [str(Path(sys.executable).with_name("optuna")), *readme("optuna trials")]
    listed = subprocess.run(optuna_cli, cwd=tmp_path, capture_output=True, text=True).stdout
    assert all(state.name in listed for state in {trial.state for trial in trials})
    for trial in trials:
        lr = safe_name(trial.params["optimizer.lr"])
        (job,) = folder.glob(f"*optimizer.lr_{lr},*,seed_{trial.params['seed']},*")
        assert (
            record(job)["status"] == {"COMPLETE": "finished", "FAIL": "diverged", "PRUNED": "pruned"}[trial.state.name]
        )
        if trial.state == TrialState.COMPLETE:
            assert trial.value == record(job)["validation"]["neg_elbo"]
            assert list(trial.intermediate_values) == list(range(1, 7))
            log = (job / "train.log").read_text()
            assert [log.count(f"epoch {epoch:>3}/6") for epoch in (1, 6)] == [1, 1], "nothing is trained twice"
            shown = [f"{value:.2f}" for value in trial.intermediate_values.values()]
            assert shown == re.findall(r"val neg. ELBO (\S+)", log)
    best = min((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: t.value)
    assert f"best  neg_elbo {best.value:.2f}  optimizer.lr={best.params['optimizer.lr']}" in text
    again = run(*args, cwd=tmp_path)
    assert "epoch" not in again and len(study_of(folder).trials) == 5, "all of them have ended"


def test_a_pruned_job_says_so_is_kept_and_is_counted(tmp_path: Path, data: str) -> None:
    words = [*SEARCH, data, "optimizer.lr=choice(1e-9)"]  # which learns nothing
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / ".betavae").write_text("a sweep of betavae\n")
    study = search.open_study(settings(f"sqlite:///{tmp_path}/study/study.db"), 2)
    for _ in range(search.STARTUP_TRIALS):
        told(study, [300.0, 200.0])
    text = run(*words, "hydra.sweeper.n_trials=1", cwd=tmp_path, code=1)
    (folder,) = (tmp_path / "study").glob("*/")
    found = record(folder)
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
    assert f"{folder.name} is pruned already" in text and (folder / "metrics.json").stat().st_mtime_ns == before
    assert [t.state.name for t in study.trials[-2:]] == ["PRUNED", "PRUNED"]
    table = report.markdown(report.group_jobs(tmp_path / "study"))
    assert "0/1 (1 pruned)" in table and "1 jobs: 1 pruned." in table.splitlines()


def test_jobs_side_by_side_tell_the_study_too(tmp_path: Path, data: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / ".betavae").write_text("a sweep of betavae\n")
    study = search.open_study(settings(f"sqlite:///{tmp_path}/study/study.db"), 2)
    for _ in range(search.STARTUP_TRIALS):
        told(study, [530.0, 500.0])
    for lr in (1e-9, 1e-2, 1e30):
        study.enqueue_trial({"optimizer.lr": lr})
    words = [*SEARCH, data, "hydra/launcher=joblib", "optimizer.lr=choice(1e-9,1e-2,1e30)"]
    words += ["hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=3", "hydra.launcher.n_jobs=2"]
    text = fresh(str(REPO / "train.py"), *words, cwd=tmp_path)
    assert [t.state.name for t in study.trials[-3:]] == ["PRUNED", "COMPLETE", "FAIL"], text
    assert [len(t.intermediate_values) for t in study.trials[-3:]] == [1, 2, 0]
    assert "3 jobs: 1 finished, 1 diverged, 1 pruned" in text and "Warning" not in text


def test_two_objectives_give_a_front(tmp_path: Path, data: str) -> None:
    words = ["hydra.sweeper.n_trials=3", "hydra.sweeper.pruner=hyperband", "callbacks.monitor=kl", *SMALL, *ONE, data]
    words += ["optimizer.lr=choice(1e-3)", "trainer.max_epochs=2"]
    text = run(*readme("objectives"), *words, cwd=tmp_path)
    assert text.startswith("no trial is pruned: after an epoch, recon and kl cannot say which is hopeless\n")
    folder = tmp_path / "runs/sweeps/front"
    study = study_of(folder)
    assert study.metric_names == ["recon", "kl"] and len(study.trials) == 3
    for trial in study.trials:
        (job,) = folder.glob(f"beta_{trial.params['beta']},*")
        lines = re.findall(r"val neg. ELBO (\S+)", (job / "train.log").read_text())
        validation = record(job)["validation"]
        assert trial.values == [validation["recon"], validation["kl"]]
        assert f"{validation['recon'] + validation['kl']:.2f}" in lines, "of one and the same epoch"
    run("sweep=runs/sweeps/front", "out=report", cwd=tmp_path, script="scripts/sweep_report.py")
    assert (tmp_path / "report" / "pareto.png").stat().st_size > 5000
    lines = (tmp_path / "report" / "table.md").read_text().split("Pareto front of validation distortion and ")[1]
    front = sorted(study.best_trials, key=lambda trial: trial.values)
    assert re.findall(r"^\d\. (\S+) and (\S+): ", lines, re.MULTILINE) == [
        (f"{trial.values[0]:.2f}", f"{trial.values[1]:.2f}") for trial in front
    ]
    error = run(*readme("objectives"), *words, "hydra.sweeper.objectives=[kl,seconds]", cwd=tmp_path, code=1)
    assert "is of hydra.sweeper.objectives=['recon', 'kl'], and this search of" in error


def test_the_validation_numbers_are_those_of_the_chosen_checkpoint(tmp_path: Path, data: str) -> None:
    # The KL is smallest before anything is learned: the first epoch is the best, and others come after it.
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
    validation = record(tmp_path / "run")["validation"]
    elbos = [float(x) for x in re.findall(r"val neg. ELBO (\S+)", (tmp_path / "run" / "train.log").read_text())]
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["epoch"]
    assert best < 3 and len({*elbos}) == 4
    assert validation["neg_elbo"] == pytest.approx(elbos[best], abs=0.006)


def test_the_front_is_what_nothing_beats() -> None:
    points = [[1.0, 5.0], [2.0, 3.0], [2.0, 4.0], [3.0, 3.0], [4.0, 1.0], [2.0, 3.0], [5.0, 1.0]]
    assert [points[i] for i in pareto.pareto_indices(points)] == [[1.0, 5.0], [2.0, 3.0], [2.0, 3.0], [4.0, 1.0]]
    study = optuna.create_study(directions=["minimize", "minimize"])
    many = torch.randint(0, 12, (60, 2)).double().tolist()
    for values in many:
        study.add_trial(optuna.trial.create_trial(values=values))
    assert sorted(many[i] for i in pareto.pareto_indices(many)) == sorted(trial.values for trial in study.best_trials)
    (axes,) = pareto.pareto_figure(points, pareto.pareto_indices(points), ("a", "b")).axes
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 5.0], [2.0, 3.0], [2.0, 3.0], [4.0, 1.0]]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "4"]


def test_the_scores_of_a_job() -> None:
    found = {"validation": {"neg_elbo": 100.5, "kl": 20.0}, "test": {"neg_elbo": 1.0}, "seconds": 3.0, "parameters": 7}
    assert jobs.objective_values(found, ["kl", "seconds"]) == [20.0, 3.0] and jobs.objective_values(
        found, ["parameters"]
    ) == [7.0]
    assert jobs.objective_values(found, ["kl", "recon"]) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data.validation_size=0", "a search chooses by validation images"),
        (
            "hydra.sweeper.pruner=hyper",
            "hydra.sweeper.pruner=hyper cannot be: it must be one of quartile, median, hyperband, none",
        ),
        ("hydra.sweeper.objectives=[a,b,c]", r"it must be a list of one or two names"),
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
        ("optimizer.lr=1e-3", "hydra.sweeper.params: nothing is searched"),
        ("optimizer.lrr=interval(0,1)", "optimizer.lrr is not a setting"),
        ("hydra.sweeper.storage=nosql://x", "hydra.sweeper.storage=nosql://x cannot be opened"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_there(
    tmp_path: Path, data: str, words: str, said: str
) -> None:
    text = run(*SEARCH, *words.split(), data, cwd=tmp_path, code=1)
    assert text.startswith("error: ") and said in text and text.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_search_survives_a_trial_without_a_validation(tmp_path: Path, data: str) -> None:
    """What max_time leaves of a training is not known before it."""

    def slow() -> None:
        def step(*args: Any) -> Any:
            time.sleep(0.2)
            return real(*args)

        real, VAEModule.training_step = VAEModule.training_step, step  # type: ignore[method-assign]

    stop = ["trainer.check_val_every_n_epoch=2", "trainer.limit_train_batches=20", "trainer.max_time=00:00:00:01"]
    words = [*SEARCH, data, "hydra.sweeper.n_trials=2", "optimizer.lr=choice(1e-3,1e-2)"]
    text = run(*words, *stop, cwd=tmp_path, code=1, prepare=slow)
    study = study_of(tmp_path / "study")
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 2
    for number in (0, 1):
        assert f"trial {number} counts as failed: it ended before its first validation, so it has no" in text
    assert "error: no trial of this search has finished" in text and "Traceback" not in text
    text = run("sweep=study", cwd=tmp_path, script="scripts/sweep_report.py")
    assert "2 jobs: 2 finished" in text


def test_a_study_is_of_one_setting_and_one_space(tmp_path: Path, data: str) -> None:
    words = [*SEARCH, data, "hydra.sweeper.n_trials=1", "optimizer.lr=choice(1e-3)"]
    words[words.index("hydra.sweep.dir=study")] = "hydra.sweep.dir=study2"
    run(*words, cwd=tmp_path)
    text = run(*words, "beta=4", cwd=tmp_path, code=1)
    assert "error: the study in study2 is of beta=1.0, and this search of beta=4; name another hydra.sweep.dir" in text
    text = run(*words, "optimizer.lr=choice(1,2)", "hydra.sweeper.n_trials=2", cwd=tmp_path, code=1)
    assert "error: the study in study2 searched other values (" in text
    with sqlite3.connect(tmp_path / "study2" / "study.db") as file:
        file.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
    text = run(*words, cwd=tmp_path, code=1)
    assert "is of an older Optuna; bring it up to date by `optuna storage upgrade --storage sqlite:///study2/" in text
