import json
from pathlib import Path

import pytest

from betavae.runtime.hydra_config import safe_name


def write_job(sweep: Path, overrides: list[str], status: str, **test: float) -> Path:
    """Write the folder of a job."""
    folder = sweep / safe_name(",".join(overrides))
    folder.mkdir(parents=True)
    (folder / "overrides.yaml").write_text(json.dumps(overrides))
    content = {"status": status, "seconds": 3.0, "test": test} if test else {"status": status, "error": "E: why"}
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


def write_plan(sweep: Path, task: list[str], **sweeper: object) -> None:
    """Write the multirun.yaml of a sweep with the overrides `task`."""
    hydra = {"sweeper": {"params": None, **sweeper}, "overrides": {"task": task}}
    (sweep / "multirun.yaml").write_text(json.dumps({"hydra": hydra}))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Write a sweep: beta=1 with three seeds, beta=10 with one that failed, beta=2 without a folder."""
    for seed, value in zip("123", (1.0, 2.0, 6.0), strict=True):
        write_job(tmp_path, ["beta=1", f"seed={seed}"], "finished", neg_elbo=value, kl=value / 4, recon=0.75 * value)
    write_job(tmp_path, ["beta=10", "seed=1"], "finished", neg_elbo=4.0, kl=1.0, recon=3.0)
    write_job(tmp_path, ["beta=10", "seed=2"], "failed")
    write_plan(tmp_path, ["beta=2", "seed=1"])
    return tmp_path
