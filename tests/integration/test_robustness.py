"""Divergence, full disks, several runs at once, signals: faults made for real, on whole commands."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from betavae.module import VAEModule
from betavae.runtime import checkpoint
from tests.commands import ENVIRONMENT, REPO, TINY, Child, fresh, run, started, wait_for

CAN_MOUNT = (
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    if shutil.which("unshare")
    else False
)
mounts = pytest.mark.skipif(not CAN_MOUNT, reason="needs a mount namespace")


def record(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def poison(step: int, what: str):
    """In the child: at `step` the loss, or after it a weight, is not finite."""

    def prepare() -> None:
        real = VAEModule.training_step

        def training_step(self, batch, batch_idx):
            output = real(self, batch, batch_idx)
            if self.global_step == step and what == "loss":
                [(sums, _)] = output["sums"]
                sums["loss"] = torch.tensor(float("inf"))
                output["loss"] = output["loss"] * float("nan")
            return output

        def on_train_batch_end(self, *args):
            if self.global_step == step and what == "weight":
                next(self.parameters()).data[0, 0] = float("nan")

        VAEModule.training_step = training_step
        VAEModule.on_train_batch_end = on_train_batch_end

    return prepare


# 8 steps an epoch, a log line every 3: within an interval, at its start, in the last step of an epoch.
@pytest.mark.parametrize(
    ("what", "step", "said", "kept"),
    [
        ("loss", 12, "the loss of step 13 is not finite (the last finite loss was ", 8),
        ("loss", 3, "the loss of step 4 is not finite (the last finite loss was ", None),
        ("loss", 0, "the loss of step 1 is not finite; try", None),
        ("weight", 16, "the weights after step 16 are not finite (the last finite loss was ", 8),
    ],
)
def test_divergence_stops_the_run_and_spoils_nothing(tmp_path, data_root, what, step, said, kept):
    arguments = [*TINY, f"data.root={data_root}", "hydra.run.dir=run"]
    child = Child(*arguments, cwd=tmp_path, prepare=poison(step, what))
    assert child.wait() == 1
    assert said in child.text and "try a smaller optimizer.lr" in child.text and "Traceback" not in child.text
    found = record(tmp_path / "run")
    assert found["status"] == "diverged" and said in found["error"]
    # The very step, and at most an interval (here 3 steps) late.
    assert found["steps"] - 3 < step + 1 <= found["steps"] + 1
    paths = list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert [checkpoint.read_checkpoint(path)["global_step"] for path in paths] == [kept] * (2 if kept else 0)
    for path in paths:
        assert all(value.isfinite().all() for value in checkpoint.read_checkpoint(path)["state_dict"].values())


def test_a_learning_rate_that_is_too_large(tmp_path, data_root):
    arguments = [*TINY, f"data.root={data_root}", "hydra.run.dir=run", "optimizer.lr=1e30"]
    text = run(*arguments, cwd=tmp_path, code=1)
    assert "training diverged: the loss of step 2 is not finite (the last finite loss was" in text
    assert record(tmp_path / "run")["status"] == "diverged"


@mounts
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, data_root):
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    settings = [*TINY, "trainer.max_epochs=60", "callbacks.figures_every_n_epochs=0", f"data.root={data_root}"]
    train = f"{sys.executable} {REPO / 'train.py'} {' '.join(settings)} hydra.run.dir={small}/run"
    # Room for two checkpoints and a little more; after the first ones a neighbour takes the rest.
    script = f"""
        mount -t tmpfs -o size=4m tmpfs {small}
        {train} > {tmp_path}/out 2>&1 &
        for i in $(seq 1000); do [ -f {small}/run/checkpoints/last.ckpt ] && break; sleep 0.05; done
        cat /dev/zero > {small}/neighbour 2> /dev/null
        wait $!; code=$?
        rm {small}/neighbour
        cp -r {small}/run {kept}
        exit $code"""
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], timeout=120, env=ENVIRONMENT)
    output = (tmp_path / "out").read_text()
    assert done.returncode == 1, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "No space left on device" in errors[0] and "Traceback" not in output, output
    content = checkpoint.read_checkpoint(kept / "checkpoints" / "last.ckpt")
    assert content["global_step"] > 0 and not list(kept.rglob("*.part"))
    # With room again, it goes on.
    run(f"resume={kept}", "trainer.max_epochs=" + str(content["epoch"] + 2), cwd=tmp_path)
    assert record(kept)["status"] == "finished"


@mounts
def test_a_full_disk_while_the_data_are_unpacked(tmp_path):
    script = f"""
        mkdir {tmp_path}/small && mount -t tmpfs -o size=8m tmpfs {tmp_path}/small && cd {tmp_path}
        {sys.executable} {REPO / "train.py"} data.root=small/data runs=runs
        code=$?; find small/data -type f; exit $code"""
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=60, env=ENVIRONMENT
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: data.root: cannot write small/data") and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@mounts
def test_a_read_only_installation_from_any_folder(tmp_path, data_root):
    """Code and data that nobody can write to, and a working folder elsewhere."""
    train = f"{sys.executable} {REPO / 'train.py'} {' '.join(TINY)} trainer.max_epochs=1 data.root={data_root}"
    script = f"""
        for folder in {REPO} {data_root}; do mount --bind $folder $folder; mount -o remount,ro,bind $folder; done
        touch {REPO}/x {data_root}/x 2> /dev/null && exit 9
        cd {tmp_path} && {train}"""
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=100, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert [record(folder)["status"] for folder in (tmp_path / "runs").iterdir()] == ["finished"]


def test_two_first_runs_in_the_same_second(tmp_path):
    """Both unpack the data into the same folder, and each gets a run folder of its own."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    time.sleep(1 - time.time() % 1)
    same = [*TINY, "trainer.max_epochs=1", f"data.root={tmp_path}/data", f"runs={tmp_path}/runs"]
    children = [Child(*same, cwd=folder) for folder in folders]
    for child in children:
        assert child.wait() == 0, child.text
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 2 and all(record(run)["status"] == "finished" for run in runs)
    assert ":" not in "".join(run.name for run in runs) and "=" not in "".join(run.name for run in runs)
    assert len(list((tmp_path / "data" / "MNIST" / "raw").iterdir())) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_resumed(tmp_path, data_root, number):
    """Stopped in its first epochs, gone on with by the line that it printed; the first of them as a shell sees it."""
    settings = [*TINY, "trainer.max_epochs=300", "callbacks.figures_every_n_epochs=0", f"data.root={data_root}"]
    settings.append("hydra.run.dir=run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    if number == signal.SIGINT:
        process = started(str(REPO / "train.py"), *settings, cwd=tmp_path)
        wait_for(tmp_path, "run/checkpoints/last.ckpt", process)
        process.send_signal(number)
        output, code = process.communicate(timeout=60)[0], process.returncode
    else:
        child = Child(*settings, cwd=tmp_path)
        wait_for(tmp_path, "run/checkpoints/last.ckpt", child)
        child.send(number)
        code, output = child.wait(), child.text
    assert "Traceback" not in output
    if number == signal.SIGKILL:
        assert code == -number
    else:
        assert code == 128 + number
        assert output.splitlines()[-1].strip() == "python train.py resume=run"
    epochs = torch.load(last, weights_only=True)["global_step"] // 8 + 2
    run("resume=run", f"trainer.max_epochs={epochs}", cwd=tmp_path)
    found = record(tmp_path / "run")
    assert found["status"] == "finished" and found["steps"] == 8 * epochs
    # Finished is finished: again, and nothing is done.
    assert run("resume=run", cwd=tmp_path).startswith("run is finished") and record(tmp_path / "run") == found


def test_a_run_folder_can_move(tmp_path, data_root):
    settings = [*TINY, f"data.root={data_root}", "hydra.run.dir=old", "optimizer.lr=0.01"]
    run(*settings, "trainer.max_epochs=2", cwd=tmp_path)
    (tmp_path / "old").rename(tmp_path / "new")
    run("resume=new", "trainer.max_epochs=3", cwd=tmp_path)
    assert not (tmp_path / "old").exists()
    [best] = [
        v
        for k, v in checkpoint.read_checkpoint(tmp_path / "new/checkpoints/last.ckpt")["callbacks"].items()
        if "val/" in k
    ]
    assert list(best["best_k_models"]) == [str(tmp_path / "new" / "checkpoints" / "best.ckpt")]


def test_with_the_package_installed_elsewhere(tmp_path):
    """`pip install .`, then the scripts of a clone from any folder; and the package's MNIST without any clone."""
    site = tmp_path / "site"
    shutil.copytree(REPO / "src" / "betavae", site / "betavae", ignore=shutil.ignore_patterns("__pycache__"))
    elsewhere = {"cwd": tmp_path, "PYTHONPATH": str(site)}
    assert "latent_dim: 9" in fresh(str(REPO / "train.py"), "--cfg", "job", "model.latent_dim=9", **elsewhere)
    assert "temperature" in fresh(str(REPO / "scripts" / "sample.py"), "--help", **elsewhere)
    code = "import betavae; from betavae.data.datasets.mnist import load_mnist; from pathlib import Path; "
    code += "print(betavae.__file__, load_mnist(Path('data'), 'test').pixels.shape)"
    assert str(site) in (printed := fresh("-c", code, **elsewhere)) and "[10000, 1, 28, 28]" in printed
