"""Sweeps as people run them: left alone, killed, started again, spread over cores and machines, and read afterwards."""

import csv
import importlib.util
import json
import os
import re
import shlex
import signal
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from betavae.errors import UserError
from betavae.plotting import save_figure
from betavae.runtime import checkpoint, distributed
from betavae.runtime.hydra_config import job_name, safe_name
from betavae.runtime.run_folder import RUN, SWEEP, RunFolder, claim_folder
from betavae.sweeps import jobs, report
from tests.commands import REPO, Child, fresh, run, started, wait_for

TRAIN = str(REPO / "train.py")
SMALL = ["trainer=smoke", "model=mlp_small", "trainer.limit_train_batches=2", "callbacks.figures_every_n_epochs=0"]
SMALL += ["data.validation_size=200"]
# Of overrides, few letters, so that many look alike.
KEYS = st.text("ab_.", min_size=1, max_size=4)
OVERRIDES = st.text("ab_.+-/=[]'\"A日,", max_size=5) | st.text("ab", min_size=199, max_size=203)


@pytest.fixture(scope="module")
def data(data_root: str) -> str:
    return f"data.root={data_root}"


def needs(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} comes with an extra")


def readme(part: str) -> list[str]:
    """The arguments of the command with this in it, of the page on sweeps."""
    lines = (REPO / "docs" / "sweeps.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(("python ", "optuna ")) and part in line]
    return shlex.split(line)[2 if line.startswith("python") else 1 :]


def job(folder: Path, start: str) -> Path:
    (found,) = folder.glob(f"{start}*")
    return found


def record(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory, data: str) -> tuple[Path, str, dict[str, float]]:
    """Five jobs in one folder: beta=0.5 finishes, beta=-1 fails, beta=2 is killed after its first epoch, beta=3 and 4
    have not begun, but beta=4 failed in an earlier try. Then the same command again, to its end."""
    cwd = tmp_path_factory.mktemp("sweep")
    args = ["-m", *SMALL, data, "trainer.max_epochs=12", "beta=0.5,-1,2,3,4", "hydra.sweep.dir=sweep"]
    claim_folder(cwd / "sweep", SWEEP, "")
    earlier = cwd / "sweep" / job_name(",".join(sorted([*SMALL, data, "trainer.max_epochs=12", "beta=4"])))
    claim_folder(earlier, RUN, "")
    (earlier / "checkpoints").mkdir(parents=True)
    (earlier / "metrics.json").write_text('{"status": "failed", "error": "OSError: disk full"}')
    (earlier / "checkpoints" / "last.ckpt").write_text("half a file")
    (earlier / "notes.txt").write_text("somebody's")
    child = Child(*args, cwd=cwd)
    wait_for(cwd, "sweep/beta_2,*/checkpoints/last.ckpt", child)
    child.send(signal.SIGKILL)
    child.wait()
    before = {str(path): path.stat().st_mtime for path in job(cwd / "sweep", "beta_0.5,").rglob("*") if path.is_file()}
    assert record(job(cwd / "sweep", "beta_2,"))["status"] == "running"
    assert {job.overrides["beta"]: job.status for job in jobs.read_jobs(cwd / "sweep")} == {
        "-1": "failed",
        "0.5": "finished",
        "2": "interrupted",
        "3": "missing",
        "4": "missing",  # an earlier try's folder has no list of settings here
    }
    text = run(*args, cwd=cwd, code=1)
    assert earlier == job(cwd / "sweep", "beta_4,") and (earlier / "notes.txt").read_text() == "somebody's"
    return cwd, text, before


def test_the_same_command_keeps_resumes_and_retries(killed_and_resumed: tuple[Path, str, dict[str, float]]) -> None:
    cwd, text, before = killed_and_resumed
    sweep = cwd / "sweep"
    finished = job(sweep, "beta_0.5,")
    after = {str(path): path.stat().st_mtime for path in finished.rglob("*") if path.is_file()}
    after.pop(str(finished / ".lock"))
    before.pop(str(finished / ".lock"))
    assert after == before and f"{finished.name} is finished already" in text
    resumed = (job(sweep, "beta_2,") / "train.log").read_text()
    assert [resumed.count(f"epoch {epoch:>3}/12") for epoch in (1, 12)] == [1, 1], "went on, not from the start"
    for beta in ("0.5", "2", "3", "4"):
        assert record(job(sweep, f"beta_{beta},"))["status"] == "finished"


def test_a_failed_job_is_named_and_stops_nobody(killed_and_resumed: tuple[Path, str, dict[str, float]]) -> None:
    cwd, text, _ = killed_and_resumed
    failed = job(cwd / "sweep", "beta_-1,")
    assert record(failed)["status"] == "failed"
    assert (
        "Traceback" in (failed / "train.log").read_text() and "beta=-1 cannot be" in (failed / "train.log").read_text()
    )
    assert "Traceback" not in text
    table = [line.split() for line in text.split("nats per image:\n")[-1].splitlines()]
    rows = {line[0]: line[1:] for line in table if line and line[0].startswith("beta_")}
    test = record(job(cwd / "sweep", "beta_2,"))["test"]
    assert rows[job(cwd / "sweep", "beta_2,").name][:4] == [
        "finished",
        *(f"{test[name]:.2f}" for name in ("neg_elbo", "kl", "recon")),
    ]
    assert rows[failed.name] == ["failed"]
    assert f"failed: UserError: beta=-1 is invalid: expected a number >= 0 (sweep/{failed.name}/train.log)" in text


def test_tensorboard_compares_the_jobs(killed_and_resumed: tuple[Path, str, dict[str, float]]) -> None:
    from tensorboard import context
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    sweep = killed_and_resumed[0] / "sweep"
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(sweep))
    multiplexer.Reload()
    names = {job(sweep, f"beta_{beta},").name for beta in ("0.5", "2", "3", "4")}
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
        job(sweep, f"beta_{beta:g},").name: beta for beta in (0.5, 2.0, 3.0, 4.0)
    }
    shown = {group.name: {m.name.tag: m.value for m in group.metric_values}["test/neg_elbo"] for group in groups}
    assert shown == pytest.approx({name: record(sweep / name)["test"]["neg_elbo"] for name in names}, abs=1e-3)


def test_the_report_of_a_sweep(killed_and_resumed: tuple[Path, str, dict[str, float]]) -> None:
    cwd = killed_and_resumed[0]
    text = run("sweep=sweep", "out=report", cwd=cwd, script="scripts/sweep_report.py")
    rows = list(csv.DictReader((cwd / "report" / "table.csv").read_text().splitlines()))
    assert [row["beta"] for row in rows] == ["-1", "0.5", "2", "3", "4"]
    expected = record(job(cwd / "sweep", "beta_3,"))["test"]
    assert float(rows[3]["neg_elbo_mean"]) == pytest.approx(expected["neg_elbo"], abs=1e-3)
    assert (cwd / "report" / "table.md").read_text() in text
    for name in ("rate_distortion", "neg_elbo", "samples"):
        assert (cwd / "report" / f"{name}.png").stat().st_size > 5000
    error = run("sweep=sweep", "over=[betaa]", cwd=cwd, code=1, script="scripts/sweep_report.py")
    assert error == "error: over: betaa was not swept here; swept: beta\n"


def test_a_sheet_of_samples_has_room_for_many_settings(
    killed_and_resumed: tuple[Path, str, dict[str, float]], tmp_path: Path
) -> None:
    found = [setting for setting in report.group_jobs(killed_and_resumed[0] / "sweep") if setting.finished]
    many = [setting._replace(values={f"key_{i}": "value" for i in range(30)}) for setting in found]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Matplotlib's, that axes have no room
        save_figure(report.contact_sheet(many, 0), tmp_path / "samples.png")


def test_the_pages_sweep(tmp_path: Path, data: str) -> None:
    run(*readme("beta=0.25,1,4"), *SMALL, data, "trainer.max_epochs=1", "model.latent_dim=2,10", cwd=tmp_path)
    text = run(*readme("sweep_report"), cwd=tmp_path, script="scripts/sweep_report.py")
    assert "| 0.25 | 2 | 1/1 |" in text and (tmp_path / "sweep_report" / "neg_elbo.png").exists()


def write_job(sweep: Path, overrides: list[str], status: str, **test: float) -> None:
    folder = sweep / safe_name(",".join(overrides))
    folder.mkdir(parents=True)
    (folder / "overrides.yaml").write_text(json.dumps(overrides))
    content = {"status": status, "seconds": 3.0, "test": test} if test else {"status": status, "error": "E: why"}
    (folder / "metrics.json").write_text(json.dumps(content))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """beta=1: three seeds; beta=10: one seed, one failed; beta=2: one not begun."""
    for seed, value in zip("123", (1.0, 2.0, 6.0), strict=True):
        write_job(tmp_path, ["beta=1", f"seed={seed}"], "finished", neg_elbo=value, kl=value / 4, recon=0.75 * value)
    write_job(tmp_path, ["beta=10", "seed=1"], "finished", neg_elbo=4.0, kl=1.0, recon=3.0)
    write_job(tmp_path, ["beta=10", "seed=2"], "failed")
    task = ["beta=2", "seed=1"]
    hydra = {"sweeper": {"params": None}, "overrides": {"task": task}}
    (tmp_path / "multirun.yaml").write_text(json.dumps({"hydra": hydra}))
    return tmp_path


def test_tensorboard_is_named_where_a_job_has_written_for_it(made: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(jobs.SweepCallback, "folder", made)
    jobs.print_summary()
    assert capsys.readouterr().out.endswith(f"next  python scripts/sweep_report.py sweep={made}\n")
    (job(made, "beta_10,seed_2") / "events.out.tfevents.1").touch()
    jobs.print_summary()
    assert capsys.readouterr().out.endswith(f"sweep={made}\n      tensorboard --logdir {made}\n")


def test_the_table_is_exact_and_marks_what_failed_or_is_missing(made: Path) -> None:
    found = report.group_jobs(made)
    assert [setting.values["beta"] for setting in found] == ["1", "2", "10"], "numbers by size"
    assert found[0].mean_sd("neg_elbo") == pytest.approx((3.0, 7.0**0.5))
    lines = report.markdown(found).splitlines()
    assert lines[0] == "| beta | finished | neg. ELBO | rate | distortion | seconds |"
    assert lines[2] == "| 1 | 3/3 | 3.00 ± 2.65 | 0.75 ± 0.66 | 2.25 ± 1.98 | 3.0 ± 0.0 |"
    assert lines[3] == "| 2 | 0/1 (1 missing) |  |  |  |  |"
    assert lines[4] == "| 10 | 1/2 (1 failed) | 4.00 | 1.00 | 3.00 | 3.0 |"
    assert "Failed: beta_10,seed_2: E: why" in lines
    report.write_csv(found, made / "table.csv")
    rows = list(csv.DictReader((made / "table.csv").read_text().splitlines()))
    assert [[row[key] for key in ("finished", "failed", "missing")] for row in rows] == [
        ["3", "0", "0"],
        ["0", "0", "1"],
        ["1", "1", "0"],
    ]
    assert [row["neg_elbo_sd"] for row in rows] == ["2.64575", "", ""]


def test_charts_show_the_numbers(made: Path) -> None:
    (axes,) = report.rate_distortion(report.group_jobs(made)).axes
    assert axes.lines[0].get_xydata().tolist() == [[0.75, 2.25], [1.0, 3.0]]
    assert [text.get_text() for text in axes.texts] == ["β=1", "β=10"]
    (axes,) = report.metric_figure(report.group_jobs(made), None, "neg_elbo").axes
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 3.0], [10.0, 4.0]]
    for beta, value in (("1", 5.0), ("2", 7.0)):
        write_job(made, [f"beta={beta}", "model.latent_dim=2", "seed=1"], "finished", neg_elbo=value, kl=1, recon=1)
    found = report.group_jobs(made)
    (axes,) = report.metric_figure(found, ["beta", "model.latent_dim"], "neg_elbo").axes
    grid = axes.images[0].get_array()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "10"]
    assert grid.filled(-1).tolist() == [[5.0, 7.0, -1.0], [3.0, -1.0, 4.0]]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.tuples(KEYS, OVERRIDES), max_size=3), min_size=2, max_size=4))
def test_different_overrides_have_different_folders(jobs: list[list[tuple[str, str]]]) -> None:
    texts = [",".join(f"{key}={value}" for key, value in job) for job in jobs]
    names = [job_name(text) for text in texts]
    assert len({name.lower() for name in names}) == len(set(texts))
    assert all(re.fullmatch(r"[A-Za-z0-9.,_-]{1,200}", name) for name in names)


def test_folders_are_named_after_their_overrides() -> None:
    assert job_name("beta=0.5,model.latent_dim=2,seed=-1") == "beta_0.5,model.latent_dim_2,seed_-1"
    assert re.fullmatch("beta_1,model.hidden_dims_400,200_[0-9a-f]{8}", job_name("beta=1,model.hidden_dims=[400,200]"))
    assert re.fullmatch("trainer.benchmark_true_[0-9a-f]{8}", job_name("+trainer.benchmark=true"))


def test_values_that_look_alike_get_a_job_each(tmp_path: Path, data: str) -> None:
    names = ["'日本'", "'中国'", "d/x", "d_x"]
    text = run("-m", *SMALL, data, "trainer.max_epochs=1", f"name={','.join(names)}", "hydra.sweep.dir=s", cwd=tmp_path)
    assert f"{len(names)} jobs: {len(names)} finished" in text
    assert sorted(jobs.read_job(path.parent).overrides["name"] for path in tmp_path.glob("s/*/metrics.json")) == sorted(
        names
    )


@pytest.mark.parametrize("status", ["finished", "interrupted"])
def test_a_folder_is_for_one_job(tmp_path: Path, status: str) -> None:
    folder = RunFolder(tmp_path)
    folder.write_record({"status": status})
    folder.last.parent.mkdir()
    folder.last.touch()
    then = {"beta": 1.0, "runs": "a", "trainer": {"max_epochs": 3}, "model": {"hidden_dims": [4]}}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(then)))

    def earlier(**changes: object) -> str:
        return jobs.previous_status(folder, OmegaConf.merge(then, changes), ["beta=1"])

    assert earlier() == earlier(runs="b") == status
    assert earlier(trainer={"max_epochs": 3, "came_later": 1}) == status  # than the file was written
    for changes, said in (
        ({"beta": 2.0}, "holds a job with beta=1.0, and this one beta=2.0"),
        ({"trainer": {"max_epochs": 4}}, "trainer.max_epochs=3, and this one trainer.max_epochs=4"),
        ({"model": {"hidden_dims": [5]}}, r"model.hidden_dims=\[4\], and this one model.hidden_dims=\[5\]"),
    ):
        with pytest.raises(UserError, match=said):
            earlier(**changes)
    assert folder.last.exists()


def test_what_a_sweep_cannot_do_is_refused_in_one_sentence(tmp_path: Path, data: str) -> None:
    many = run("-m", "trainer=ddp", "beta=1,2", data, cwd=tmp_path, code=1)
    assert many == f"error: {distributed.ONE_DEVICE_MESSAGE}\n"
    resume = run("-m", "resume=a,b", data, cwd=tmp_path, code=1)
    assert resume.startswith("error: resume") and "hydra.sweep.dir" in resume and resume.count("\n") == 1
    typo = run("-m", "betaa=1,2", data, cwd=tmp_path, code=1)
    assert typo == "error: betaa is not a setting; did you mean beta?\n"
    assert not any(path.is_file() for path in tmp_path.rglob("*")), "nothing is left behind"


@needs("hydra_plugins.hydra_joblib_launcher")
def test_joblib_divides_the_threads(tmp_path: Path, data: str) -> None:
    args = [*readme("joblib"), *SMALL, data, "beta=1,-1,2", "seed=1", "hydra.sweep.dir=sweep"]
    text = fresh(TRAIN, *args, cwd=tmp_path, code=1, OMP_NUM_THREADS="")
    from joblib import cpu_count

    for beta in (1, 2):
        folder = job(tmp_path / "sweep", f"beta_{beta},")
        assert record(folder)["status"] == "finished" and record(folder)["threads"] == 1, cpu_count()
        assert f"{folder.name}  epoch   1/2" in text, "lines of jobs side by side say whose they are"


@needs("hydra_plugins.hydra_submitit_launcher")
def test_a_preempted_job_resumes_when_it_is_queued_again(tmp_path: Path, data: str) -> None:
    args = ["-m", "hydra/launcher=submitit_local", *SMALL, data, "trainer.max_epochs=30", "beta=1"]
    process = started(TRAIN, *args, "hydra.sweep.dir=sweep", cwd=tmp_path)
    wait_for(tmp_path, "sweep/beta_1,*/checkpoints/last.ckpt", process)
    os.kill(record(job(tmp_path / "sweep", "beta_1,"))["pid"], signal.SIGUSR2)  # as Slurm does to make room
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    folder = job(tmp_path / "sweep", "beta_1,")
    log = (folder / "train.log").read_text()
    assert "Requeued job" in log and record(folder)["status"] == "finished"
    assert "interrupted at step" in log  # saved there, so that no step is done twice
    assert [log.count(f"epoch {epoch:>3}/30") for epoch in (1, 30)] == [1, 1]


# What the launcher needs of Slurm, on this machine: an array's tasks run at once, and again if they asked to be queued.
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


@needs("hydra_plugins.hydra_submitit_launcher")
def test_the_slurm_preset_and_preemption(tmp_path: Path, data: str) -> None:
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in SLURM.items():
        code = f"#!{sys.executable}\nimport sys\nhere = {str(bin)!r}\n{textwrap.dedent(text)}"
        (bin / name).write_text(code)
        (bin / name).chmod(0o755)
    args = [*readme("submitit_slurm"), *SMALL, data, "trainer.max_epochs=30", "beta=1,2", "seed=1"]
    process = started(TRAIN, *args, "hydra.sweep.dir=sweep", cwd=tmp_path, PATH=f"{bin}:{os.environ['PATH']}")
    wait_for(tmp_path, "sweep/beta_1,*/checkpoints/last.ckpt", process)
    os.kill(record(job(tmp_path / "sweep", "beta_1,"))["pid"], signal.SIGUSR2)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "Warning" not in text, text
    for beta in (1, 2):
        folder = job(tmp_path / "sweep", f"beta_{beta},")
        log = (folder / "train.log").read_text()
        assert record(folder)["status"] == "finished" and ("Requeued job" in log) == (beta == 1)
        assert [log.count(f"epoch {epoch:>3}/30") for epoch in (1, 30)] == [1, 1]


@needs("hydra_plugins.hydra_ray_launcher")
def test_ray(tmp_path: Path, data: str) -> None:
    args = [*readme("ray"), *SMALL, data, "beta=1,-1", "seed=1", "hydra.sweep.dir=sweep"]
    fresh(TRAIN, *args, cwd=tmp_path, code=1)
    assert record(job(tmp_path / "sweep", "beta_1,"))["status"] == "finished"
    assert record(job(tmp_path / "sweep", "beta_-1,"))["status"] == "failed"


def test_two_processes_compute_what_one_computes(tmp_path: Path, data_root: str) -> None:
    run("1", data_root, cwd=tmp_path, script="tests/integration/two_processes.py")
    fresh(str(REPO / "tests" / "two_processes.py"), "2", data_root, cwd=tmp_path)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("1", "2"))
    for name, gradient in one["gradient"].items():
        torch.testing.assert_close(two["gradient"][name], gradient, rtol=1e-4, atol=1e-6)
    assert two["test"] == pytest.approx(one["test"], rel=1e-6)
    assert two["train"] == pytest.approx(one["train"], rel=1e-5) and "train/kl" in two["train"]
    assert two["noise"][0] != two["noise"][1], "each process draws its own"


def test_ddp_makes_one_run_whose_checkpoint_loads_anywhere(tmp_path: Path, data: str) -> None:
    args = [*readme("ddp"), *SMALL[1:], data, "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    args += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    text = fresh(TRAIN, *args, cwd=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert text.count("epoch   1/1") == 1 and "Warning" not in text
    assert len(list(folder.glob("events.*"))) == 1 and record(folder)["status"] == "finished"
    assert (folder / "train.log").read_text().count("test  loss") == 1
    assert checkpoint.load(folder).vae.latent_dim == 20
    assert run("n=4", cwd=tmp_path, script="scripts/sample.py").startswith("4 samples of")


def hostile(tmp_path: Path, task: list[str]) -> None:
    """A sweep whose YAML files hold interpolations that would read a secret or make a folder."""
    secret, folder = "${oc.env:SECRET}", f"${{run_dir:null,{tmp_path}/victim}}"
    sweep = tmp_path / "sweep"
    write_job(sweep, ["beta=1"], "failed")
    write_job(sweep, ["beta=2", f"name={secret}", "data.root=there", f"model.latent_dim={folder}"], "failed")
    here = sweep / "beta_1"
    (here / "config.yaml").write_text(json.dumps({"beta": 1, "name": secret, "data": folder, "model": {"x": folder}}))
    (sweep / "multirun.yaml").write_text(
        json.dumps({"hydra": {"sweeper": {"params": {"seed": secret}}, "overrides": {"task": task}}, "x": folder})
    )
    (here / "evaluation.json").write_text(
        '{"neg_elbo": {"mean": 1}, "nll_1": {"mean": 1}, "k": [1], "active_units": 1, "data": "d", "likelihood": "l",'
        '"images": 1, "note": "n"}'
    )
    (here / "metrics.json").write_text(
        '{"status": "failed", "error": "E", "fit_seconds": 1, "epochs": 1, "machine": "m", "threads": 1}'
    )


def test_a_report_of_a_shared_sweep_resolves_nothing(tmp_path: Path) -> None:
    hostile(tmp_path, ["beta=3,${oc.env:SECRET}", f"name=${{run_dir:null,{tmp_path}/victim}}"])
    how = {"cwd": tmp_path, "environment": {"SECRET": "hunter2"}}
    text = run("sweep=sweep", script="scripts/sweep_report.py", **how)
    assert "${oc.env:SECRET}" in text and "2 missing" in text
    text += run("runs=sweep", script="scripts/results.py", **how)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        text += path.read_text()
    assert "hunter2" not in text and not (tmp_path / "victim").exists()


@pytest.mark.parametrize("values", ["shuffle(range(1,1e12))", ",".join("ab" * 600)])
def test_a_sweep_that_claims_too_many_jobs_is_rejected(tmp_path: Path, values: str) -> None:
    hostile(tmp_path, [f"beta={values}", f"name={values}"])
    with pytest.raises(UserError, match=r"multirun\.yaml is too large"):
        jobs.read_jobs(tmp_path / "sweep")


def test_jobs_of_a_glob_are_not_listed_before_they_begin(tmp_path: Path) -> None:
    hostile(tmp_path, ["optimizer=glob(ad*)"])
    assert len(jobs.read_jobs(tmp_path / "sweep")) == 2


@pytest.mark.parametrize(("swept", "recompilations"), [("seed", 1), ("model.latent_dim", 19)])
def test_every_job_of_a_sweep_is_compiled(tmp_path: Path, swept: str, recompilations: int) -> None:
    """Jobs of one structure share their code, of other structures have their own: for whole and for last batches."""

    def prepare() -> None:
        torch._logging.set_logs(recompiles=True)
        compile_ = torch.compile
        torch.compile = lambda *args, **how: compile_(*args, **how, backend="aot_eager")  # type: ignore[assignment]

    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8))
    data = ["data=arrays", "data.root=images.npy", "data.batch_size=20", "data.validation_size=5", "data.test_size=4"]
    values = ",".join(map(str, range(1, 11)))
    args = ["trainer=fast", "trainer.max_epochs=1", *data, "model=mlp_small", f"{swept}={values}"]
    text = run("-m", *args, "hydra.sweep.dir=sweep", cwd=tmp_path, prepare=prepare)
    assert {job.status for job in jobs.read_jobs(tmp_path / "sweep")} == {"finished"}
    assert text.count("Recompiling function") == recompilations, text
    assert "recompile_limit" not in text
