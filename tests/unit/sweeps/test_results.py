import json
from pathlib import Path

import pytest

from betavae.errors import UserError
from betavae.runtime.yaml_files import read_yaml
from betavae.storage.files import hash_file
from betavae.sweeps import report, results
from tests.conftest import REPO
from tests.unit.sweeps.conftest import write_job, write_plan


def test_measurements_of_scripts_are_metrics_of_a_job(tmp_path: Path) -> None:
    measured = {"made_by": "betavae", "seed": 0, "best": "mixture", "fid": {"mean": 1.5, "se": 0.1}}
    (tmp_path / "fidelity.json").write_text(json.dumps(measured | {"mixture": {"fid": {"mean": 1.5, "se": 0.1}}}))
    (tmp_path / "evaluation.json").write_text(json.dumps({"neg_elbo": {"mean": 7.0}, "nll_10": {"mean": 6.5}}))
    job = results.Job(tmp_path, "finished", {}, {"test": {"neg_elbo": 7.25}, "seconds": 3})
    wanted = {"neg_elbo": 7.25, "nll_10": 6.5, "fid": 1.5, "mixture.fid": 1.5, "seconds": 3}
    assert results.read_job_metrics(job) == wanted
    group = results.SettingGroup({"beta": "1"}, [job])
    assert group.mean_sd("fid")[0] == 1.5
    assert report.list_table_metrics([group]) == ["neg_elbo", "fid", "nll_10", "seconds"]
    assert "mixture.fid" in report.list_metrics([group])


def test_groups_are_sorted_by_value_and_average_seeds(sweep: Path) -> None:
    groups = results.group_jobs(sweep)
    assert [group.values["beta"] for group in groups] == ["1", "2", "10"]
    assert groups[0].mean_sd("neg_elbo") == pytest.approx((3.0, 7.0**0.5))


def test_equal_numbers_are_one_setting(tmp_path: Path) -> None:
    for number, beta in enumerate(("1", "1.0", "2")):
        write_job(tmp_path, [f"beta={beta}", f"seed={number}"], "finished", neg_elbo=1.0)
    assert [len(group.jobs) for group in results.group_jobs(tmp_path)] == [2, 1]


def test_a_repeated_command_with_a_traceback_plans_the_same_jobs(tmp_path: Path) -> None:
    write_job(tmp_path, ["beta=1"], "finished", neg_elbo=1.0)
    write_plan(tmp_path, ["beta=1", "traceback=true", "tags=[a]"])
    assert [job.status for job in results.read_jobs(tmp_path)] == ["finished"]
    write_plan(tmp_path, [])
    assert [job.status for job in results.read_jobs(tmp_path)] == ["finished", "missing"]


def test_unnamed_keys_are_those_of_the_config() -> None:
    hydra = read_yaml(REPO / "configs" / "train.yaml")["hydra"]
    assert list(results.UNNAMED_KEYS) == hydra["job"]["config"]["override_dirname"]["exclude_keys"]


def test_a_measurement_of_earlier_weights_is_no_metric(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    checkpoint = tmp_path / "checkpoints" / "best.ckpt"
    checkpoint.write_bytes(b"weights")
    content = {"checkpoint": "checkpoints/best.ckpt", "sha256": hash_file(checkpoint), "nll_10": {"mean": 6.5}}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    job = results.Job(tmp_path, "finished", {}, {"test": {}, "seconds": 3})
    assert results.read_job_metrics(job) == {"nll_10": 6.5, "seconds": 3}
    checkpoint.write_bytes(b"WEIGHTS")
    assert results.read_job_metrics(job) == {"seconds": 3}


@pytest.mark.parametrize("values", ["shuffle(range(1,1e12))", ",".join("ab" * 600)])
def test_a_plan_of_too_many_jobs_is_rejected(tmp_path: Path, values: str) -> None:
    write_plan(tmp_path, [f"beta={values}", f"name={values}"])
    with pytest.raises(UserError, match=r"multirun\.yaml is too large"):
        results.read_jobs(tmp_path)


def test_planned_jobs_of_a_glob_are_not_listed(tmp_path: Path) -> None:
    write_job(tmp_path, ["optimizer=adam"], "failed")
    write_plan(tmp_path, ["optimizer=glob(ad*)"])
    assert [job.status for job in results.read_jobs(tmp_path)] == ["failed"]


def test_missing_jobs_of_a_paired_sweep_are_listed(tmp_path: Path) -> None:
    write_job(tmp_path, ["beta=4", "seed=1", "model.latent_dim=2"], "failed")
    write_plan(tmp_path, ["beta=4,1", "seed=1,2", "model.latent_dim=2,20"], crossed=["seed"])
    found = [
        (job.status, *(job.overrides[key] for key in ("beta", "model.latent_dim", "seed")))
        for job in results.read_jobs(tmp_path)
    ]
    missing = [("missing", "4", "2", "2"), ("missing", "1", "20", "1"), ("missing", "1", "20", "2")]
    assert found == [("failed", "4", "2", "1"), *missing]
    # The number of pairs counts, not that of all combinations.
    values = ",".join(map(str, range(1500)))
    write_plan(tmp_path, [f"beta={values}", f"name={values}"], crossed=["seed"])
    assert len(results.read_jobs(tmp_path)) == 1 + 1500


def test_objectives_come_from_validation_or_the_record() -> None:
    record = {"validation": {"neg_elbo": 100.5, "kl": 20.0}, "test": {"neg_elbo": 1.0}, "seconds": 3.0, "parameters": 7}
    assert results.get_objectives(record, ["kl", "seconds"]) == [20.0, 3.0]
    assert results.get_objectives(record, ["parameters"]) == [7.0]
    assert results.get_objectives(record, ["kl", "recon"]) == []
