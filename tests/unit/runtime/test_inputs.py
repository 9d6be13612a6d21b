from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from betavae.data.datasets.arrays import load_arrays
from betavae.data.fingerprint import fingerprint
from betavae.data.image_io import LoadedImages
from betavae.data.scaling import Scaling
from betavae.errors import UserError
from betavae.models.vae import VAE
from betavae.runtime.checkpoint import TrainedRun
from betavae.runtime.inputs import is_dataset_name, resolve_images, resolve_labels
from tests.conftest import DATA, MODEL, MODULE


@pytest.fixture
def make_run(data_root):
    """Make an untrained run on MNIST, or with other data settings."""

    def make(**changes):
        return TrainedRun(VAE(**MODEL), Path("a.ckpt"), MODULE, DATA | {"root": data_root} | changes)

    return make


def test_a_split_has_the_images_and_labels_of_the_training(make_run):
    run = make_run(validation_size=20)
    images, expected = resolve_images(run, "validation"), run.subset("validation")
    assert torch.equal(images.pixels, expected.pixels) and images.labels == expected.labels.tolist()
    assert images.names == [f"{i:02}" for i in range(20)] and images.notes == []


@pytest.mark.parametrize("labeled", [False, True])
def test_images_without_labels_get_none(make_run, tmp_path, labeled):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.zeros((30, 28, 28), np.uint8), **({"labels": np.arange(30) % 2} if labeled else {}))
    test = load_arrays(path, "test")
    run = make_run(name="arrays", root=str(path))._replace(fingerprints={"test": fingerprint(test)})
    assert resolve_images(run, "test").labels == (test.labels.tolist() if labeled else None)


def test_a_data_set_is_its_test_images(make_run, data_root):
    images = resolve_images(make_run(), "mnist", data_root)
    assert images.pixels.shape == (10_000, 1, 28, 28) and images.labels[:3] == [7, 2, 1]
    assert images.names[-1] == "9999"
    with pytest.raises(
        UserError, match=r"images=sprites is invalid: .*\(1, 64, 64\), and the model expects \(1, 28, 28"
    ):
        resolve_images(make_run(), "sprites")


def test_the_data_set_of_the_training_keeps_its_settings(make_run):
    images = resolve_images(make_run(name="sprites", image_size=32, validation_size=0), "sprites")
    assert images.pixels.shape == (10_000, 1, 32, 32)


def test_a_file_named_as_a_data_set_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_dataset_name("mnist") and not is_dataset_name("arrays") and not is_dataset_name(["mnist"])
    Path("mnist").touch()
    assert not is_dataset_name("mnist")


def test_values_outside_the_training_range_are_reported(make_run, tmp_path):
    scaling = Scaling("minmax", "uint16", [100.0], [3900.0], 100.0, 4000.0)
    run = make_run()._replace(scaling=scaling)
    values = np.linspace(100, 4000, 2 * 28 * 28).round().astype(np.uint16).reshape(2, 28, 28)
    np.save(tmp_path / "in.npy", values)
    assert resolve_images(run, str(tmp_path / "in.npy")).notes == []
    np.save(tmp_path / "out.npy", values * 2)
    assert resolve_images(run, str(tmp_path / "out.npy")).notes == [
        "values from 200 to 8000; the training data have 100 to 4000 (data.scaling=minmax)"
    ]


def test_columns_outside_the_training_range_are_named(make_run, tmp_path):
    scaling = Scaling("minmax", "float64", [0.0, -5.0], [10.0, 5.0], -5.0, 10.0)
    run = make_run(name="table")._replace(scaling=scaling, columns=["a", "b"])
    (tmp_path / "t.csv").write_text("a,b\n0,-5\n10,0.5\n")
    notes = resolve_images(run, str(tmp_path / "t.csv")).notes
    assert notes == ["values outside the range of the training data (data.scaling=minmax) in b"]


@pytest.mark.parametrize("binarize", ["none", "threshold", "dynamic"])
def test_files_are_binarized_as_the_model_expects(make_run, tmp_path, binarize):
    ramp = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    images = resolve_images(make_run(binarize=binarize), [str(tmp_path / "a.png")])
    expected = ramp if binarize == "none" else np.where(ramp > 127, 255, 0)
    assert images.pixels.dtype == torch.uint8 and np.array_equal(images.pixels[0, 0].numpy(), expected)
    assert images.notes == ([] if binarize == "none" else ["binarized: above 127 is 1"])


def test_files_are_fitted_as_the_data_of_the_training(make_run, tmp_path):
    Image.new("L", (28, 14), 0).save(tmp_path / "a.png")
    padded = resolve_images(make_run(fit="pad", background="white"), str(tmp_path / "a.png"))
    assert padded.pixels[0, 0, :, 0].tolist() == [255] * 7 + [0] * 14 + [255] * 7
    assert not resolve_images(make_run(), str(tmp_path / "a.png")).pixels.any()


def test_labels_of_a_folder_are_class_names(make_run, tmp_path):
    for name in ("cat/1", "cat/2", "dog/3", "dog/4"):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28)).save(tmp_path / "x" / f"{name}.png")
    settings = {"name": "folder", "root": str(tmp_path / "x"), "image_size": 28, "channels": 1, "test_size": 2}
    run = make_run(**settings, validation_size=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        test = run.data_source().load_split("test")
        run = run._replace(fingerprints=run.data_source().fingerprints("test", test, False))
        images = resolve_images(run, "test")
    assert images.names == test.names and images.labels == [name.split("/")[0] for name in test.names]


def test_numbers_of_labels_are_classes_or_names():
    """Labels of a built-in data set are class numbers, those of an array the numbers that name its classes."""
    vae = VAE(**MODEL, classes=["1", "0"])
    images = LoadedImages(torch.zeros(3, 1, 28, 28), ["a", "b", "c"], [0, 1, 1], [])
    numbers = {
        name: resolve_labels(TrainedRun(vae, Path("x.ckpt"), MODULE, DATA | {"name": name}), "test", images, None)
        for name in ("mnist", "arrays")
    }
    assert numbers["mnist"].tolist() == [0, 1, 1] and numbers["arrays"].tolist() == [1, 0, 0]


def test_labels_of_another_data_set_are_not_used(tmp_path, monkeypatch):
    run = TrainedRun(VAE(**MODEL, classes=["1", "0"]), Path("x.ckpt"), MODULE, DATA)
    images = LoadedImages(torch.zeros(3, 1, 28, 28), ["a", "b", "c"], [0, 1, 1], [])
    message = "^images=kmnist: its labels are not those of the model's data set; pass label=one of 1, 0$"
    with pytest.raises(UserError, match=message):
        resolve_labels(run, "kmnist", images, None)
    assert resolve_labels(run, "kmnist", images, 0).tolist() == [1, 1, 1]
    assert resolve_labels(run, "mnist", images, None).tolist() == [0, 1, 1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()  # a folder of this name comes first
    assert resolve_labels(run, "mnist", images._replace(labels=["0", "0", "1"]), None).tolist() == [1, 1, 0]
