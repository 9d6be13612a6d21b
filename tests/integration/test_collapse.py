"""Training and the scripts report a posterior collapse, and none in a model that uses z."""

import json

import pytest

from tests.commands import run

NOTE = "posterior collapse: the decoder ignores z"


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "collapsed"), [(["beta=100"], True), (["model.latent_dim=2"], False)])
def test_a_collapse_is_reported_by_each_command(workdir, tmp_path, settings, collapsed):
    folder = tmp_path / "run"
    small = ["trainer=smoke", "callbacks.figures_every_n_epochs=0", f"hydra.run.dir={folder}"]
    outputs = [run(*small, *settings, cwd=workdir)]
    for script, *words in (
        ("traverse", f"out={tmp_path}/a.png"),
        ("reconstruct", f"out={tmp_path}/b.png"),
        ("evaluate", "k=1", "max_images=200", "probes=false"),
    ):
        outputs.append(run(f"ckpt={folder}", *words, cwd=workdir, script=f"scripts/{script}.py"))
    assert [output.count(NOTE) for output in outputs] == [collapsed] * 4
    record = json.loads((folder / "metrics.json").read_text())
    assert record.get("posterior_collapse", "").startswith(NOTE) == collapsed
