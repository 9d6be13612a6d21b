"""Complete commands: what they print, write and log."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import termios

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands import TINY, Child, run


@pytest.fixture(scope="module")
def smoke(workdir):
    """The folder and the output of a finished smoke run with two latent dimensions."""
    output = run("trainer=smoke", "model.latent_dim=2", "callbacks.figures_every_n_epochs=1", "seed=0", cwd=workdir)
    return workdir / re.search(r"run +(runs/\S+)", output)[1], output


def test_training_prints_epochs_test_and_next_commands(smoke):
    folder, output = smoke
    lines = output.splitlines()
    number = r"-?\d+\.\d\d"
    for epoch, line in enumerate(lines[:2], start=1):
        assert re.fullmatch(
            rf"epoch +{epoch}/2  loss {number}  recon {number}  KL {number}  val neg. ELBO {number}  [\d.]+ s", line
        )
    assert re.match(rf"test  loss {number}  recon {number}  KL {number}  neg. ELBO {number} nats per image", lines[2])
    assert "surrogate" in lines[3]
    assert lines[-2].startswith("next  tensorboard --logdir runs")
    assert lines[-1].split() == ["python", "scripts/sample.py", f"ckpt=runs/{folder.name}/checkpoints/best.ckpt"]
    assert len(lines) == 8  # and nothing from libraries


def test_a_run_folder_has_exactly_these_files(smoke):
    folder, _ = smoke
    assert "=" not in folder.name and folder.name.endswith("_mlp_z2_beta1.0")
    names = {path.name for path in folder.iterdir()}
    assert names - {path.name for path in folder.glob("events.*")} == {
        *(".betavae", ".lock", "config.yaml", "overrides.yaml", "checkpoints", "metrics.json", "train.log", "figures"),
        *("projector_config.pbtxt", "projector"),
    }
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert {path.stem for path in (folder / "figures").iterdir()} == {
        *("samples", "reconstructions", "traversal", "manifold"),
    }
    assert "epoch   2/2" in (folder / "train.log").read_text()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["status"] == "finished" and metrics["seed"] == 0 and metrics["epochs"] == 2
    assert metrics["parameters"] == 784 * 400 + 400 + 400 * 4 + 4 + 2 * 400 + 400 + 400 * 784 + 784
    assert set(metrics["validation"]) == {"loss", "recon", "kl", "neg_elbo", "active_units"}
    assert metrics["checkpoint"] == "checkpoints/best.ckpt"
    test = metrics["test"]
    assert test["neg_elbo"] == pytest.approx(test["recon"] + test["kl"], abs=2e-4)
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["model"]["latent_dim"] == 2


def test_tensorboard_has_curves_figures_and_hparams(smoke):
    folder, _ = smoke
    assert len(list(folder.glob("events.*"))) == 1 and not list(folder.glob("version_*"))
    board = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    board.Reload()
    terms = ("loss", "recon", "kl", "neg_elbo")
    wanted = {f"{split}/{term}" for split in ("train", "val", "test") for term in terms}
    wanted |= {"train/beta", "train/learning_rate", "val/active_units", "test/active_units"}
    assert set(board.Tags()["scalars"]) == wanted
    assert [event.step for event in board.Scalars("train/loss")] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert [event.step for event in board.Scalars("val/neg_elbo")] == [20, 40]
    pictures = {f"pictures/{name}" for name in ("reconstructions", "samples", "traversal", "manifold")}
    assert set(board.Tags()["images"]) == pictures | {"latent/kl_per_dimension"}
    assert len(board.Images("pictures/samples")) == 2
    metadata = board.summary_metadata
    assert {tag for tag in metadata if tag.startswith("_hparams_")} == {
        "_hparams_/session_start_info",
        "_hparams_/session_end_info",
    }
    tensors = (folder / "projector" / "posterior_means" / "tensors.tsv").read_text().splitlines()
    assert len(tensors) == 2000 and len(tensors[0].split("\t")) == 3  # padded: the projector needs three columns
    assert len((folder / "projector" / "posterior_means" / "metadata.tsv").read_text().split()) == 2000


def test_curves_and_metrics_json_agree(smoke):
    folder, output = smoke
    board = EventAccumulator(str(folder))
    board.Reload()
    metrics = json.loads((folder / "metrics.json").read_text())
    for term, value in metrics["test"].items():
        assert board.Scalars(f"test/{term}")[-1].value == pytest.approx(value, rel=1e-4)
    printed = float(re.search(r"epoch +2/2  loss ([\d.]+)", output)[1])
    epoch_2 = [event.value for event in board.Scalars("train/loss")[4:]]
    assert printed == pytest.approx(sum(epoch_2) / 4, abs=0.01)


@pytest.mark.parametrize("script", ["sample", "reconstruct", "interpolate", "traverse", "manifold"])
def test_scripts_need_only_the_checkpoint_and_repeat(workdir, smoke, tmp_path, script):
    checkpoint = tmp_path / "alone.ckpt"
    checkpoint.write_bytes((smoke[0] / "checkpoints" / "best.ckpt").read_bytes())
    pictures = []
    for name in ("a", "b"):
        out = tmp_path / "new folder" / f"{name}.png"
        run(f"ckpt={checkpoint}", f"out='{out}'", cwd=workdir, script=f"scripts/{script}.py")
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]


def test_sample_writes_images_and_a_tensor(workdir, smoke, tmp_path):
    options = ("n=5", "seed=3", f"out={tmp_path}/s.png", "save_images=true", "save_tensor=true")
    output = run(*options, f"runs={smoke[0].parent}", cwd=workdir, script="scripts/sample.py")
    assert str(smoke[0]) in output  # the newest finished run
    images = torch.load(tmp_path / "s.pt", weights_only=True)
    assert images.shape == (5, 1, 28, 28) and images.min() >= 0 and images.max() <= 1
    assert len(list((tmp_path / "s").iterdir())) == 5
    output = run(
        options[0].replace("5", "3"), *options[1:], f"runs={smoke[0].parent}", cwd=workdir, script="scripts/sample.py"
    )
    assert "also holds 2 older files" in output


@pytest.mark.slow
def test_a_run_made_longer_equals_one_long_run(tmp_path, data_root):
    """Two epochs and two more give the weights and test metrics of four epochs."""
    settings = [*TINY, "seed=7", f"data.root={data_root}"]
    run(*settings, "trainer.max_epochs=2", "hydra.run.dir=short", cwd=tmp_path)
    output = run("resume=short", "trainer.max_epochs=4", cwd=tmp_path)
    assert "epoch   3/4" in output and "epoch   1/4" not in output
    run(*settings, "trainer.max_epochs=4", "hydra.run.dir=whole", cwd=tmp_path)
    folders = [tmp_path / name for name in ("short", "whole")]
    one, other = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in folders)
    assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (json.loads((f / "metrics.json").read_text())["test"] for f in folders)
    assert one == other


@pytest.mark.slow
def test_an_epoch_that_is_cut_short_reports_its_own_steps(tmp_path, data_root):
    """An epoch may end by max_steps or by early stopping."""
    tiny = [*TINY, f"data.root={data_root}", "callbacks.figures_every_n_epochs=0"]
    whole = run(*tiny, "trainer.max_epochs=1", "trainer.log_every_n_steps=1", "hydra.run.dir=whole", cwd=tmp_path)
    means = lambda text: re.findall(r"epoch +\d+/\d+  loss ([\d.]+)", text)  # noqa: E731
    losses = [event.value for event in scalars(tmp_path / "whole", "train/loss")]
    assert float(means(whole)[0]) == pytest.approx(sum(losses) / 8, abs=0.01)
    short = run(*tiny, "trainer.max_steps=5", "hydra.run.dir=short", cwd=tmp_path)
    assert float(means(short)[0]) == pytest.approx(sum(losses[:5]) / 5, abs=0.01)
    assert [event.step for event in scalars(tmp_path / "short", "train/loss")] == [3, 5]
    later = run(*tiny, "trainer.max_steps=12", "hydra.run.dir=later", cwd=tmp_path)
    assert len(set(means(later))) == 2
    stop = ["callbacks.early_stopping_patience=1", "trainer.val_check_interval=0.5", "optimizer.lr=1e-9"]
    stopped = run(*tiny, *stop, "optimizer=sgd", "hydra.run.dir=stopped", cwd=tmp_path)
    assert len(means(stopped)) == 2 and len(set(means(stopped))) == 2


def scalars(folder, tag):
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    return board.Scalars(tag)


def test_a_sweep_trains_every_combination(tmp_path, data_root):
    swept = ("model.hidden_dims=[8],[8,4]", "beta=0.5,4", "trainer=smoke")
    short = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", f"data.root={data_root}")
    output = run("-m", *swept, *short, cwd=tmp_path)
    (sweep,) = (tmp_path / "runs" / "sweeps").iterdir()
    jobs = sorted(path.name for path in sweep.iterdir() if path.is_dir())
    rest = "trainer.limit_train_batches_2,trainer.max_epochs_1,trainer_smoke_[0-9a-f]{8}"
    found = [re.fullmatch(rf"beta_([\d.]+),data.root_.+,model.hidden_dims_([\d,]+),{rest}", job) for job in jobs]
    assert sorted(job.groups() for job in found if job) == [(b, h) for b in ("0.5", "4") for h in ("8", "8,4")]
    assert (sweep / ".betavae").read_text() == "a sweep of betavae\n"
    assert output.count("neg. ELBO") >= 4
    for job in jobs:
        assert json.loads((sweep / job / "metrics.json").read_text())["status"] == "finished"
        assert (sweep / job / "train.log").stat().st_size > 0
        assert (sweep / job / ".betavae").read_text() == "a run of betavae\n"


def test_help_lists_settings_and_examples(tmp_path):
    text = run("--help", cwd=tmp_path)
    for words in ("python train.py -m model.latent_dim=2,20", "model: conv, mlp, mlp_large, mlp_small", "beta=1.0"):
        assert words in text
    assert "hidden_dims:" in run("--cfg", "job", cwd=tmp_path)
    text = run("--help", cwd=tmp_path, script="scripts/sample.py")
    for words in ("Sample images from a trained VAE", "temperature=1.0", "label=null", "ckpt=null"):
        assert words in text


def test_a_terminal_shows_a_progress_bar(workdir):
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 130, 0, 0))
    child = Child("trainer=smoke", "trainer.max_epochs=1", "name=terminal", cwd=workdir, terminal=end)
    os.close(end)
    output = b""
    with contextlib.suppress(OSError):  # Linux raises it when the other end is closed
        while piece := os.read(terminal, 65536):
            output += piece
    os.close(terminal)
    assert child.wait() == 0, output
    # The visible part of a line follows its last carriage return.
    lines = [line.rstrip("\r").split("\r")[-1] for line in output.decode().split("\n")]
    assert "Epoch 0: 100%" in lines[0] and "recon=" in lines[0] and "val neg. ELBO=" in lines[0]
    assert lines[1].startswith("test  loss")
