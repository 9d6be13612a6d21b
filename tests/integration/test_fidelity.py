import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from betavae.data.datasets.mnist import load_mnist
from betavae.data.fingerprint import fingerprint
from betavae.data.source import DataSource
from betavae.metrics import features
from betavae.models.vae import VAE
from betavae.runtime import checkpoint
from tests.commands import run
from tests.conftest import DATA, MODEL, MODULE
from tests.unit.metrics.test_features import bars

FIDELITY = "scripts/fidelity.py"


def write_untrained_checkpoint(path, model, data, fingerprints=None):
    content = {"betavae_format": checkpoint.FORMAT, "hyper_parameters": MODULE | {"model": model}}
    content["state_dict"] = {f"vae.{key}": value for key, value in VAE(**model).state_dict().items()}
    content |= {"datamodule_hyper_parameters": data, "fingerprints": fingerprints or {}}
    checkpoint.save_checkpoint(content, path)


@pytest.mark.slow
def test_samplers_of_a_lone_checkpoint_are_scored(tmp_path, data_root):
    model = MODEL | {"hidden_dims": [16], "latent_dim": 3}
    write_untrained_checkpoint(tmp_path / "lone.ckpt", model, DATA | {"root": data_root})
    # An untrained classifier saves a minute.
    classifier = features.Classifier((1, 28, 28), torch.arange(10))
    cache = tmp_path / "runs" / "features" / "mnist.pt"
    value = {"state": classifier.state_dict(), "accuracy": 0.1}
    data = [fingerprint(load_mnist(Path(data_root), split), labels=True) for split in ("train", "test")]
    key = {"data": data, "shape": [1, 28, 28], "version": 2}
    features.load_or_compute(cache, key, lambda: value)
    words = ["ckpt=~/lone.ckpt", "runs=~/runs", "n=60", "repeats=2", "reference=500", "sampler=gaussian"]
    output = run(*words, cwd=tmp_path, script=FIDELITY, environment={"HOME": str(tmp_path)})
    result = json.loads((tmp_path / "fidelity.json").read_text())
    assert result["best"] == "gaussian" and result["fid"] == result["gaussian"]["fid"] and result["images"] == 60
    rows = {name: result[name] for name in ("gaussian", "reconstructions", "test images")}
    assert all(row["fid"]["se"] > 0 and 0 <= row["recall"]["mean"] <= 1 for row in rows.values())
    # An untrained model does not generate digits.
    assert rows["test images"]["pixel_fid"]["mean"] < rows["gaussian"]["pixel_fid"]["mean"]
    assert rows["test images"]["precision"]["mean"] > 0.5 > rows["gaussian"]["recall"]["mean"]
    cells = re.search(r"^gaussian((?: +[-\d.e]+ ± [-\d.e]+)+)$", output, re.MULTILINE)[1]
    shown = [tuple(map(float, cell.split(" ± "))) for cell in re.split(" {2,}", cells.strip())]
    for (mean, se), score in zip(shown, result["gaussian"].values(), strict=True):
        assert se == pytest.approx(score["se"], rel=0.1)
        assert mean == pytest.approx(score["mean"], rel=1e-3, abs=0.5 * (score["se"] >= 10))
    assert (tmp_path / "figures" / "fidelity.png").stat().st_size > 1000
    assert len(list(tmp_path.glob("sampler_gaussian_*.pt"))) == 1


@pytest.fixture
def score_few(tmp_path):
    """Return a function that scores an untrained model; it returns the result and the output."""
    images = bars(160)
    np.savez(tmp_path / "bars.npz", images=images.pixels.numpy(), labels=images.labels.numpy())
    source = {"name": "arrays", "root": str(tmp_path / "bars.npz"), "validation_size": 0.1, "test_size": 40}
    loaded = DataSource(**source, binarize="none")
    splits = loaded.load_training() | {"test": loaded.load_split("test")}
    fingerprints = {split: fingerprint(images) for split, images in splits.items()}
    model = MODEL | {"hidden_dims": [16], "latent_dim": 2, "image_shape": [1, 12, 12]}
    write_untrained_checkpoint(tmp_path / "lone.ckpt", model, DATA | source | {"batch_size": 10}, fingerprints)

    def score(*words):
        output = run("ckpt=lone.ckpt", "runs=.", "repeats=2", *words, cwd=tmp_path, script=FIDELITY)
        return json.loads((tmp_path / "fidelity.json").read_text()), output

    return score


def test_few_images_are_scored_by_their_pixels(score_few, tmp_path):
    result, output = score_few("sampler=knn")
    assert "120 training images are too few to learn features from" in output
    assert result["images"] == 20 and "features" not in result and "imbalance" not in result["knn"]
    assert all(math.isfinite(cell["mean"]) for cell in result["knn"].values())
    assert not (tmp_path / "features").exists()
    for invalid in (["repeats=2", "reference=5"], ["repeats=5"]):
        output = run("ckpt=lone.ckpt", *invalid, cwd=tmp_path, script=FIDELITY, code=1)
        assert "expected at least 10 images in each repeat" in output


def test_results_of_samplers_are_merged_if_made_the_same_way(score_few, tmp_path):
    first, _ = score_few("sampler=gaussian")
    both, _ = score_few("sampler=prior")
    assert both["gaussian"] == first["gaussian"] and both["test images"] == first["test images"]
    assert both["best"] == min("prior", "gaussian", key=lambda name: both[name]["fid"]["mean"])
    assert both["fid"] == both[both["best"]]["fid"]
    again, output = score_few("sampler=gaussian")
    assert again == both and "dropped" not in output
    alone, output = score_few("sampler=prior", "n=15")
    assert "results of gaussian are dropped: made with another images" in output
    assert "gaussian" not in alone and alone["best"] == "prior" and alone["fid"] == alone["prior"]["fid"]
    # Another checkpoint of the same name.
    content = checkpoint.read_checkpoint(tmp_path / "lone.ckpt")
    content["state_dict"] = {key: value + 0.01 for key, value in content["state_dict"].items()}
    checkpoint.save_checkpoint(content, tmp_path / "lone.ckpt")
    assert "prior" not in score_few("sampler=gaussian", "n=15")[0]
