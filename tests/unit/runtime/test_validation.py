"""Settings that need validation metrics are rejected before a run that will have none."""

import json

import numpy as np
import pytest
import torch

from betavae.module import VAEModule
from betavae.runtime.builders import build_data
from betavae.runtime.hydra_config import to_plain
from betavae.runtime.training import module_arguments
from betavae.runtime.validation import METRICS, objective_terms
from tests.commands import TINY, run
from tests.unit.runtime.test_configs import composed

# 40 images to train on: 10 batches.
SMALL = [*TINY, "data=arrays", "data.root=images.npy", "data.test_size=9", "data.validation_size=11"]
SMALL += ["data.batch_size=4", "callbacks.figures_every_n_epochs=0", "trainer.limit_train_batches=1.0"]
SMALL += ["trainer.limit_val_batches=1.0", "trainer.limit_test_batches=1.0", "hydra.run.dir=run"]


@pytest.fixture(autouse=True)
def images(tmp_path):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (60, 6, 5), dtype=np.uint8))


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ([], 10),
        (["trainer.accumulate_grad_batches=3", "trainer.val_check_interval=7"], 3),
        (["trainer.check_val_every_n_epoch=2", "trainer.overfit_batches=3"], 6),
        (["trainer.steps_per_batch=3"], 10),
        (["trainer.steps_per_batch=3", "trainer.val_check_interval=0.5"], 4),
        (["trainer.steps_per_batch=2", "trainer.accumulate_grad_batches=2"], 5),
    ],
)
def test_the_first_validation_is_predicted(tmp_path, settings, first):
    """A run with `first` steps validates; with one step less it is rejected."""
    asked = "callbacks.early_stopping_patience=9"
    text = run(*SMALL, *settings, asked, f"trainer.max_steps={first - 1}", cwd=tmp_path, code=1)
    said = f"trainer.max_steps={first - 1} ends it before the first validation, which {first} steps would reach"
    assert text == f"error: {asked} is invalid: this run never validates ({said})\n"
    assert [path.name for path in tmp_path.iterdir()] == ["images.npy"]
    for steps in (first - 1, first):
        where = [f"trainer.max_steps={steps}", f"hydra.run.dir=run{steps}"]
        run(*SMALL, *settings, *where, *([asked] if steps == first else []), cwd=tmp_path)
        record = json.loads((tmp_path / f"run{steps}" / "metrics.json").read_text())
        assert record["steps"] == steps and ("validation" in record) == (steps == first)


def test_overfit_batches_does_not_limit_the_test(tmp_path):
    overfit = ["trainer.overfit_batches=0.5", "data.validation_size=0", "data.eval_batch_size=9"]  # one test batch
    run(*SMALL, *overfit, "trainer.max_epochs=1", cwd=tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("trainer.check_val_every_n_epoch=5 callbacks.monitor=kl", "callbacks.monitor=kl is invalid: this run never"),
        (
            "trainer.val_check_interval=11",
            "trainer.val_check_interval=11 is invalid: expected at most 10, the training",
        ),
        (
            "trainer.val_check_interval=5 trainer.steps_per_batch=3",
            "expected at most 4, the training batches of an epoch (of 3 steps each, by trainer.steps_per_batch)",
        ),
        ("trainer.limit_train_batches=0.05", "trainer.limit_train_batches=0.05 is invalid: expected a larger share"),
        ("trainer.limit_val_batches=0.5", "trainer.limit_val_batches=0.5 is invalid: expected a larger share, this is"),
        ("trainer.limit_test_batches=0.5", "trainer.limit_test_batches=0.5 is invalid: expected a larger share"),
        (
            "callbacks.monitor=neg_elb",
            "callbacks.monitor=neg_elb is invalid: expected one of loss, recon, kl, neg_elbo, active_units; did you "
            "mean neg_elbo?",
        ),
        ("objective=beta_tcvae callbacks.monitor=total", "mutual_information, total_correlation, dimension_wise_kl"),
    ],
)
def test_settings_without_effect_are_one_line_errors(tmp_path, settings, said):
    text = run(*SMALL, *settings.split(), cwd=tmp_path, code=1)
    assert text.startswith("error: ") and text.count("\n") == 1 and said in text
    assert [path.name for path in tmp_path.iterdir()] == ["images.npy"]


def test_objective_terms_are_known_and_change_no_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "objective=beta_tcvae",
        "data=arrays",
        "data.root=images.npy",
        "data.test_size=9",
        "data.validation_size=11",
    ]
    settings = to_plain(composed(*words, "data.batch_size=4"))
    datamodule = build_data(settings["data"])
    module = VAEModule(**module_arguments(settings, datamodule))
    assert set(objective_terms(datamodule.splits["validation"], module)) >= set(METRICS[:-1])
    states = []
    for monitor in ("neg_elbo", "total_correlation"):
        where = f"hydra.run.dir={monitor}"
        run(*SMALL[:-1], "objective=beta_tcvae", f"callbacks.monitor={monitor}", where, cwd=tmp_path)
        states.append(torch.load(tmp_path / monitor / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
