"""A run of several processes has one folder, resumes exactly, and reports an error once per process."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from betavae.runtime import distributed
from tests.commands import ENVIRONMENT, REPO, Child, is_equal, run, wait_for

SETTINGS = [
    *("trainer=[smoke,ddp]", "trainer.accelerator=cpu", "trainer.max_epochs=4", "trainer.limit_train_batches=8"),
    *(
        "trainer.log_every_n_steps=3",
        "model.hidden_dims=[16]",
        "model.latent_dim=3",
        "callbacks.figures_every_n_epochs=0",
    ),
    *("data.binarize=dynamic", "beta_schedule=linear"),
]


def free_port() -> int:
    """Return a free port with a free port above it, for the store of the run."""
    while True:
        with socket.socket() as probe, socket.socket() as above, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            above.bind(("127.0.0.1", port + 1))
            return port


def torchrun(cwd: Path, *args: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    return subprocess.Popen(
        [*command, str(REPO / "train.py"), *args],
        cwd=cwd,
        env=ENVIRONMENT | {"PYTHONPATH": str(REPO / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two(
    cwd: Path, *args: str, slurm: bool = False, prepare_second: Callable[[], object] | None = None
) -> list[Child]:
    """Start two processes with the environment of workers of torchrun, or of tasks of a Slurm step."""
    port, started = str(free_port()), []
    shared = {"RUN_ID": "none", "USE_AGENT_STORE": "False", "RESTART_COUNT": "0"}
    variables = {f"TORCHELASTIC_{name}": value for name, value in shared.items()}
    variables |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    if slurm:
        shared = {"JOB_ID": str(os.getpid()), "JOB_NAME": "train", "NTASKS": "2", "NODEID": "0", "JOB_NUM_NODES": "1"}
        shared |= {"NTASKS_PER_NODE": "2", "JOB_NODELIST": "localhost"}
        variables = {f"SLURM_{name}": value for name, value in shared.items()}
    for rank in ("0", "1"):
        own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} if slurm else {"RANK": rank, "LOCAL_RANK": rank}
        prepare = prepare_second if rank == "1" else None
        environment = variables | own | {"MASTER_PORT": port}
        started.append(Child(*args, cwd=cwd, environment=environment, prepare=prepare))
    return started


def state(folder: Path) -> dict:
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return {key: content[key] for key in ("state_dict", "random_state", "optimizer_states", "batches", "global_step")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data_root: str) -> tuple[Path, str]:
    cwd = tmp_path_factory.mktemp("whole")
    process = torchrun(cwd, *SETTINGS, f"data.root={data_root}")
    text = process.communicate(timeout=200)[0]
    assert process.returncode == 0, text
    return cwd, text


@pytest.mark.slow
def test_torchrun_makes_one_run_folder(whole: tuple[Path, str]) -> None:
    cwd, text = whole
    (folder,) = (cwd / "runs").iterdir()
    assert text.count("epoch   1/4") == 1 and text.count("test  loss") == 1
    assert len(list(folder.glob("events.*"))) == 1
    assert json.loads((folder / "metrics.json").read_text())["status"] == "finished"
    assert state(folder)["random_state"].shape[0] == 2


def resume_and_compare(whole: tuple[Path, str], tmp_path: Path, exact: bool) -> None:
    workers = start_two(tmp_path, "resume=run")
    assert [worker.wait() for worker in workers] == [0, 0], [worker.text for worker in workers]
    assert state(tmp_path / "run")["global_step"] == 32
    (expected,) = (whole[0] / "runs").iterdir()
    if exact:
        assert is_equal(state(tmp_path / "run"), state(expected))


@pytest.mark.slow
def test_torchrun_is_stopped_by_a_signal_and_resumed(whole: tuple[Path, str], tmp_path: Path, data_root: str) -> None:
    slow = "trainer.limit_val_batches=1.0"  # so that there is time to ask
    process = torchrun(tmp_path, *SETTINGS, slow, f"data.root={data_root}", "hydra.run.dir=run")
    wait_for(tmp_path, "run/checkpoints/last.ckpt", process)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=100)[0]
    assert text.count("python train.py resume=run") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "interrupted"
    resume_and_compare(whole, tmp_path, exact=False)


@pytest.mark.slow
def test_killed_processes_resume_exactly(whole: tuple[Path, str], tmp_path: Path, data_root: str) -> None:
    workers = start_two(tmp_path, *SETTINGS, f"data.root={data_root}", "hydra.run.dir=run")
    wait_for(tmp_path, "run/checkpoints/last.ckpt", workers[0])
    for worker in workers:
        worker.send(signal.SIGKILL)
    for worker in workers:
        worker.wait()
    resume_and_compare(whole, tmp_path, exact=True)


@pytest.mark.slow
@pytest.mark.parametrize(("test", "validation"), [(101, 11), (1, 3)])
def test_two_processes_evaluate_each_image_once(tmp_path: Path, test: int, validation: int) -> None:
    """The processes have different numbers of images and batches, and the weights do not change."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (150, 5, 5), dtype=np.uint8))
    images = ("data=arrays", "data.root=images.npy", f"data.test_size={test}", f"data.validation_size={validation}")
    frozen = ("optimizer=sgd", "optimizer.lr=1e-30", "data.batch_size=4", "data.eval_batch_size=10")
    limits = ("trainer.max_epochs=1", "trainer.limit_val_batches=1.0", "trainer.limit_test_batches=1.0")
    args = [*SETTINGS, *images, *frozen, *limits, "objective.k=2"]
    run(*args, "trainer.devices=1", "hydra.run.dir=one", cwd=tmp_path)
    workers = start_two(tmp_path, *args, "hydra.run.dir=two")
    assert [worker.wait() for worker in workers] == [0, 0], [worker.text for worker in workers]
    one, both = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    for split in ("test", "validation"):
        assert both[split] == pytest.approx(one[split], rel=1e-5)


@pytest.mark.slow
def test_an_error_in_rank_zero_ends_all_processes(tmp_path: Path, data_root: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("of the user")
    late = lambda: time.sleep(3)  # noqa: E731 - the second process starts after the error
    workers = start_two(tmp_path, *SETTINGS, f"data.root={data_root}", "hydra.run.dir=mine", prepare_second=late)
    assert [worker.wait() for worker in workers] == [1, 1], "a process is still waiting"
    assert workers[0].text.startswith("error: hydra.run.dir: mine is not empty and not a run of betavae")
    assert workers[1].text.startswith("[rank 1] error: ")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


@pytest.mark.slow
def test_srun_makes_one_run_folder(tmp_path: Path, data_root: str) -> None:
    tasks = start_two(tmp_path, *SETTINGS, "trainer.max_epochs=1", f"data.root={data_root}", slurm=True)
    assert [task.wait() for task in tasks] == [0, 0], [task.text for task in tasks]
    (folder,) = (tmp_path / "runs").iterdir()
    said = [line for line in tasks[1].text.splitlines() if not line.startswith("[Gloo] ")]  # torch 2.8 prints it
    assert "test  loss" in tasks[0].text and not said
    assert json.loads((folder / "metrics.json").read_text())["status"] == "finished"


def test_a_sweep_under_torchrun_is_rejected(tmp_path: Path) -> None:
    for worker in start_two(tmp_path, "-m", "beta=1,2"):
        assert worker.wait() == 1 and "error: a sweep trains each job on one device" in worker.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "rank", "external"),
    [
        ({}, 0, False),
        ({"RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}, 1, True),
        ({"RANK": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, 2, True),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, 1, True),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "bash"}, 0, False),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "3"}, 0, False),
        ({"NODE_RANK": "1"}, 1, True),
        ({"NODE_RANK": "0"}, 0, True),
        ({"NODE_RANK": "0", "LOCAL_RANK": "1"}, 1, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, 1, False),
    ],
)
def test_rank_and_launcher_are_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], rank: int, external: bool
) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.rank() == rank and distributed.externally_launched() == external


def test_a_port_in_use_is_a_one_line_error(tmp_path: Path) -> None:
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + 1))
        taken.listen()
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
        child = Child(*SETTINGS, "hydra.run.dir=run", cwd=tmp_path, environment=variables)
        assert child.wait() == 1 and child.text.startswith(f"error: MASTER_PORT={port} is invalid: "), child.text
        assert child.text.count("\n") == 1 and not list(tmp_path.iterdir())
