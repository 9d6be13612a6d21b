"""Labels may be any integers: none is an index, and no allocation depends on their size."""

import json

import numpy as np
import pytest
import torch

from betavae.applications.explorer import queries
from betavae.metrics import features
from betavae.runtime import checkpoint
from tests.commands import TINY, run

LABELS = np.array([-1, 5, 10**9])


@pytest.mark.forked
def test_every_script_takes_labels_that_are_no_indices(tmp_path, monkeypatch):
    shades = np.arange(600) % 3
    noise = np.random.default_rng(0).integers(0, 60, (600, 8, 8))
    np.savez(tmp_path / "x.npz", images=(noise + 90 * shades[:, None, None]).astype(np.uint8), labels=LABELS[shades])
    data = ["data=arrays", "data.root=x.npz", "data.batch_size=50", "data.test_size=100"]
    run(*TINY, *data, "trainer.max_epochs=1", "hydra.run.dir=run", cwd=tmp_path)

    def script(name, *words):
        return run("ckpt=run", *words, cwd=tmp_path, script=f"scripts/{name}.py")

    script("evaluate", "k=2")
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["knn_accuracy"] > 0.9
    script("fidelity", "n=10", "sampler=gaussian")
    fidelity = json.loads((tmp_path / "run" / "fidelity.json").read_text())
    assert fidelity["test images"]["imbalance"]["mean"] <= 1
    for label in LABELS:
        script("sample", "sampler=gaussian", f"label={label}")
    script("interpolate", f"labels=[{LABELS[0]},{LABELS[2]}]")
    assert "AUROC" in script("detect", f"inliers=[{LABELS[0]},{LABELS[1]}]", "alpha=0.05")
    script("encode")
    assert set(np.load(tmp_path / "latents.npz")["labels"].tolist()) == set(LABELS.tolist())
    monkeypatch.chdir(tmp_path)
    model = checkpoint.load("run")
    images = model.subset("train")
    classifier = features.train_classifier(images, epochs=30)
    found = classifier.classify(classifier.features(images.pixels.float() / 255))
    assert (found == images.labels).float().mean() > 0.9
    state = queries.build_page_state(queries.load_models([model]))
    assert torch.equal(torch.tensor(state["labels"][0]), model.split("test").labels)
