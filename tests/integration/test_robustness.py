"""Complete commands under divergence, full disks, concurrent runs and signals."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from betavae.module import VAEModule
from betavae.runtime import checkpoint
from tests.commands import ENVIRONMENT, REPO, TINY, Child, fresh, read_record, run, started, wait_for

CAN_MOUNT = (
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    if shutil.which("unshare")
    else False
)
mounts = pytest.mark.skipif(not CAN_MOUNT, reason="needs a mount namespace")


def poison(step: int, what: str):
    """Make the loss at a step, or a weight after it, not finite."""

    def prepare() -> None:
        real_loss, real_end = VAEModule.loss, VAEModule.on_train_batch_end

        def loss(self, *args):
            value, sums = real_loss(self, *args)
            if self.global_step == step and what == "loss":
                return value * float("nan"), sums | {"loss": torch.tensor(float("inf"))}
            return value, sums

        def on_train_batch_end(self, *args):
            real_end(self, *args)
            if self.global_step == step and what == "weight":
                next(self.parameters()).data[0, 0] = float("nan")

        VAEModule.loss, VAEModule.on_train_batch_end = loss, on_train_batch_end

    return prepare


# An epoch has 8 steps and logs every 3: the steps are within, at the start and at the end of an interval.
@pytest.mark.parametrize(
    ("what", "step", "said", "kept"),
    [
        ("loss", 12, "the loss of step 13 is not finite (the last finite loss was ", 8),
        ("loss", 3, "the loss of step 4 is not finite (the last finite loss was ", None),
        ("loss", 0, "the loss of step 1 is not finite; try", None),
        ("weight", 16, "the weights after step 16 are not finite (the last finite loss was ", 8),
    ],
)
def test_divergence_ends_the_run_before_a_checkpoint(tmp_path, data_root, what, step, said, kept):
    arguments = [*TINY, f"data.root={data_root}", "hydra.run.dir=run"]
    child = Child(*arguments, cwd=tmp_path, prepare=poison(step, what))
    assert child.wait() == 1
    assert said in child.text and "try a smaller optimizer.lr" in child.text and "Traceback" not in child.text
    found = read_record(tmp_path / "run")
    assert found["status"] == "diverged" and said in found["error"]
    # The exact step is reported, at most one interval of 3 steps later.
    assert found["steps"] - 3 < step + 1 <= found["steps"] + 1
    paths = list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert [checkpoint.read_checkpoint(path)["global_step"] for path in paths] == [kept] * (2 if kept else 0)
    for path in paths:
        assert all(value.isfinite().all() for value in checkpoint.read_checkpoint(path)["state_dict"].values())


def test_a_too_large_learning_rate_diverges(tmp_path, data_root):
    arguments = [*TINY, f"data.root={data_root}", "hydra.run.dir=run", "optimizer.lr=1e30"]
    text = run(*arguments, cwd=tmp_path, code=1)
    assert "training diverged: the loss of step 2 is not finite (the last finite loss was" in text
    assert read_record(tmp_path / "run")["status"] == "diverged"


@pytest.mark.slow
@mounts
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, data_root):
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    settings = [*TINY, "trainer.max_epochs=60", "callbacks.figures_every_n_epochs=0", f"data.root={data_root}"]
    train = f"{sys.executable} {REPO / 'train.py'} {' '.join(settings)} hydra.run.dir={small}/run"
    # Room for two checkpoints and a little more; another file fills the rest after the first ones.
    script = f"""
        mount -t tmpfs -o size=4m tmpfs {small}
        {train} > {tmp_path}/out 2>&1 &
        for i in $(seq 1000); do [ -f {small}/run/checkpoints/last.ckpt ] && break; sleep 0.05; done
        cat /dev/zero > {small}/filler 2> /dev/null
        wait $!; code=$?
        rm {small}/filler
        cp -r {small}/run {kept}
        exit $code"""
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], timeout=120, env=ENVIRONMENT)
    output = (tmp_path / "out").read_text()
    assert done.returncode == 1, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "No space left on device" in errors[0] and "Traceback" not in output, output
    content = checkpoint.read_checkpoint(kept / "checkpoints" / "last.ckpt")
    assert content["global_step"] > 0 and not list(kept.rglob("*.part"))
    # With free space the run is resumed.
    run(f"resume={kept}", "trainer.max_epochs=" + str(content["epoch"] + 2), cwd=tmp_path)
    assert read_record(kept)["status"] == "finished"


@pytest.mark.slow
@mounts
def test_a_full_disk_during_unpacking_is_a_one_line_error(tmp_path):
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


@pytest.mark.slow
@mounts
def test_a_read_only_installation_runs_from_any_folder(tmp_path, data_root):
    train = f"{sys.executable} {REPO / 'train.py'} {' '.join(TINY)} trainer.max_epochs=1 data.root={data_root}"
    script = f"""
        for folder in {REPO} {data_root}; do mount --bind $folder $folder; mount -o remount,ro,bind $folder; done
        touch {REPO}/x {data_root}/x 2> /dev/null && exit 9
        cd {tmp_path} && {train}"""
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=100, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert [read_record(folder)["status"] for folder in (tmp_path / "runs").iterdir()] == ["finished"]


@pytest.mark.slow
def test_two_runs_in_the_same_second_get_two_folders(tmp_path):
    """Both also unpack the data into the same folder."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    time.sleep(1 - time.time() % 1)
    same = [*TINY, "trainer.max_epochs=1", f"data.root={tmp_path}/data", f"runs={tmp_path}/runs"]
    children = [Child(*same, cwd=folder) for folder in folders]
    for child in children:
        assert child.wait() == 0, child.text
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 2 and all(read_record(run)["status"] == "finished" for run in runs)
    assert ":" not in "".join(run.name for run in runs) and "=" not in "".join(run.name for run in runs)
    assert len(list((tmp_path / "data" / "MNIST" / "raw").iterdir())) == 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_prints_how_to_resume(tmp_path, data_root, number):
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
    found = read_record(tmp_path / "run")
    assert found["status"] == "finished" and found["steps"] == 8 * epochs
    # Resuming a finished run does nothing.
    assert run("resume=run", cwd=tmp_path).startswith("run is finished") and read_record(tmp_path / "run") == found


@pytest.mark.slow
def test_a_moved_run_folder_resumes(tmp_path, data_root):
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


@pytest.mark.slow
def test_scripts_work_with_an_installed_package(tmp_path):
    """The scripts of a clone work from any folder, and the package's MNIST without a clone."""
    site = tmp_path / "site"
    shutil.copytree(REPO / "src" / "betavae", site / "betavae", ignore=shutil.ignore_patterns("__pycache__"))
    elsewhere = {"cwd": tmp_path, "PYTHONPATH": str(site)}
    assert "latent_dim: 9" in fresh(str(REPO / "train.py"), "--cfg", "job", "model.latent_dim=9", **elsewhere)
    assert "temperature" in fresh(str(REPO / "scripts" / "sample.py"), "--help", **elsewhere)
    code = "import betavae; from betavae.data.datasets.mnist import load_mnist; from pathlib import Path; "
    code += "print(betavae.__file__, load_mnist(Path('data'), 'test').pixels.shape)"
    assert str(site) in (printed := fresh("-c", code, **elsewhere)) and "[10000, 1, 28, 28]" in printed
