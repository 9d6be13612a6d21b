"""Data of other types than bytes, from a file to the outputs of every script, as a user types the commands."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import betavae
from betavae.data.scaling import Scaling
from tests.commands import TINY, fresh, run

RNG = np.random.default_rng(0)
SPOTS = np.exp(-((np.mgrid[:8, :8] - RNG.uniform(2, 6, (300, 2, 1, 1))) ** 2).sum(1) / 4)  # (300, 8, 8) in [0, 1]
DATA = ["data=arrays", "data.validation_size=0.2", "data.batch_size=32", "callbacks.figures_every_n_epochs=0"]
SMALL = [*TINY, *DATA, "trainer.max_epochs=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a run on floats in [-1000, 2000]."""
    folder = tmp_path_factory.mktemp("floats")
    np.save(folder / "ct.npy", (3000 * SPOTS - 1000).astype(np.float32))
    settings = ["data.root=ct.npy", "data.scaling=standardize", "model.likelihood=gaussian", "hydra.run.dir=run"]
    (folder / "train.txt").write_text(run(*SMALL, *settings, cwd=folder))
    return folder


def script(name, *args, cwd, **how):
    return run("ckpt=run", *args, cwd=cwd, script=f"scripts/{name}.py", **how)


def test_a_new_process_applies_the_scaling_of_the_checkpoint(folder):
    stored = np.load(folder / "ct.npy")
    text = (folder / "train.txt").read_text()
    assert "a log-density of values scaled by data.scaling=standardize" in text and "Warning" not in text
    loaded = betavae.load(folder / "run")
    assert loaded.scaling.mode == "standardize" and loaded.scaling.dtype == "float32"
    train = loaded.split("train", str(folder / "ct.npy")).tensor()
    assert loaded.scaling.shift == pytest.approx([train.mean().item()], rel=1e-5)
    np.save(folder / "some.npy", stored[:30])
    code = """
import betavae, numpy as np, torch
run = betavae.load("run")
values = torch.from_numpy(np.load("some.npy"))[:, None]
x = (values - run.scaling.shift[0]) / run.scaling.factor[0]
mean = run.vae.encode(x).mean
latents = np.load("latents.npz")
assert np.allclose(latents["mean"], mean.numpy(), atol=1e-5)
decoded = run.vae.decode(mean) * run.scaling.factor[0] + run.scaling.shift[0]
assert np.allclose(np.load("decoded.npy"), decoded.numpy(), rtol=1e-4, atol=0.1)
assert torch.allclose(run.decode(run.encode(values).mean), decoded, rtol=1e-4, atol=0.1)
"""
    script("encode", "images=some.npy", cwd=folder)
    script("decode", "out=decoded.npy", cwd=folder)
    fresh("-c", code, cwd=folder)
    decoded = np.load(folder / "decoded.npy")
    assert decoded.dtype == np.float32 and decoded.shape == (30, 1, 8, 8) and decoded.min() < -10


def test_samples_figures_and_exports_have_data_units(folder):
    script("sample", "save_tensor=true", "n=16", cwd=folder)
    samples = torch.load(folder / "samples.pt")
    stored = np.load(folder / "ct.npy")
    assert samples.mean().item() == pytest.approx(stored.mean(), abs=300) and samples.abs().max() > 10
    for name in ("reconstruct", "traverse", "interpolate"):
        script(name, *(["images=[0,7]"] if name == "interpolate" else []), f"out={name}.png", cwd=folder)
        # Gray values span the training data, so spots are bright and their background is dark, not all black.
        picture = np.asarray(Image.open(folder / f"{name}.png").convert("L"))
        assert len(np.unique(picture)) > 20
    script("export", "format=pt2", "out=export", cwd=folder)
    described = json.loads((folder / "export" / "model.json").read_text())
    assert described["scaling"]["mode"] == "standardize"
    unit = described["graphs"]["encoder"]["inputs"]["image"]
    assert unit["unit"] == "values as stored (float32)" and unit["range"] == [None, None]
    loaded = betavae.load(folder / "run")
    values = torch.from_numpy(stored[:4, None])
    exported = {name: torch.export.load(folder / "export" / f"{name}.pt2").module() for name in ("encoder", "decoder")}
    mean, _ = exported["encoder"](values)
    torch.testing.assert_close(mean, loaded.encode(values).mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exported["decoder"](mean)[0], loaded.decode(mean), rtol=1e-3, atol=0.5)
    script("export", "format=folder", "out=shared", cwd=folder)
    assert betavae.load(folder / "shared").scaling == loaded.scaling


def test_evaluation_states_both_units(folder):
    script("evaluate", "k=10", "max_images=20", "probes=false", cwd=folder)
    found = json.loads((folder / "run" / "evaluation.json").read_text())
    per_image = 64 * math.log(betavae.load(folder / "run").scaling.factor[0])
    units = rf"values scaled by data.scaling=standardize \(in data units, .* are \+{per_image:.2f} nats\)"
    assert re.search(units, found["note"])
    assert json.loads((folder / "run" / "metrics.json").read_text())["note"] == found["note"]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("compress", [], "trained on float32 with data.scaling=standardize: expected a model of uint8 images"),
        ("fidelity", [], "trained on float32 with data.scaling=standardize: expected a model of uint8 images"),
        ("encode", ["images=bytes.npy"], "bytes.npy holds uint8, and the model was trained on float32"),
        ("encode", ["images=wide.npy"], r"has images of shape \(1, 9, 9\): expected \(1, 8, 8\)"),
        ("encode", ["images=nan.npy"], "images=nan.npy: its images hold 1 NaN and 0 infinite values, in 1 of 3"),
        ("encode", ["images=sprites"], r"its images have shape \(1, 64, 64\)"),
        ("encode", ["images=gray.png"], "its pixels are integers"),
    ],
)
def test_scripts_reject_other_data_in_one_sentence(folder, name, args, message):
    np.save(folder / "bytes.npy", np.zeros((3, 8, 8), np.uint8))
    np.save(folder / "wide.npy", np.zeros((3, 9, 9), np.float32))
    broken = np.zeros((3, 8, 8), np.float32)
    broken[1, 2, 3] = np.nan
    np.save(folder / "nan.npy", broken)
    Image.new("L", (8, 8)).save(folder / "gray.png")
    text = script(name, *args, cwd=folder, code=1)
    assert "Traceback" not in text
    assert re.search(message, text.replace("\n", " ")), text


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        (3000 * SPOTS - 1000, ["data.scaling=standardize"], r"bernoulli is invalid: it needs values in \[0, 1\]"),
        (SPOTS - 0.5, ["data.scaling=none", "model.likelihood=continuous_bernoulli"], r"needs values in \[0, 1\]"),
        (SPOTS, ["model.likelihood=logistic_mixture"], "needs images of 8 bits .found float64 with data.scaling=unit"),
        (SPOTS * 300, [], r"values outside of \[0, 1\] .*data.scaling=minmax"),
        (SPOTS.astype(np.int64), [], r"holds int64 from 0 to 0: expected .*astype\('uint8'\)"),
        (SPOTS, ["data.scaling=standardize", "data.binarize=threshold"], "invalid with data.binarize=threshold"),
        (SPOTS, ["data.scaling=zscore"], "data.scaling=zscore is invalid: expected one of unit, minmax, standardize"),
    ],
)
def test_training_rejects_what_does_not_fit(tmp_path, values, settings, message):
    np.save(tmp_path / "a.npy", values)
    text = run(*SMALL, "data.root=a.npy", *settings, cwd=tmp_path, code=1)
    assert re.search(message, text), text
    assert "Traceback" not in text and not (tmp_path / "runs").exists()
    if "likelihood" in message or "needs" in message:
        assert "; pass " in text and "or model.likelihood=gaussian or laplace" in text


@pytest.mark.parametrize(
    ("factor", "likelihood", "noted"), [(1.5, "bernoulli", True), (1, "bernoulli", False), (1.5, "gaussian", False)]
)
def test_test_values_outside_of_the_training_range_are_noted(tmp_path, factor, likelihood, noted):
    np.savez(
        tmp_path / "a.npz",
        x_train=SPOTS * 10,
        x_test=SPOTS[:20] * 10 * factor,
        y_train=np.zeros(300, int),
        y_test=np.zeros(20, int),
    )
    settings = ["data.root=a.npz", "data.scaling=minmax", f"model.likelihood={likelihood}", "trainer.max_epochs=1"]
    text = run(*SMALL, *settings, cwd=tmp_path)
    log = next((tmp_path / "runs").rglob("train.log")).read_text()
    message = "the test images have values outside of the range of the training images, which data.scaling=minmax"
    assert (message in text) == (message in log) == noted, text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "settings"),
    [
        (SPOTS > 0.5, ["data.binarize=threshold"]),
        ((SPOTS > 0.5).astype(np.uint8), ["data.scaling=minmax", "data.binarize=threshold"]),
        ((SPOTS * 4095).astype(np.uint16), ["data.scaling=minmax"]),
        ((SPOTS * 65535).astype(np.uint16), ["model=conv", "model.hidden_dims=[4,4]", "init=default"]),
        (SPOTS.astype(np.float16), ["model.likelihood=continuous_bernoulli"]),
        (1e6 + SPOTS, ["data.scaling=minmax", "model.likelihood=gaussian", "init=data"]),
    ],
)
def test_every_type_trains_and_decodes_to_itself(tmp_path, values, settings):
    np.save(tmp_path / "a.npy", values)
    text = run(*SMALL, "data.root=a.npy", *settings, "hydra.run.dir=run", cwd=tmp_path)
    assert "far below" not in text and "Warning" not in text
    script("encode", "images=a.npy", cwd=tmp_path)
    script("decode", "out=b.npy", cwd=tmp_path)
    decoded = np.load(tmp_path / "b.npy")
    assert decoded.dtype == values.dtype and decoded.shape == (300, 1, 8, 8)
    if values.dtype != bool:
        assert decoded.mean() == pytest.approx(values.mean(), abs=0.6 * float(np.ptp(values)))
    script("decode", "out=folder", cwd=tmp_path)
    assert Image.open(tmp_path / "folder" / "0.png").size == (8, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "mode"), [("png", "I;16"), ("tif", "F"), ("pgm", "I;16")])
def test_folders_of_deep_pictures_keep_their_bits(tmp_path, suffix, mode):
    values = (SPOTS[:60] * 65535).astype(np.uint16) if mode == "I;16" else SPOTS[:60].astype(np.float32)
    (tmp_path / "in").mkdir()
    for number, value in enumerate(values):
        Image.fromarray(value).save(tmp_path / "in" / f"{number:02}.{suffix}")
    data = ["data=folder", "data.root=in", "data.image_size=8", "data.channels=1", "data.batch_size=16"]
    run(*TINY, *data, "hydra.run.dir=run", "callbacks.figures_every_n_epochs=0", cwd=tmp_path)
    loaded = betavae.load(tmp_path / "run")
    assert loaded.scaling == Scaling.unit("uint16" if mode == "I;16" else "float32")
    train = loaded.split("train", str(tmp_path / "in"))
    expected = np.stack([values[int(name[:2])] for name in train.names])
    assert np.array_equal(train.tensor()[:, 0].numpy(), expected)
    script("encode", "images=in", cwd=tmp_path)
