"""Claiming, locking and clearing of run folders, and their records."""

import errno
import json

import pytest

from betavae.errors import UserError
from betavae.runtime import run_folder
from betavae.runtime.loggers import CSVRunLogger, TensorBoard
from betavae.runtime.run_folder import MARKER_FILE, RUN, SWEEP, RunFolder, claim_folder, read_marker
from tests.commands import TINY, run


def test_only_an_empty_or_own_folder_is_claimed(tmp_path):
    assert claim_folder(tmp_path / "new", RUN, "k") and read_marker(tmp_path / "new") == RUN
    assert not claim_folder(tmp_path / "new", RUN, "k")
    with pytest.raises(UserError, match=r"k: .*new is a run of betavae, not a sweep of betavae"):
        claim_folder(tmp_path / "new", SWEEP, "k")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / MARKER_FILE).write_text("something else")
    with pytest.raises(UserError, match="something else, not a run"):
        claim_folder(tmp_path / "theirs", RUN, "k")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"k: .*file"):
        claim_folder(tmp_path / "file", RUN, "k")


def test_a_folder_with_other_files_is_not_claimed(tmp_path):
    (tmp_path / "thesis.tex").touch()
    claim_folder(tmp_path / "foo", RUN, "k")
    (tmp_path / "foo" / "config.yaml").touch()
    with pytest.raises(UserError, match="is not empty and not a sweep of betavae"):
        claim_folder(tmp_path, SWEEP, "k")


def test_only_own_files_are_deleted(tmp_path):
    claim_folder(tmp_path, RUN, "k")
    ours = ["config.yaml", "train.log", "checkpoints/last.ckpt", "events.out.tfevents.1795527689.vm.4552.0"]
    ours += ["projector/posterior_means/tensors.tsv", "checkpoints/last.ckpt.abc.part"]
    theirs = ["notes", "events.out.tfevents.mine", "curves.csv", "checkpoints/kept.ckpt", "figures/mine.png"]
    theirs += ["projector/posterior_means/mine/x", "evaluation.json", "fidelity.json", "paper.part"]
    theirs += ["betavae-part-01234567/of an export into this folder"]
    for name in (*ours, *theirs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    folder = RunFolder(tmp_path)
    folder.delete_regenerated()
    TensorBoard(folder, None)
    CSVRunLogger(folder, None)
    assert not list(tmp_path.glob("events.*.0"))
    assert all((tmp_path / name).exists() for name in theirs)
    RunFolder(tmp_path).delete_outputs()
    assert not any((tmp_path / name).exists() for name in ours)
    assert all((tmp_path / name).exists() for name in theirs)


@pytest.mark.parametrize(("status", "left"), [("finished", "failed"), ("interrupted", "interrupted")])
def test_a_full_disk_leaves_a_true_status(tmp_path, monkeypatch, status, left):
    folder = RunFolder(tmp_path)
    folder.write_record({"status": "running", "seed": 1})

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "atomic_write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        folder.write_record({"status": status, "test": {"loss": 1.0}})
    assert folder.read_metrics()["status"] == left


def test_a_damaged_record_is_empty(tmp_path):
    (tmp_path / "metrics.json").write_text('{"status": "fini')
    assert RunFolder(tmp_path).read_metrics() == {} and RunFolder(tmp_path).status() == ""


def test_reading_the_status_takes_no_lock(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_record({"status": "running"})
    assert folder.status() == "interrupted"
    with folder.lock():
        assert folder.is_locked() and folder.is_locked() and folder.status() == "running"
        with pytest.raises(UserError, match="in use by another process"), RunFolder(tmp_path).lock():
            pass
    assert not folder.is_locked()


def test_recorded_times_are_those_of_the_whole_run(tmp_path, data_root):
    run(*TINY, f"data.root={data_root}", "hydra.run.dir=run", cwd=tmp_path)
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["epochs"] == 4 and len(record["epoch_seconds"]) == 4
    assert record["seconds"] >= record["fit_seconds"] >= sum(record["epoch_seconds"]) > 0


@pytest.mark.slow
def test_a_failed_command_keeps_an_existing_folder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run("resume=one", cwd=tmp_path, code=1)
    run("hydra.run.dir=two", "beta=-1", cwd=tmp_path, code=1)
    run("hydra.run.dir=three", "beta=-1", cwd=tmp_path, code=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_evaluate_keeps_a_foreign_partial_file(tmp_path, data_root):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "evaluation.part").write_text("mine")
    run(*TINY, f"data.root={data_root}", "hydra.run.dir=run", cwd=tmp_path)
    words = ["ckpt=run", "out=d", "k=1", "max_images=40", "probes=false"]
    text = run(*words, cwd=tmp_path, script="scripts/evaluate.py", code=1)
    assert "evaluation.part already exists" in text and (tmp_path / "d" / "evaluation.part").read_text() == "mine"
