from pathlib import Path

import pytest
from omegaconf import OmegaConf

from betavae.errors import UserError
from betavae.runtime.run_folder import RunFolder
from betavae.sweeps import jobs


def test_the_summary_names_tensorboard_if_a_job_wrote_events(sweep: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(jobs.SweepCallback, "folder", sweep)
    jobs.print_summary()
    assert capsys.readouterr().out.endswith(f"next  python scripts/sweep_report.py sweep={sweep}\n")
    (sweep / "beta_10,seed_2" / "events.out.tfevents.1").touch()
    jobs.print_summary()
    assert capsys.readouterr().out.endswith(f"sweep={sweep}\n      tensorboard --logdir {sweep}\n")


@pytest.mark.parametrize("status", ["finished", "interrupted"])
def test_a_job_folder_accepts_one_config_only(tmp_path: Path, status: str) -> None:
    folder = RunFolder(tmp_path)
    folder.write_record({"status": status})
    folder.last.parent.mkdir()
    folder.last.touch()
    config = {"beta": 1.0, "runs": "a", "trainer": {"max_epochs": 3}, "model": {"hidden_dims": [4]}}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))

    def find_status(**changes: object) -> str:
        return jobs.find_previous_status(folder, OmegaConf.merge(config, changes))

    assert find_status() == find_status(runs="b") == status
    for changes, message in (
        ({"beta": 2.0}, "holds a job with beta=1.0, and this job has beta=2.0"),
        ({"trainer": {"max_epochs": 4}}, "trainer.max_epochs=3, and this job has trainer.max_epochs=4"),
        ({"model": {"hidden_dims": [5]}}, r"model.hidden_dims=\[4\], and this job has model.hidden_dims=\[5\]"),
    ):
        with pytest.raises(UserError, match=message):
            find_status(**changes)
    assert folder.last.exists()
