"""Checkpoints and run folders of older versions."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from betavae.running import checkpoint
from betavae.running.run_folder import MARK
from tests.commands import run

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def old(tmp_path, data_root):
    """A folder with a run of format 1, of dynamically binarised images, interrupted in its third epoch."""
    shutil.copytree(FIXTURES / "run_format1", tmp_path / "run")
    (tmp_path / "data").symlink_to(data_root)
    return tmp_path


def test_a_run_of_format_1_goes_on_and_ends_as_it_would_have(old):
    text = run("resume=run", cwd=old)
    assert "epoch   3/4" in text and "epoch   4/4" in text and "epoch   2/4" not in text
    expected = json.loads((FIXTURES / "run_format1_whole.json").read_text())
    found = json.loads((old / "run" / "metrics.json").read_text())
    assert found["status"] == "finished"
    for key in ("epochs", "steps", "checkpoint", "parameters", "seed"):
        assert found[key] == expected[key]
    for key in ("test", "validation"):
        assert {name: found[key][name] for name in expected[key]} == pytest.approx(expected[key], rel=1e-3)
    assert "4 samples of run" in run("ckpt=run", "n=4", cwd=old, script="scripts/sample.py")
    assert checkpoint.read(old / "run" / "checkpoints" / "last.ckpt")["betavae_format"] == checkpoint.FORMAT

    # A finished one of that time has pictures without our stamp, and no mark. It can be trained longer.
    (old / "run" / MARK).unlink(missing_ok=True)
    for picture in (old / "run" / "figures").iterdir():
        Image.new("L", (4, 4)).save(picture)
    assert "epoch   5/5" in run("resume=run", "trainer.max_epochs=5", cwd=old)
    assert Image.open(old / "run" / "figures" / "samples.png").size != (4, 4)


def test_a_checkpoint_of_format_1_is_a_model_like_any_other(old):
    for name in ("best", "last"):
        loaded = checkpoint.load(old / "run" / "checkpoints" / f"{name}.ckpt")
        assert loaded.vae.sample(3).shape == (3, 1, 28, 28) and loaded.data["binarize"] == "dynamic"
    out = old / "samples.png"
    run("ckpt=run/checkpoints/best.ckpt", "n=4", f"out={out}", cwd=old, script="scripts/sample.py")
    assert out.exists()


def test_the_sums_of_an_epoch_under_way_are_todays(old):
    curves = checkpoint.read(old / "run" / "checkpoints" / "last.ckpt")["callbacks"]["Curves"]
    images = curves["epoch_images"] + sum(curves["interval"][1])
    assert images == 4 * 128  # 20 steps in all, 8 an epoch
    sums = [curves["epoch"], *curves["interval"][0]]
    for terms in sums:
        assert set(terms) == {"loss", "recon", "kl", "neg_elbo"}
        assert terms["neg_elbo"].item() == pytest.approx((terms["recon"] + terms["kl"]).item())
    assert 400 < sum(terms["neg_elbo"].item() for terms in sums) / images < 600
