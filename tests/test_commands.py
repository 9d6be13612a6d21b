"""Whole commands, as a user runs them."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture(scope="module")
def run(clone):
    """A finished smoke run in two latent dimensions: (its folder, what it printed)."""
    output = clone.run("train.py", "trainer=smoke", "model.latent_dim=2", "callbacks.figures_every=1", "seed=0")
    return clone.folder / re.search(r"run +(runs/\S+)", output)[1], output


def test_what_training_prints(run):
    folder, output = run
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
    assert len(lines) == 7  # and nothing from anybody else


def test_what_a_run_folder_holds(run):
    folder, _ = run
    assert "=" not in folder.name and folder.name.endswith("_mlp_z2_beta1.0")
    names = {path.name for path in folder.iterdir()}
    assert names - {path.name for path in folder.glob("events.*")} == {
        *("config.yaml", "overrides.yaml", "checkpoints", "metrics.json", "train.log", "figures"),
        *("projector_config.pbtxt", "00040"),
    }
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert {path.stem for path in (folder / "figures").iterdir()} == {
        *("samples", "reconstructions", "traversal", "manifold"),
    }
    assert "epoch   2/2" in (folder / "train.log").read_text()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["status"] == "finished" and metrics["seed"] == 0 and metrics["epochs"] == 2
    assert metrics["parameters"] == 784 * 400 + 400 + 400 * 4 + 4 + 2 * 400 + 400 + 400 * 784 + 784
    test = metrics["test"]
    assert test["neg_elbo"] == pytest.approx(test["recon"] + test["kl"], abs=2e-4)
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["model"]["latent_dim"] == 2


def test_what_tensorboard_shows(run):
    folder, _ = run
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
    tensors = (folder / "00040" / "posterior_means" / "tensors.tsv").read_text().splitlines()
    assert len(tensors) == 2000 and len(tensors[0].split("\t")) == 3  # padded: the projector shows no plane
    assert len((folder / "00040" / "posterior_means" / "metadata.tsv").read_text().split()) == 2000


def test_curves_and_metrics_agree(run):
    folder, output = run
    board = EventAccumulator(str(folder))
    board.Reload()
    metrics = json.loads((folder / "metrics.json").read_text())
    for term, value in metrics["test"].items():
        assert board.Scalars(f"test/{term}")[-1].value == pytest.approx(value, rel=1e-4)
    printed = float(re.search(r"epoch +2/2  loss ([\d.]+)", output)[1])
    epoch_2 = [event.value for event in board.Scalars("train/loss")[4:]]
    assert printed == pytest.approx(sum(epoch_2) / 4, abs=0.01)


@pytest.mark.parametrize("script", ["sample", "reconstruct", "interpolate", "traverse", "manifold"])
def test_a_script_needs_the_checkpoint_alone_and_is_deterministic(clone, run, tmp_path, script):
    checkpoint = tmp_path / "alone.ckpt"
    checkpoint.write_bytes((run[0] / "checkpoints" / "best.ckpt").read_bytes())
    pictures = []
    for name in ("a", "b"):
        out = tmp_path / "new folder" / f"{name}.png"
        clone.run(f"scripts/{script}.py", f"ckpt={checkpoint}", f"out='{out}'")
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]


def test_sample_options(clone, run, tmp_path):
    output = clone.run(
        "scripts/sample.py", "n=5", "seed=3", f"out={tmp_path}/s.png", "save_images=true", "save_tensor=true"
    )
    assert str(run[0].relative_to(clone.folder)) in output  # the newest finished run
    images = torch.load(tmp_path / "s.pt", weights_only=True)
    assert images.shape == (5, 1, 28, 28) and images.min() >= 0 and images.max() <= 1
    assert len(list((tmp_path / "s").iterdir())) == 5


def test_resume_goes_on_where_the_run_was(clone, run):
    """Two epochs, then two more, equal four in one go: weights, curves and test numbers."""
    short = "runs/short"
    settings = ("trainer=smoke", "seed=7")
    clone.run("train.py", *settings, f"hydra.run.dir={short}")
    output = clone.run("train.py", f"resume={short}", "trainer.max_epochs=4")
    assert "epoch   3/4" in output and "epoch   1/4" not in output
    clone.run("train.py", *settings, "trainer.max_epochs=4", "hydra.run.dir=runs/whole")
    folders = [clone.folder / "runs" / name for name in ("short", "whole")]
    one, other = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in folders)
    assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (json.loads((f / "metrics.json").read_text())["test"] for f in folders)
    assert one == other


def test_a_sweep(clone):
    output = clone.run(
        "train.py", "-m", "model.hidden_dims=[8],[8,4]", "beta=0.5,4", "trainer=smoke", "trainer.max_epochs=1"
    )
    (sweep,) = (clone.folder / "runs" / "sweeps").iterdir()
    jobs = sorted(path.name for path in sweep.iterdir() if path.is_dir())
    assert jobs == [
        "beta_0.5,model.hidden_dims_8,4,trainer.max_epochs_1,trainer_smoke",
        "beta_0.5,model.hidden_dims_8,trainer.max_epochs_1,trainer_smoke",
        "beta_4,model.hidden_dims_8,4,trainer.max_epochs_1,trainer_smoke",
        "beta_4,model.hidden_dims_8,trainer.max_epochs_1,trainer_smoke",
    ]
    assert output.count("neg. ELBO") >= 4
    for job in jobs:
        assert json.loads((sweep / job / "metrics.json").read_text())["status"] == "finished"
        assert (sweep / job / "train.log").stat().st_size > 0


def test_help_is_written_for_this_project(clone):
    text = clone.run("train.py", "--help")
    for words in ("python train.py -m model.latent_dim=2,20", "model: conv, mlp, mlp_large, mlp_small", "beta=1.0"):
        assert words in text
    assert "hidden_dims:" in clone.run("train.py", "--cfg", "job")


def test_a_mistake_is_one_sentence_and_leaves_nothing(clone):
    before = sorted((clone.folder / "runs").iterdir())
    for arguments, words in {
        ("model.latnt_dim=3",): "model.latnt_dim is not a setting; did you mean model.latent_dim?",
        ("model=cnov",): "model=cnov is not one of its options: conv, mlp",
        ("model.latent_dim=0",): "model.latent_dim=0 cannot be: it must be a whole number from 1 up",
    }.items():
        assert clone.run("train.py", *arguments, code=1).strip().startswith(f"error: {words}")
    assert "runs/none does not exist" in clone.run("scripts/sample.py", "ckpt=runs/none", code=1)
    assert sorted((clone.folder / "runs").iterdir()) == before


def test_a_terminal_gets_a_bar(clone):
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 130, 0, 0))
    command = [sys.executable, "train.py", "trainer=smoke", "trainer.max_epochs=1", "name=terminal"]
    process = subprocess.Popen(
        command, cwd=clone.folder, env=os.environ | {"PYTHONPATH": "src"}, stdout=end, stderr=end, stdin=end
    )
    os.close(end)
    output = b""
    with contextlib.suppress(OSError):  # the way Linux says that the other end is closed
        while piece := os.read(terminal, 65536):
            output += piece
    assert process.wait() == 0
    # What stays on the screen of each line is what follows its last carriage return.
    lines = [line.rstrip("\r").split("\r")[-1] for line in output.decode().split("\n")]
    assert "Epoch 0: 100%" in lines[0] and "recon=" in lines[0] and "val neg. ELBO=" in lines[0]
    assert lines[1].startswith("test  loss")
