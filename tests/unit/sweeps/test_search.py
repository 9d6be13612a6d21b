from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from betavae.errors import TrialPruned, UserError
from betavae.sweeps import search
from betavae.sweeps.figures import find_pareto_front
from betavae.sweeps.pruning import PruningCallback, make_pruning_callbacks
from tests.commands import REPO

optuna = pytest.importorskip("optuna")
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402

LOADER = SimpleNamespace()  # only a glob uses it


def make_settings(storage: str, **changes: object) -> search.SearchSettings:
    """Return the settings of `sweep=optuna` with changes."""
    with initialize_config_dir(str(REPO / "configs"), version_base="1.3"):
        cfg = compose("train", ["sweep=optuna", f"hydra.sweeper.storage={storage}"], return_hydra_config=True)
    return search.parse_search_settings(cfg.hydra).model_copy(update=changes)


def test_overrides_are_parsed_into_distributions() -> None:
    typed = ["sweep=optuna", "beta=4", "optimizer.lr=tag(log,interval(1e-4,1e-2))", "a=int(interval(2,9))"]
    typed += ["b=interval(0,1)", "c=choice([128],[256,64],x,0.5)", "d=1,2", "e=range(1,10,4)", "f=range(0.5,2,0.5)"]
    typed += ["beta=interval(1,2)", "g=interval(0,1)", "g=0.5", "+callbacks.custom.x=choice(1,2)"]
    fixed, searched = search.parse_search_space(typed, LOADER)
    assert fixed == ["sweep=optuna", "g=0.5"]
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
    for invalid in ("x=interval(2,1)", "x=tag(log,interval(0,1))"):
        with pytest.raises(UserError, match=r"^x=.* is invalid: expected values that Optuna can search"):
            search.parse_search_space([invalid], LOADER)
    with pytest.raises(UserError, match="no setting is searched"):
        search.parse_search_space(["beta=4"], LOADER)


def tell_trial(study: optuna.Study, curve: list[float]) -> None:
    """Add a finished trial with an objective after each epoch."""
    trial = study.ask()
    for epoch, value in enumerate(curve, start=1):
        trial.report(value, epoch)
        trial.should_prune()  # records that the trial has reached a rung of Hyperband
    study.tell(trial, min(curve))


def train_epochs(callback: PruningCallback, values: list[float], max_epochs: int) -> list[int]:
    """Call the callback as a trainer does, and return the epochs that are trained."""
    trainer = SimpleNamespace(should_stop=False, callback_metrics={})
    callback.on_train_start(trainer, None)
    done = []
    for epoch in range(max_epochs):
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
        ("median", [10.0, 9.0, 8.0, 9.0], [1, 2, 3, 4]),  # worse at its end, where pruning saves nothing
        ("quartile", [9.5, 8.5, 7.75, 7.0], [1, 2, 3]),  # the quartiles are 9.5, 8.5, 7.5, 6.5
        ("quartile", [10.0, 8.0, 7.0, 6.0], [1]),
        ("quartile", [9.5, 8.5, 7.5, 6.5], [1, 2, 3, 4]),
    ],
)
def test_a_trial_is_pruned_if_it_is_worse_than_the_percentile(tmp_path, pruner, values, trained) -> None:
    chosen = make_settings(f"sqlite:///{tmp_path}/study.db", pruner=pruner)
    assert make_settings("x").pruner == "quartile" and (chosen.objectives, chosen.n_trials) == (["neg_elbo"], 30)
    study = search.open_study(chosen, 4)
    for offset in (-2.0, -0.5, 0.5, 2.0, 0.5)[: search.STARTUP_TRIALS]:
        tell_trial(study, [10.0 + offset, 9.0 + offset, 8.0 + offset, 7.0 + offset])
    trial = study.ask()
    callback = PruningCallback(chosen, trial.number, 4)
    assert train_epochs(callback, values, 4) == trained
    assert study.trials[trial.number].intermediate_values == dict(zip(trained, values, strict=False))
    if trained == [1, 2, 3, 4]:
        callback.on_train_end(None, None)
    else:
        with pytest.raises(TrialPruned, match=f"after epoch {trained[-1]}, with a validation neg_elbo of"):
            callback.on_train_end(None, None)


def test_a_resumed_job_does_not_report_an_epoch_twice(tmp_path, recwarn) -> None:
    chosen = make_settings(f"{tmp_path}/study.log")  # a journal
    study = search.open_study(chosen, 4)
    trial = study.ask()
    assert train_epochs(PruningCallback(chosen, trial.number, 4), [10.0, 9.0], 2) == [1, 2]
    assert train_epochs(PruningCallback(chosen, trial.number, 4), [10.5, 9.5, 8.0, 7.0], 4) == [1, 2, 3, 4]
    assert study.trials[0].intermediate_values == {1: 10.0, 2: 9.0, 3: 8.0, 4: 7.0}
    assert not list(recwarn) and (tmp_path / "study.log").is_file()
    with pytest.raises(UserError, match="has no trial 7"):
        PruningCallback(chosen, 7, 4).on_train_start(None, None)


@pytest.mark.slow
def test_hyperband_prunes_at_its_rungs(tmp_path) -> None:
    chosen = make_settings(f"sqlite:///{tmp_path}/study.db", pruner="hyperband")
    study = search.open_study(chosen, 9)
    for _ in range(12):
        tell_trial(study, [1.0] * 9)
    # The rungs of a trial depend on its number; the worst value passes none of them.
    ends = {train_epochs(PruningCallback(chosen, study.ask().number, 9), [2.0] * 9, 9)[-1] for _ in range(6)}
    assert {1, 4} <= ends <= {1, 4, 9}


@pytest.mark.parametrize("changes", [{"pruner": "none"}, {"objectives": ["recon", "kl"]}, {"objectives": ["seconds"]}])
def test_other_searches_and_plain_runs_are_not_pruned(tmp_path, changes) -> None:
    chosen = make_settings(f"sqlite:///{tmp_path}/study.db", **changes)
    study = search.open_study(chosen, 4)
    assert isinstance(study.pruner, optuna.pruners.NopPruner) and len(study.directions) == len(chosen.objectives)
    cfg = OmegaConf.create({"sweeper": {"trial": 0} | chosen.model_dump()})
    assert make_pruning_callbacks(cfg, 4) == []
    cfg.sweeper.update({"pruner": "median", "objectives": ["kl"]})
    assert len(make_pruning_callbacks(cfg, 4)) == 1
    cfg.sweeper.trial = None  # a plain run
    assert make_pruning_callbacks(cfg, 4) == []


def test_the_pareto_front_agrees_with_optuna() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    points = torch.randint(0, 12, (60, 2)).double().tolist()
    for values in points:
        study.add_trial(optuna.trial.create_trial(values=values))
    assert sorted(points[i] for i in find_pareto_front(points)) == sorted(trial.values for trial in study.best_trials)
