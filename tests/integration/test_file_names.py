"""Images whose file names are not UTF-8, from training to every file that holds a name."""

import csv
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

import betavae
from betavae.applications.explorer.queries import build_page_state, load_models
from tests.commands import run

pytestmark = pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="file names are Unicode there")
# Each name on disk, and as it is written to files.
LATIN = {b"PICTURES/caf\xe9/%d\xff.png" % number: rf"caf\xe9/{number}\xff.png" for number in range(30)}
UTF8 = {f"PICTURES/thé/{number}.png".encode(): f"thé/{number}.png" for number in range(30)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make a folder with two classes of images, and a run that was trained on them."""
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for name in (*LATIN, *UTF8):
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    (folder / os.fsdecode(b"PICTURES/caf\xe9/cut\xff.png")).write_bytes(b"no image")
    args = ["data=folder", "data.root=PICTURES", "data.image_size=8", "data.channels=1", "data.validation_size=20"]
    args += ["data.batch_size=10", "data.test_size=10", "model.likelihood=logistic_mixture", "model.hidden_dims=[8]"]
    text = run(*args, "model.latent_dim=2", "trainer.max_epochs=1", "hydra.run.dir=run", cwd=folder)
    assert "30 of 60 images in PICTURES: name that is not UTF-8, its other bytes written as \\xNN" in text
    assert r"1 could not be read: caf\xe9/cut\xff.png" in text
    return folder


@pytest.mark.parametrize("ending", ["csv", "npz", "parquet"])
def test_latents_have_every_name(place, ending):
    words = ("ckpt=run", f"out=all.{ending}")
    text = run(*words, "images=PICTURES", cwd=place, script="scripts/encode.py")
    assert "30 of 60 images: name that is not UTF-8, its other bytes written as \\xNN" in text
    words = ("ckpt=run", f"latents=all.{ending}", f"out=from_{ending}")
    run(*words, cwd=place, script="scripts/decode.py")
    found = {str(path.relative_to(place / f"from_{ending}")) for path in (place / f"from_{ending}").rglob("*.png")}
    assert found == {*LATIN.values(), *UTF8.values()}
    run("ckpt=run", "images=test", f"out=test.{ending}", cwd=place, script="scripts/encode.py")
    if ending == "csv":
        rows = list(csv.DictReader((place / "test.csv").read_text("utf-8").splitlines()))
        assert len(rows) == 10 and {row["label"] for row in rows} <= {r"caf\xe9", "thé"}


def test_scores_and_compressed_files_have_every_name(place):
    run("ckpt=run", "images=PICTURES", "alpha=0.5", cwd=place, script="scripts/detect.py")
    rows = list(csv.DictReader((place / "anomalies" / "scores.csv").read_text("utf-8").splitlines()))
    assert {row["name"] for row in rows} == {*LATIN.values(), *UTF8.values(), r"caf\xe9/cut\xff.png"}
    run("ckpt=run", "images=PICTURES", "out=all.bvae", "report=false", cwd=place, script="scripts/compress.py")
    run("ckpt=run", "file=all.bvae", "out=back", cwd=place, script="scripts/decompress.py")
    for name, text in (LATIN | UTF8).items():
        there, back = (np.asarray(Image.open(place / path)) for path in (os.fsdecode(name), f"back/{text}"))
        assert np.array_equal(there, back)


def test_the_explorer_shows_class_names(place, monkeypatch):
    monkeypatch.chdir(place)
    name = os.fsdecode(b"r\xfcn")
    (place / "run").rename(place / name)
    shown = build_page_state(load_models([betavae.load(name)]))
    text = json.dumps(shown, ensure_ascii=False).encode("utf-8").decode()
    assert shown["classes"] == [r"caf\xe9", "thé"] and r"r\\xfcn" in text
    # The name of a run that was found, not given, is printed as it is.
    assert f"samples of {name}/" in run("runs=.", "n=2", cwd=place, script="scripts/sample.py")


def test_a_setting_that_is_not_utf8_is_rejected(place):
    text = run("ckpt=run", os.fsdecode(b"images='caf\xe9'"), cwd=place, script="scripts/encode.py", code=1)
    assert "images=" in text and "is invalid: expected UTF-8" in text and text.count("\n") == 1
