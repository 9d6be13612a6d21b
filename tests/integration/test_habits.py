"""What users of Lightning, Hydra and other templates type works, or its error says what to type instead."""

import json
import re

import pytest
import torch
import yaml

from betavae.runtime.hydra_config import translate_arguments
from betavae.runtime.run_folder import MARKER_FILE, RUN
from tests.commands import TINY, run

ONE = [*TINY, "trainer.max_epochs=1", "trainer.limit_train_batches=2", "callbacks=none", "logger=none"]


@pytest.fixture(scope="module")
def first(workdir):
    """A run folder with characters that shells and Hydra treat specially."""
    folder = workdir / "my [run] #1=é (x)"
    run(*ONE, f"hydra.run.dir={folder.name}", "tags=[paper,first]", cwd=workdir)
    return folder


@pytest.mark.parametrize(
    ("typed", "translated"),
    [
        ("beta=1,2 -m seed=1", "-m beta=1,2 seed=1"),
        ("beta=1 --multirun", "--multirun beta=1"),
        ("+experiment=tutorial +trainer=fast", "experiment=tutorial trainer=fast"),
        ("logger=null callbacks=[] logger=False", "logger=none callbacks=none logger=none"),
        ("ckpt_path=runs/a", "resume=runs/a"),
        ("trainer.profiler=simple", "++trainer.profiler=simple"),
        ("+trainer.sync_batchnorm=true +trainer.max_epochs=2", "++trainer.sync_batchnorm=true trainer.max_epochs=2"),
        ("trainer.profilr=simple +model.x=1 ~optimizer.fused", "trainer.profilr=simple +model.x=1 ~optimizer.fused"),
        ("--prior=flow --trainer.profiler=simple", "prior=flow ++trainer.profiler=simple"),
        ("--cfg=job --config-name=train", "--cfg=job --config-name=train"),
        ("--cfg job model.hidden_dims=[1,2]", "--cfg job model.hidden_dims=[1,2]"),
        ("data.root=a[1] name=x#1 runs=a,b", 'data.root="a[1]" name="x#1" runs=a,b'),
        ("""data.root="a[1]" runs=${name}""", """data.root="a[1]" runs=${name}"""),
    ],
)
def test_habits_are_translated(typed, translated):
    assert translate_arguments(typed.split()) == translated.split()


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["train=false"], "evaluate a finished run by `python scripts/evaluate.py ckpt=RUN_FOLDER`"),
        (["test=false"], "trainer.limit_test_batches=1"),
        (["ckpt=x"], "resume=RUN_FOLDER"),
        (["debug=true"], "expected one of fdr, limit, overfit, profiler; traceback=true"),
        (["tags=dev"], "expected a list"),
        (["trainer.logger=false"], "pass logger=csv, tensorboard, ..., or none"),
        (["trainer.default_root_dir=x"], "pass runs=FOLDER"),
        (["trainer.profilr=simple"], "did you mean trainer.profiler?"),
        (["trainer.profiler=fast"], "expected one of simple, advanced, pytorch"),
        (["trainer.precision=8"], "expected one of 32-true"),
        (["+logger.mine={}"], "expected one of tensorboard, csv, wandb, mlflow"),
        (["init=data", "init_from=x"], "init=data is invalid with init_from"),
        (["init_from=nothing"], "init_from: nothing does not exist"),
    ],
)
def test_an_error_says_what_to_type(workdir, words, remedy):
    assert remedy in run(*words, cwd=workdir, code=1)


def test_fast_dev_run_tries_everything_and_leaves_nothing(workdir, tmp_path, data_root):
    output = run(*TINY, f"data.root={data_root}", "debug=fdr", "callbacks.early_stopping_patience=1", cwd=tmp_path)
    assert "epoch   1/1" in output and "1,000 of 10,000 test images" in output
    assert output.splitlines()[-1].startswith("fast_dev_run: training, validation and test ran")
    assert not list(tmp_path.iterdir())
    run(*TINY, f"data.root={data_root}", "trainer.fast_dev_run=2", "model.latent_dim=0", cwd=tmp_path, code=1)
    assert not list(tmp_path.iterdir())


def test_fast_dev_run_keeps_what_a_folder_held(tmp_path, data_root):
    folder = tmp_path / "earlier"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / MARKER_FILE).write_text(RUN)  # a run without its settings
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"weights of an earlier run")
    run(*TINY, f"data.root={data_root}", "debug=fdr", "hydra.run.dir=earlier", cwd=tmp_path)
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == b"weights of an earlier run"


def test_a_run_continues_from_a_file_or_folder_of_any_name(workdir, first):
    for number, words in enumerate(([f"resume={first.name}"], [f"ckpt_path={first.name}/checkpoints/last.ckpt"])):
        assert f"epoch   {number + 2}/" in run(*words, f"trainer.max_epochs={number + 2}", cwd=workdir)
    error = run(f"resume={first.name}/checkpoints/best.ckpt", cwd=workdir, code=1)
    assert "continues from checkpoints/last.ckpt" in error and "init_from=" in error


def test_init_from_starts_with_the_weights(workdir, first):
    found = ["optimizer=sgd", "optimizer.lr=1e-12", f"init_from={first.name}", "hydra.run.dir=tuned"]
    run(*ONE, *found, cwd=workdir)
    old, new = (
        torch.load(f / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"] for f in (first, workdir / "tuned")
    )
    assert all(torch.allclose(old[key], new[key], atol=1e-8) for key in old)
    error = run(*ONE, f"init_from={first.name}", "model.latent_dim=4", cwd=workdir, code=1)
    assert "its model has latent_dim=3, and this run's latent_dim=4" in error


def test_tags_are_in_metrics_and_config(first):
    assert json.loads((first / "metrics.json").read_text())["tags"] == ["paper", "first"]
    assert yaml.safe_load((first / "config.yaml").read_text())["tags"] == ["paper", "first"]


def test_the_profiler_shows_its_table(workdir):
    assert "run_training_batch" in run(*ONE, "trainer.profiler=simple", "debug=fdr", cwd=workdir)


@pytest.mark.parametrize("precision", ["32", "bf16", "64"])
def test_short_names_of_precisions_work(workdir, precision):
    assert "neg. ELBO" in run(*ONE, f"trainer.precision={precision}", "debug=fdr", cwd=workdir)


@pytest.mark.parametrize("name", ["RAdam", "RMSprop", "Adafactor"])
def test_an_optimizer_gets_only_its_own_arguments(workdir, name):
    assert "neg. ELBO" in run(*ONE, f"optimizer.name={name}", "debug=fdr", cwd=workdir)
    if name == "RMSprop":
        typed = run(*ONE, f"optimizer.name={name}", "optimizer.fused=true", cwd=workdir, code=1)
        assert "RMSprop does not take" in typed


def test_early_stopping_and_limits_are_reported(workdir):
    stop = ["optimizer=sgd", "optimizer.lr=1e-12", "callbacks.early_stopping_patience=1", "trainer.max_epochs=5"]
    output = run(*TINY, *stop, "callbacks.figures_every_n_epochs=0", cwd=workdir)
    assert re.search(r"early stopping: val/neg_elbo has not been below \d+\.\d\d in the last 1 validations", output)
    assert "(2,000 of 10,000 test images, " in output
    finished = run(*ONE, "trainer.limit_test_batches=1.0", cwd=workdir)
    assert "early stopping" not in finished and "test images" not in finished
