import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from betavae import data
from betavae.data import DATASETS
from betavae.data.source import DataSource
from betavae.errors import UserError
from betavae.models.vae import VAE
from betavae.runtime import checkpoint
from tests.conftest import DATA, MODEL, MODULE
from tests.unit.data.conftest import numbered

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("name", DATASETS)
def test_a_path_from_a_checkpoint_is_only_read(tmp_path, monkeypatch, name):
    victim = tmp_path / "victim"
    fixed = {"arrays": victim / "x.npz", "folder": victim, "table": victim / "x.npy"}
    victim.mkdir()
    np.savez(victim / "x.npz", images=np.zeros((20, 28, 28), np.uint8))
    np.save(victim / "x.npy", np.zeros((20, 3)))
    for i in range(20):
        Image.new("L", (28, 28), i).save(victim / f"{i}.png")
    before = {path: path.stat().st_mtime_ns for path in (victim, *victim.rglob("*"))}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    settings = {"folder": {"image_size": 28, "cache": str(victim)}}.get(name, {})
    stored = DATA | {"name": name, "root": str(fixed.get(name, victim)), "validation_size": None} | settings
    run = checkpoint.TrainedRun(VAE(**MODEL), Path("a.ckpt"), MODULE, stored)
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # a download would fail with another message
    if name in ("mnist", "sprites"):
        assert len(run.subset("test")) == 10_000
    else:  # this run has no fingerprints
        with pytest.raises(UserError, match=r"have changed|is not in .* with data_root=PATH|dsprites.* is missing"):
            run.subset("test")
    assert before == {path: path.stat().st_mtime_ns for path in (victim, *victim.rglob("*"))}


def test_validation_images_are_held_out_from_a_fixed_seed(make_datamodule):
    a, b, whole = make_datamodule(seed=0), make_datamodule(seed=9), make_datamodule(validation_size=0)
    assert [len(a.splits[split]) for split in SPLITS] == [55000, 5000, 10000]
    assert torch.equal(a.splits["validation"].pixels, b.splits["validation"].pixels)
    assert len(whole.splits["train"]) == 60000 and whole.val_dataloader() == []
    # Together, the two splits are the training set: no image is lost, and none is there twice.
    sums = [s.pixels.long().sum((1, 2, 3)) * 10 + s.labels for s in (a.splits["train"], a.splits["validation"])]
    images = whole.splits["train"]
    all_sums = images.pixels.long().sum((1, 2, 3)) * 10 + images.labels
    assert torch.equal(torch.cat(sums).sort().values, all_sums.sort().values)


@pytest.mark.parametrize(("size", "count"), [(0.1, 6000), (1e-6, 1), (59_999, 59_999)])
def test_validation_size_is_a_share_or_a_count(data_root, size, count):
    splits = DataSource("mnist", data_root, size, "none").load_training()
    assert [len(splits[split]) for split in ("train", "validation")] == [60_000 - count, count]


def test_a_validation_size_of_all_images_is_rejected(data_root):
    with pytest.raises(UserError, match=r"data.validation_size=60000 is invalid: .* at least 1 of 60000 images"):
        DataSource("mnist", data_root, 60_000, "none").load_training()


@pytest.fixture
def custom(monkeypatch):
    """Register a data set with its own validation images and a setting; return what it was called with."""
    sizes = {"train": 50, "validation": 20, "test": 10}
    calls = []

    def load_custom(root, split, shade=3):
        calls.append((root, split, shade))
        return numbered(sizes[split], torch.full((sizes[split], 1, 2, 2), shade, dtype=torch.uint8))

    monkeypatch.setitem(data.DATASETS, "custom", load_custom)
    return calls


def test_own_validation_images_are_taken(make_datamodule, custom):
    made = make_datamodule(name="custom", shade=7, batch_size=5, validation_size=None)
    assert {name: len(images) for name, images in made.splits.items()} == {"train": 50, "validation": 20, "test": 10}
    assert {shade for _, _, shade in custom} == {7} and made.splits["validation"].pixels.unique().tolist() == [7]
    assert made.image_shape == [1, 2, 2] and made.fingerprints == {}


def test_invalid_settings_are_rejected(make_datamodule, custom):
    for settings, message in (
        ({"name": "custom", "color": 7}, "data.color is not a setting of data.name=custom"),
        ({"name": "cats"}, "data.name=cats is invalid: expected one of mnist, .*custom"),
        ({"name": "custom", "validation_size": None, "batch_size": 51}, "data.batch_size=51 is invalid: .* at most 50"),
        ({"name": "custom", "validation_size": 5}, "data.validation_size=5 is invalid: expected null or 0"),
    ):
        with pytest.raises(UserError, match=message):
            make_datamodule(**settings)


def test_loaders_have_the_splits_and_batch_sizes(make_datamodule):
    made = make_datamodule(batch_size=999, eval_batch_size=500)
    x, label = next(iter(made.train_dataloader()))
    assert x.shape == (999, 1, 28, 28) and len(label) == 999 and len(made.train_dataloader()) == 56
    assert len(made.val_dataloader()) == 10 and len(made.test_dataloader()) == 20
    assert torch.equal(torch.cat([label for _, label in made.test_dataloader()]), made.splits["test"].labels)


@pytest.mark.parametrize("overfit", [0, 1])
def test_loaders_follow_the_trainer(make_datamodule, overfit):
    made = make_datamodule(validation_size=59_900, batch_size=10)
    strategy = SimpleNamespace(root_device=torch.device("meta"))
    made.trainer = SimpleNamespace(
        overfit_batches=overfit, current_epoch=0, strategy=strategy, global_rank=0, world_size=2
    )
    loader = made.train_dataloader()
    assert loader.device.type == loader.images.labels.device.type == "meta" and len(loader) == 5
    loader.images = made.splits["train"]
    orders = []
    for made.trainer.current_epoch in (0, 1):
        orders.append(torch.cat(list(loader.indices())))
    assert torch.equal(*orders) == bool(overfit)


def test_binarization_is_fixed_for_evaluation_only(make_datamodule):
    gray, threshold, dynamic = (make_datamodule(binarize=mode) for mode in ("none", "threshold", "dynamic"))
    pixels = gray.splits["test"].pixels
    assert torch.equal(threshold.splits["test"].pixels == 255, pixels > 127)
    x, _ = next(iter(threshold.train_dataloader()))
    assert torch.equal(x, next(iter(gray.train_dataloader()))[0].gt(0.5).float())
    fixed = dynamic.splits["test"].pixels
    assert torch.equal(fixed, make_datamodule(binarize="dynamic", seed=8).splits["test"].pixels)
    assert set(fixed.unique().tolist()) == {0, 255}
    assert torch.equal(dynamic.splits["train"].pixels, gray.splits["train"].pixels)
    first, second = (next(iter(dynamic.train_dataloader()))[0] for _ in range(2))
    assert set(first.unique().tolist()) == {0.0, 1.0} and not torch.equal(first, second)


def test_only_the_data_module_imports_lightning():
    code = "import sys, betavae.data.source, betavae.data.image_io; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "betavae.data.source" in modules and not {"lightning", "hydra", "pydantic"} & set(modules)
