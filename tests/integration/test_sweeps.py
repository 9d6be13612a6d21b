"""Whole sweeps: killed and resumed, on several launchers, and reported."""

import csv
import importlib.util
import json
import os
import signal
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from betavae.runtime import checkpoint
from betavae.runtime.distributed import ONE_DEVICE_MESSAGE
from betavae.runtime.hydra_config import job_name
from betavae.runtime.run_folder import RUN, SWEEP, claim_folder
from betavae.sweeps import figures, results
from tests.commands import REPO, Child, fresh, run, started, wait_for
from tests.integration import sweep_commands
from tests.integration.sweep_commands import TRAIN, documented, find_job, read_metrics
from tests.unit.sweeps.conftest import write_job

KilledSweep = tuple[Path, str, dict[str, float]]  # the working folder, the output, and the times of files
SMALL = [*sweep_commands.SMALL, "model=mlp_small"]


def needs(module: str) -> pytest.MarkDecorator:
    """Skip a test if an optional dependency is missing."""
    is_missing = importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(module) is None
    return pytest.mark.skipif(is_missing, reason=f"{module} comes with an extra")


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory, data: str) -> KilledSweep:
    """Kill a sweep of five jobs, and run the same command again to its end.

    When it is killed, beta=0.5 has finished, beta=-1 has failed, beta=2 has trained an epoch, and beta=3 and 4 have not
    started, except that beta=4 failed in an earlier try.
    """
    cwd = tmp_path_factory.mktemp("sweep")
    args = ["-m", *SMALL, data, "trainer.max_epochs=12", "beta=0.5,-1,2,3,4", "hydra.sweep.dir=sweep"]
    claim_folder(cwd / "sweep", SWEEP, "")
    earlier = cwd / "sweep" / job_name(",".join(sorted([*SMALL, data, "trainer.max_epochs=12", "beta=4"])))
    claim_folder(earlier, RUN, "")
    (earlier / "checkpoints").mkdir(parents=True)
    (earlier / "metrics.json").write_text('{"status": "failed", "error": "OSError: disk full"}')
    (earlier / "checkpoints" / "last.ckpt").write_text("half a file")
    (earlier / "notes.txt").write_text("of the user")
    child = Child(*args, cwd=cwd)
    wait_for(cwd, "sweep/beta_2,*/checkpoints/last.ckpt", child)
    child.send(signal.SIGKILL)
    child.wait()
    before = {
        str(path): path.stat().st_mtime for path in find_job(cwd / "sweep", "beta_0.5,").rglob("*") if path.is_file()
    }
    assert read_metrics(find_job(cwd / "sweep", "beta_2,"))["status"] == "running"
    assert {job.overrides["beta"]: job.status for job in results.read_jobs(cwd / "sweep")} == {
        "-1": "failed",
        "0.5": "finished",
        "2": "interrupted",
        "3": "missing",
        "4": "missing",  # the folder of the earlier try has no overrides.yaml here
    }
    text = run(*args, cwd=cwd, code=1)
    assert earlier == find_job(cwd / "sweep", "beta_4,") and (earlier / "notes.txt").read_text() == "of the user"
    return cwd, text, before


@pytest.mark.slow
def test_the_same_command_keeps_resumes_and_retries_jobs(killed_and_resumed: KilledSweep) -> None:
    cwd, text, before = killed_and_resumed
    sweep = cwd / "sweep"
    finished = find_job(sweep, "beta_0.5,")
    after = {str(path): path.stat().st_mtime for path in finished.rglob("*") if path.is_file()}
    after.pop(str(finished / ".lock"))
    before.pop(str(finished / ".lock"))
    assert after == before and f"{finished.name} is already finished" in text
    resumed = (find_job(sweep, "beta_2,") / "train.log").read_text()
    assert [resumed.count(f"epoch {epoch:>3}/12") for epoch in (1, 12)] == [1, 1]
    for beta in ("0.5", "2", "3", "4"):
        assert read_metrics(find_job(sweep, f"beta_{beta},"))["status"] == "finished"


@pytest.mark.slow
def test_a_failed_job_is_reported_and_stops_no_other(killed_and_resumed: KilledSweep) -> None:
    cwd, text, _ = killed_and_resumed
    failed = find_job(cwd / "sweep", "beta_-1,")
    assert read_metrics(failed)["status"] == "failed"
    assert (
        "Traceback" in (failed / "train.log").read_text() and "beta=-1 is invalid" in (failed / "train.log").read_text()
    )
    assert "Traceback" not in text
    table = [line.split() for line in text.split("nats per image:\n")[-1].splitlines()]
    rows = {line[0]: line[1:] for line in table if line and line[0].startswith("beta_")}
    test = read_metrics(find_job(cwd / "sweep", "beta_2,"))["test"]
    assert rows[find_job(cwd / "sweep", "beta_2,").name][:4] == [
        "finished",
        *(f"{test[name]:.2f}" for name in ("neg_elbo", "kl", "recon")),
    ]
    assert rows[failed.name] == ["failed"]
    error = "UserError: beta=-1 is invalid: expected a number >= 0 and <= 1e+30"
    assert f"failed: {error} (sweep/{failed.name}/train.log)" in text


@pytest.mark.slow
def test_tensorboard_compares_the_jobs_of_a_sweep(killed_and_resumed: KilledSweep) -> None:
    from tensorboard import context
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    sweep = killed_and_resumed[0] / "sweep"
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(sweep))
    multiplexer.Reload()
    names = {find_job(sweep, f"beta_{beta},").name for beta in ("0.5", "2", "3", "4")}
    assert set(multiplexer.Runs()) == names
    assert all("val/loss" in tags["tensors"] for tags in multiplexer.Runs().values())
    hparams = backend_context.Context(
        TBContext(
            logdir=str(sweep), multiplexer=multiplexer, data_provider=MultiplexerDataProvider(multiplexer, str(sweep))
        )
    )
    statuses = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_RUNNING]
    request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=99, allowed_statuses=statuses)
    groups = list_session_groups.Handler(context.RequestContext(), hparams, "", request).run().session_groups
    assert {group.name: group.hparams["beta"].number_value for group in groups} == {
        find_job(sweep, f"beta_{beta:g},").name: beta for beta in (0.5, 2.0, 3.0, 4.0)
    }
    shown = {group.name: {m.name.tag: m.value for m in group.metric_values}["test/neg_elbo"] for group in groups}
    assert shown == pytest.approx({name: read_metrics(sweep / name)["test"]["neg_elbo"] for name in names}, abs=1e-3)


@pytest.mark.slow
def test_the_report_has_tables_and_figures(killed_and_resumed: KilledSweep) -> None:
    cwd = killed_and_resumed[0]
    text = run("sweep=sweep", "out=report", cwd=cwd, script="scripts/sweep_report.py")
    rows = list(csv.DictReader((cwd / "report" / "table.csv").read_text().splitlines()))
    assert [row["beta"] for row in rows] == ["-1", "0.5", "2", "3", "4"]
    expected = read_metrics(find_job(cwd / "sweep", "beta_3,"))["test"]
    assert float(rows[3]["neg_elbo_mean"]) == pytest.approx(expected["neg_elbo"], abs=1e-3)
    assert (cwd / "report" / "table.md").read_text() in text
    for name in ("rate_distortion", "neg_elbo", "samples"):
        assert (cwd / "report" / f"{name}.png").stat().st_size > 5000
    error = run("sweep=sweep", "over=[betaa]", cwd=cwd, code=1, script="scripts/sweep_report.py")
    assert error == "error: over=betaa is invalid: expected a swept setting (beta)\n"


def test_samples_of_a_sweep_have_the_settings_as_titles(killed_and_resumed: KilledSweep) -> None:
    groups = results.group_jobs(killed_and_resumed[0] / "sweep")
    grids, across = figures.draw_samples(groups, 0)
    assert [grid.title for grid in grids] == ["beta=0.5", "beta=2", "beta=3", "beta=4"] and across == 4
    vae = checkpoint.load(find_job(killed_and_resumed[0] / "sweep", "beta_3,")).vae
    torch.testing.assert_close(grids[2].images, vae.sample(16, 1.0, torch.Generator().manual_seed(0)))


@pytest.mark.slow
def test_the_documented_sweep_and_report_work(tmp_path: Path, data: str) -> None:
    run(*documented("beta=0.25,1,4"), *SMALL, data, "trainer.max_epochs=1", "model.latent_dim=2,10", cwd=tmp_path)
    text = run(*documented("sweep_report"), cwd=tmp_path, script="scripts/sweep_report.py")
    assert "| 0.25 | 2 | 1/1 |" in text and (tmp_path / "sweep_report" / "neg_elbo.png").exists()


@pytest.mark.slow
def test_similar_values_get_separate_jobs(tmp_path: Path, data: str) -> None:
    names = ["'日本'", "'中国'", "d/x", "d_x"]
    text = run("-m", *SMALL, data, "trainer.max_epochs=1", f"name={','.join(names)}", "hydra.sweep.dir=s", cwd=tmp_path)
    assert f"{len(names)} jobs: {len(names)} finished" in text
    assert sorted(
        results.read_job(path.parent).overrides["name"] for path in tmp_path.glob("s/*/metrics.json")
    ) == sorted(names)


@pytest.mark.slow
def test_paired_lists_train_one_job_per_pair_and_seed(tmp_path: Path, data: str) -> None:
    words = ["-m", "sweep=paired", "beta=4,1", *SMALL, data, "trainer.max_epochs=1", "hydra.sweep.dir=s"]
    words += ["model.latent_dim=2,3", "seed=7,8"]
    assert "4 jobs: 4 finished" in run(*words, cwd=tmp_path)
    jobs = results.read_jobs(tmp_path / "s")
    trained = {tuple(job.overrides[key] for key in ("beta", "model.latent_dim", "seed")) for job in jobs}
    assert trained == {("4", "2", "7"), ("4", "2", "8"), ("1", "3", "7"), ("1", "3", "8")}
    (jobs[0].folder / "metrics.json").unlink()
    again = run(*words, cwd=tmp_path)
    assert again.count("is already finished") == 3 and "4 jobs: 4 finished" in again
    text = run("sweep=s", "out=report", cwd=tmp_path, script="scripts/sweep_report.py")
    assert "| 1 | 3 | 2/2 |" in text and "| 4 | 2 | 2/2 |" in text, text


def test_invalid_paired_lists_are_rejected_in_one_line(tmp_path: Path, data: str) -> None:
    for words, message in (
        (
            "2,3,4",
            "sweep=paired: beta has 2 values and model.latent_dim has 3 values; expected lists of the same length",
        ),
        ("interval(1,2)", "model.latent_dim=interval(1,2) is invalid: expected a list of values, since no search runs"),
    ):
        error = run("-m", "sweep=paired", "beta=4,1", f"model.latent_dim={words}", data, cwd=tmp_path, code=1)
        assert error == f"error: {message}\n" and not any(path.is_file() for path in tmp_path.rglob("*"))


def test_invalid_sweeps_are_rejected_in_one_line(tmp_path: Path, data: str) -> None:
    many = run("-m", "trainer=ddp", "beta=1,2", data, cwd=tmp_path, code=1)
    assert many == f"error: {ONE_DEVICE_MESSAGE}\n"
    resume = run("-m", "resume=a,b", data, cwd=tmp_path, code=1)
    assert resume.startswith("error: resume") and "hydra.sweep.dir" in resume and resume.count("\n") == 1
    typo = run("-m", "betaa=1,2", data, cwd=tmp_path, code=1)
    assert typo == "error: betaa is not a setting; did you mean beta?\n"
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.slow
@needs("hydra_plugins.hydra_joblib_launcher")
def test_joblib_shares_the_threads_among_jobs(tmp_path: Path, data: str) -> None:
    args = [*documented("joblib"), *SMALL, data, "beta=1,-1,2", "seed=1", "hydra.sweep.dir=sweep"]
    text = fresh(TRAIN, *args, cwd=tmp_path, code=1, OMP_NUM_THREADS="")
    from joblib import cpu_count

    for beta in (1, 2):
        folder = find_job(tmp_path / "sweep", f"beta_{beta},")
        assert read_metrics(folder)["status"] == "finished" and read_metrics(folder)["threads"] == 1, cpu_count()
        assert f"{folder.name}  epoch   1/2" in text


# Replacements for the programs of Slurm: an array's tasks start at once, and again if they were requeued.
SLURM = {
    "sbatch": """
        import os, re, subprocess
        count = int(re.search(r"--array=0-(\\d+)", open(sys.argv[-1]).read())[1]) + 1
        for task in range(count):
            variables = {"JOB_ID": "77", "ARRAY_JOB_ID": "77", "ARRAY_TASK_ID": str(task), "NTASKS": "1", "PROCID": "0",
                         "LOCALID": "0", "NODEID": "0", "JOB_NUM_NODES": "1", "JOB_NODELIST": "localhost"}
            env = os.environ | {f"SLURM_{name}": value for name, value in variables.items()}
            mark = f"{here}/77_{task}"
            loop = f"while rm -f {mark}; sh {sys.argv[-1]}; [ -e {mark} ]; do :; done"
            subprocess.Popen(["sh", "-c", loop], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print("Submitted batch job 77")
    """,
    "srun": """
        import os
        command = sys.argv[sys.argv.index(sys.executable):]
        os.execv(command[0], command)
    """,
    "scontrol": """open(f"{here}/{sys.argv[2]}", "w")""",
    "sacct": """print("JobID|State|NodeList\\n77_0|RUNNING|localhost\\n77_1|RUNNING|localhost")""",
}


@pytest.mark.slow
@needs("hydra_plugins.hydra_submitit_launcher")
def test_the_slurm_preset_survives_preemption(tmp_path: Path, data: str) -> None:
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in SLURM.items():
        code = f"#!{sys.executable}\nimport sys\nhere = {str(bin)!r}\n{textwrap.dedent(text)}"
        (bin / name).write_text(code)
        (bin / name).chmod(0o755)
    args = [*documented("submitit_slurm"), *SMALL, data, "trainer.max_epochs=30", "beta=1,2", "seed=1"]
    process = started(TRAIN, *args, "hydra.sweep.dir=sweep", cwd=tmp_path, PATH=f"{bin}:{os.environ['PATH']}")
    wait_for(tmp_path, "sweep/beta_1,*/checkpoints/last.ckpt", process)
    preempted = read_metrics(find_job(tmp_path / "sweep", "beta_1,"))
    os.kill(preempted["pid"], signal.SIGUSR2)  # as Slurm does
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "Warning" not in text, text
    for beta in (1, 2):
        folder = find_job(tmp_path / "sweep", f"beta_{beta},")
        log = (folder / "train.log").read_text()
        assert read_metrics(folder)["status"] == "finished" and ("Requeued job" in log) == (beta == 1)
        assert ("interrupted at step" in log) == (beta == 1)  # it is saved there, so that no step is repeated
        assert [log.count(f"epoch {epoch:>3}/30") for epoch in (1, 30)] == [1, 1]


@pytest.mark.slow
@needs("hydra_plugins.hydra_ray_launcher")
def test_ray_runs_the_jobs(tmp_path: Path, data: str) -> None:
    args = [*documented("ray"), *SMALL, data, "beta=1,-1", "seed=1", "hydra.sweep.dir=sweep"]
    fresh(TRAIN, *args, cwd=tmp_path, code=1)
    assert read_metrics(find_job(tmp_path / "sweep", "beta_1,"))["status"] == "finished"
    assert read_metrics(find_job(tmp_path / "sweep", "beta_-1,"))["status"] == "failed"


@pytest.mark.slow
def test_two_processes_compute_the_same_as_one(tmp_path: Path, data_root: str) -> None:
    run("1", data_root, cwd=tmp_path, script="tests/integration/two_processes.py")
    fresh(str(REPO / "tests" / "integration" / "two_processes.py"), "2", data_root, cwd=tmp_path)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("1", "2"))
    for name, gradient in one["gradient"].items():
        torch.testing.assert_close(two["gradient"][name], gradient, rtol=1e-4, atol=1e-6)
    assert two["test"] == pytest.approx(one["test"], rel=1e-6)
    assert two["train"] == pytest.approx(one["train"], rel=1e-5) and "train/kl" in two["train"]
    assert two["noise"][0] != two["noise"][1]


@pytest.mark.slow
def test_ddp_writes_one_run_that_loads_anywhere(tmp_path: Path, data: str) -> None:
    args = [*documented("ddp"), *SMALL[1:], data, "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    args += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    text = fresh(TRAIN, *args, cwd=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert text.count("epoch   1/1") == 1 and "Warning" not in text
    assert len(list(folder.glob("events.*"))) == 1 and read_metrics(folder)["status"] == "finished"
    assert (folder / "train.log").read_text().count("test  loss") == 1
    assert checkpoint.load(folder).vae.latent_dim == 20
    assert run("n=4", cwd=tmp_path, script="scripts/sample.py").startswith("4 samples of")


def write_hostile_sweep(tmp_path: Path, task: list[str]) -> None:
    """Write a sweep whose YAML files hold interpolations that would read a secret or make a folder."""
    secret, folder = "${oc.env:SECRET}", f"${{run_dir:null,{tmp_path}/victim}}"
    sweep = tmp_path / "sweep"
    write_job(sweep, ["beta=1"], "failed")
    write_job(sweep, ["beta=2", f"name={secret}", "data.root=there", f"model.latent_dim={folder}"], "failed")
    job = sweep / "beta_1"
    (job / "config.yaml").write_text(json.dumps({"beta": 1, "name": secret, "data": folder, "model": {"x": folder}}))
    (sweep / "multirun.yaml").write_text(
        json.dumps({"hydra": {"sweeper": {"params": {"seed": secret}}, "overrides": {"task": task}}, "x": folder})
    )
    (job / "evaluation.json").write_text(
        '{"neg_elbo": {"mean": 1}, "nll_1": {"mean": 1}, "k": [1], "active_units": 1, "data": "d", "likelihood": "l",'
        '"images": 1, "note": "n"}'
    )
    (job / "metrics.json").write_text(
        '{"status": "failed", "error": "E", "fit_seconds": 1, "epochs": 1, "machine": "m", "threads": 1}'
    )


def test_reports_of_hostile_sweeps_resolve_nothing(tmp_path: Path) -> None:
    write_hostile_sweep(tmp_path, ["beta=3,${oc.env:SECRET}", f"name=${{run_dir:null,{tmp_path}/victim}}"])
    how = {"cwd": tmp_path, "environment": {"SECRET": "hunter2"}}
    text = run("sweep=sweep", script="scripts/sweep_report.py", **how)
    assert "${oc.env:SECRET}" in text and "2 missing" in text
    text += run("runs=sweep", script="scripts/results.py", **how)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        text += path.read_text()
    assert "hunter2" not in text and not (tmp_path / "victim").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("swept", "jobs", "recompilations"), [("seed", 3, 1), ("model.latent_dim", 5, 9)])
def test_every_job_of_a_sweep_is_compiled(tmp_path: Path, swept: str, jobs: int, recompilations: int) -> None:
    """Jobs with one architecture share compiled code, others do not; last batches have their own.

    By default, torch compiles a function at most 8 times.
    """

    def prepare() -> None:
        torch._logging.set_logs(recompiles=True)
        compile_ = torch.compile
        torch.compile = lambda *args, **how: compile_(*args, **how, backend="aot_eager")  # type: ignore[assignment]

    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8))
    data = ["data=arrays", "data.root=images.npy", "data.batch_size=20", "data.validation_size=5", "data.test_size=4"]
    values = ",".join(map(str, range(1, jobs + 1)))
    args = ["trainer=fast", "trainer.max_epochs=1", *data, "model=mlp_small", f"{swept}={values}"]
    text = run("-m", *args, "hydra.sweep.dir=sweep", cwd=tmp_path, prepare=prepare)
    assert {job.status for job in results.read_jobs(tmp_path / "sweep")} == {"finished"}
    assert text.count("Recompiling function") == recompilations, text
    assert "recompile_limit" not in text
