"""Changed data are rejected with a checkpoint, so that images that a model has seen never count as unseen."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from betavae.errors import UserError
from betavae.runtime import checkpoint
from tests.commands import TINY, run

SPLITS = ("train", "validation", "test")
PIXELS = np.random.default_rng(0).integers(0, 256, (300, 8, 8), np.uint8)
COUNTS = ["data.test_size=60", "data.validation_size=60"]
EVALUATE = ["ckpt=run", "probes=false", "k=2", "out=out"]
SHARES = ["data.test_size=0.2", "data.validation_size=0.2"]


def write_images(folder, pixels):
    folder.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03}.png")


def write_array(path, pixels):
    np.save(path, pixels)


def append(folder):
    for i, image in enumerate(255 - PIXELS[:60]):
        Image.fromarray(image).save(folder / f"new{i}.png")


def delete(folder):
    for path in sorted(folder.iterdir())[:50]:
        path.unlink()


def rename(folder):
    (folder / "000.png").rename(folder / "first.png")


def replace(folder):
    Image.fromarray(255 - PIXELS[7]).save(folder / "007.png")


def swap(folder):
    """Reverse the images below the same names."""
    paths = sorted(folder.iterdir())
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents[::-1], strict=True):
        path.write_bytes(content)


ARRAY_CHANGES = {
    "append": np.concatenate((PIXELS, 255 - PIXELS[:60])),
    "delete": PIXELS[50:],
    "replace": np.concatenate((255 - PIXELS[:1], PIXELS[1:])),
    "reorder": PIXELS[::-1],
    "same_number": np.concatenate((PIXELS[1:], PIXELS[:1])),
}
CHANGES = [("arrays", COUNTS, name, lambda path, x=x: write_array(path, x)) for name, x in ARRAY_CHANGES.items()]
CHANGES += [("folder", SHARES, change.__name__, change) for change in (append, delete, rename, replace, swap)]
CHANGES += [("folder", COUNTS, "delete_count", delete)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Make a folder with a data set and a run that was trained on it, once for each data set and kind of split."""
    places = {}

    def make(dataset, sizes):
        if (dataset, sizes[0]) not in places:
            place = places[dataset, sizes[0]] = tmp_path_factory.mktemp(dataset)
            if dataset == "arrays":
                write_array(place / "x.npy", PIXELS)
                settings = ["data=arrays", "data.root=x.npy"]
            else:
                write_images(place / "x", PIXELS)
                settings = ["data=folder", "data.root=x", "data.image_size=8", "data.channels=1"]
            quick = [
                "data.batch_size=20",
                "trainer.max_epochs=1",
                "callbacks.figures_every_n_epochs=0",
                "hydra.run.dir=run",
            ]
            run(*TINY, *settings, *sizes, *quick, cwd=place)
        return places[dataset, sizes[0]]

    return make


@pytest.mark.parametrize(("dataset", "sizes", "name", "change"), CHANGES, ids=[c[2] + "_" + c[0] for c in CHANGES])
def test_exactly_the_changed_splits_are_rejected(trained, tmp_path, monkeypatch, dataset, sizes, name, change):
    place = tmp_path / "place"
    shutil.copytree(trained(dataset, sizes), place)
    monkeypatch.chdir(place)
    model = checkpoint.load("run")
    root = "x.npy" if dataset == "arrays" else "x"
    before = {split: model.subset(split) for split in SPLITS}
    change(place / root)
    source = model.data_source()
    splits = source.load_training() | {"test": source.load_split("test")}
    changed = []
    for split in SPLITS:
        now = splits[split]
        if now.names == before[split].names and torch.equal(now.tensor(), before[split].pixels):
            assert torch.equal(model.subset(split).pixels, before[split].pixels)
            continue
        changed.append(split)
        with pytest.raises(UserError, match=rf"^{root}: the {split} images have changed since run/checkpoints/"):
            model.images(split)
    assert changed

    text = run(*EVALUATE, cwd=place, script="scripts/evaluate.py", code=int("test" in changed))
    assert ("the test images have changed since" in text) == ("test" in changed)
    text = run("resume=run", "trainer.max_epochs=2", cwd=place, code=1)
    assert text.startswith(f"error: resume: {root}: the {', '.join(changed)} images have changed since this run")
    assert text.count("\n") == 1
    assert checkpoint.read_checkpoint(place / "run" / "checkpoints" / "last.ckpt")["epoch"] == 0


@pytest.mark.parametrize(
    ("dataset", "sizes", "write"), [("arrays", COUNTS, write_array), ("folder", SHARES, write_images)]
)
def test_moved_images_are_the_same_data(trained, tmp_path, dataset, sizes, write):
    shutil.copytree(trained(dataset, sizes), tmp_path / "place")
    elsewhere = tmp_path / ("y.npy" if dataset == "arrays" else "y")
    write(elsewhere, PIXELS)
    run(*EVALUATE, f"data_root={elsewhere}", cwd=tmp_path / "place", script="scripts/evaluate.py")
    run("resume=run", "trainer.max_epochs=2", f"data.root={elsewhere}", cwd=tmp_path / "place")


@pytest.mark.slow
def test_changed_labels_are_rejected_with_a_conditional_model(tmp_path):
    labels = np.arange(300) % 3
    np.savez(tmp_path / "x.npz", images=PIXELS, labels=labels)
    quick = ["data.batch_size=20", "trainer.max_epochs=1", "callbacks.figures_every_n_epochs=0"]
    for name, conditional in (("run", "true"), ("plain", "false")):
        settings = ["data=arrays", "data.root=x.npz", f"model.conditional={conditional}", f"hydra.run.dir={name}"]
        run(*TINY, *settings, *COUNTS, *quick, cwd=tmp_path)
    np.savez(tmp_path / "x.npz", images=PIXELS, labels=labels[::-1])
    text = run(*EVALUATE, cwd=tmp_path, script="scripts/evaluate.py", code=1)
    assert text.startswith("error: x.npz: the test labels have changed since run/checkpoints/")
    text = run("resume=run", "trainer.max_epochs=2", cwd=tmp_path, code=1)
    assert text.startswith("error: resume: x.npz: the train labels, validation labels, test labels have changed since")
    run("ckpt=plain", *EVALUATE[1:], cwd=tmp_path, script="scripts/evaluate.py")


def test_every_script_rejects_changed_data(trained, tmp_path):
    place = tmp_path / "place"
    shutil.copytree(trained("arrays", COUNTS), place)
    np.save(place / "other.npy", PIXELS[:5])
    run("ckpt=run", "images=other.npy", "alpha=0.05", cwd=place, script="scripts/detect.py")
    before = run("ckpt=run", "sampler=gaussian", cwd=place, script="scripts/sample.py")
    write_array(place / "x.npy", ARRAY_CHANGES["append"])
    for script, *words in [
        ("evaluate", "k=2"),
        ("fidelity", "n=10"),
        ("disentanglement",),
        ("detect", "images=test"),
        ("detect", "images=validation"),
        ("encode", "images=test"),
        ("reconstruct", "images=train"),
        ("compress", "images=test"),
        ("interpolate", "images=[0,1]"),
        ("traverse",),
        ("explore", "browser=false"),
        ("sample", "sampler=mixture"),
        ("sample", "sampler=gaussian", "label=0"),
    ]:
        text = run("ckpt=run", *words, cwd=place, script=f"scripts/{script}.py", code=1)
        assert "images have changed since run/checkpoints/" in text and text.count("\n") == 1, script
    # A detector and a sampler that were fitted before the change are still valid.
    run("ckpt=run", "images=other.npy", "alpha=0.05", cwd=place, script="scripts/detect.py")
    assert run("ckpt=run", "sampler=gaussian", cwd=place, script="scripts/sample.py") == before
