import json
import re

import pytest
import torch

from betavae.metrics import disentanglement
from betavae.metrics.disentanglement import mig
from betavae.runtime import checkpoint, evaluation
from betavae.sweeps import report
from tests.commands import run
from tests.integration.test_readme import PAGES, commands, small


@pytest.mark.slow
def test_a_report_measures_only_jobs_without_scores(tmp_path, monkeypatch):
    sweep, small = tmp_path / "sweep", ["data=sprites", "data.image_size=32", "data.root=none"]
    run(
        *("-m", *small, "trainer=smoke", "trainer.limit_train_batches=2", "callbacks.figures_every_n_epochs=0"),
        *(
            "model.hidden_dims=[16]",
            "model.latent_dim=3",
            "objective=beta_tcvae,capacity_vae",
            f"hydra.sweep.dir={sweep}",
        ),
        cwd=tmp_path,
    )
    first, _ = sorted(path for path in sweep.iterdir() if path.is_dir())
    output = run(
        f"ckpt='{first}'", "max_images=600", "latents=sample", cwd=tmp_path, script="scripts/disentanglement.py"
    )
    few = run(f"ckpt='{first}'", "max_images=100", cwd=tmp_path, script="scripts/disentanglement.py", code=1)
    assert "max_images=100 is invalid for 100 test images: disentanglement scores need at least 500" in few
    both = run(f"ckpt='{first}'", cwd=tmp_path, script="scripts/interpolate.py", code=1)
    assert "these data have several factors, not one label; pass images=[0,7]" in both
    saved = json.loads((first / "disentanglement.json").read_text())
    assert saved["images"] == 600 and saved["latents"] == "sample"
    for name in disentanglement.SCORES:
        assert f"{name:<22}{saved[name]['value']:7.3f} ± {saved[name]['se']:.3f}" in output
    loaded = checkpoint.load(str(first), "")
    x, values = loaded.images("test", max_images=600)
    assert (values.amax(0) - values.amin(0)).tolist() == [2, 5, 39, 31, 31]  # the whole range of each factor
    noise = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = loaded.vae.encode(x).rsample(noise)
    assert saved["mig"]["value"] == pytest.approx(mig(latents, values), rel=1e-6)

    measured = []

    def stub(z, v, seed):
        measured.append(z.shape)
        return {"mig": {"value": 0.75, "se": 0.1}}

    monkeypatch.setattr(evaluation, "compute_scores_with_errors", stub)
    report.write_report(sweep, tmp_path / "report", None, "mig", 0)
    assert measured == [(10_000, 3)]
    table = (tmp_path / "report" / "table.md").read_text()
    assert "MIG" in table and "0.75" in table and f"{saved['mig']['value']:.2f}" in table
    assert (tmp_path / "report" / "mig.png").exists()
    report.write_report(sweep, tmp_path / "report", None, "mig", 0)
    assert len(measured) == 1


@pytest.mark.slow
def test_data_without_factors_are_rejected(tmp_path, data_root):
    train = ["trainer=smoke", "trainer.limit_train_batches=2", f"data.root={data_root}", "model=mlp_small"]
    run(*train, "hydra.run.dir=mnist", cwd=tmp_path)
    output = run("ckpt=mnist", cwd=tmp_path, script="scripts/disentanglement.py", code=1)
    assert "data.name=mnist has no factors" in output and "data=sprites" in output
    assert not (tmp_path / "mnist" / "disentanglement.json").exists()


@pytest.mark.slow
def test_commands_of_the_disentanglement_page_work(tmp_path):
    """Run them in order with smaller models and images, and with a stub for the scores of 10,000 images."""

    def stub(z, v, seed):
        assert z.shape == (10_000, 10) and v.shape == (10_000, 5)
        return {"mig": {"value": 0.123, "se": 0.1}}

    for command in commands(PAGES["disentanglement.md"]):
        script, words = small(command)
        if script == "train.py":
            words += ["model.hidden_dims=[16]", "data.image_size=32"]
            words = [re.sub(r"^seed=.*", "seed=1", word) for word in words]
        prepare = (lambda: setattr(evaluation, "compute_scores_with_errors", stub)) if "report" in script else None
        output = run(*words, cwd=tmp_path, script=script, prepare=prepare)
        assert "Warning" not in output and "Traceback" not in output
        if "kl_decomposition" in command:
            assert {"mutual_information", "total_correlation", "dimension_wise_kl"} <= set(
                read_latest_test_metrics(tmp_path)
            )
    assert "0.12" in output and "MIG" in output and (tmp_path / "sweep_report" / "mig.png").exists()


def read_latest_test_metrics(folder):
    newest = max((folder / "runs").glob("*/metrics.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())["test"]
