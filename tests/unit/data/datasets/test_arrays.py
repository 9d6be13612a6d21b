import os

import numpy as np
import pytest
import torch

from betavae.data.datamodule import ImageDataModule
from betavae.data.datasets.arrays import load_arrays
from betavae.data.image_set import LazySubset
from betavae.errors import UserError
from tests.conftest import DATA

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 5, 7), dtype=np.uint8)


def test_the_split_is_fixed_and_labels_stay_with_their_images(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.arange(40, dtype=np.uint8).repeat(4).reshape(40, 2, 2), labels=np.arange(40))
    torch.manual_seed(3)
    a = load_arrays(path, "test", 0.25)
    torch.manual_seed(4)
    b = load_arrays(path, "test", test_size=10)
    train = load_arrays(path, "train", 0.25)
    assert len(a) == 10 and torch.equal(a.labels, b.labels) and a.labels.tolist() != list(range(10))
    assert sorted(a.labels.tolist() + train.labels.tolist()) == list(range(40))
    for images in (a, train):
        assert torch.equal(images.tensor()[:, 0, 0, 0].long(), images.labels)
    assert len(load_arrays(path, "test")) == 4 and load_arrays(path, "validation") is None
    with pytest.raises(UserError, match=r"data.test_size=40 .* of 40 images"):
        load_arrays(path, "test", test_size=40)


def test_the_splits_of_a_file_are_kept(tmp_path):
    path = tmp_path / "keras.npz"
    np.savez(path, x_train=IMAGES[:30], y_train=np.arange(30), x_test=IMAGES[30:], y_test=np.arange(10))
    train, test = load_arrays(path, "train"), load_arrays(path, "test")
    assert torch.equal(train.pixels, torch.from_numpy(IMAGES[:30, None])) and train.labels.tolist() == list(range(30))
    assert torch.equal(test.pixels, torch.from_numpy(IMAGES[30:, None])) and test.labels.tolist() == list(range(10))
    with pytest.raises(UserError, match=r"data.test_size=5 is invalid: expected null .* own test images"):
        load_arrays(path, "train", test_size=5)
    np.savez(path, x_train=IMAGES[:30])
    with pytest.raises(UserError, match=r"keras.npz has no array x_test \(it has x_train\)"):
        load_arrays(path, "test")


@pytest.mark.parametrize("names", [("train_images", "val_images", "test_images"), ("x_train", "x_valid", "x_test")])
def test_validation_images_of_a_file_are_kept(tmp_path, names):
    """As in the files of MedMNIST, whose labels have the shape (N, 1)."""
    parts = np.split(IMAGES, [20, 30])
    arrays = dict(zip(names, parts, strict=True))
    for name, part in zip(names, parts, strict=True):
        key = name.replace("images", "labels").replace("x_", "y_")
        arrays[key] = np.array([["b", "a"][i % 2] for i in range(len(part) - 1)] + [key])[:, None]
    path = tmp_path / "medmnist.npz"
    np.savez(path, **arrays)
    data = ImageDataModule(**DATA | {"name": "arrays", "root": str(path), "validation_size": None, "batch_size": 5})
    data.setup()
    for split, part in zip(("train", "validation", "test"), parts, strict=True):
        assert torch.equal(data.splits[split].tensor(), torch.from_numpy(part[:, None]))
        classes = data.splits[split].classes
        # The classes are those of all splits, so that one number has one meaning.
        assert len(classes) == 5 and classes[:2] == ["a", "b"] and data.splits[split].labels[:2].tolist() == [1, 0]
        assert classes[data.splits[split].labels[-1]] == list(arrays)[3 + ["train", "validation", "test"].index(split)]
    with pytest.raises(UserError, match=r"expected null or 0 .* own validation images"):
        ImageDataModule(**DATA | {"name": "arrays", "root": str(path), "batch_size": 5}).setup()


@pytest.mark.parametrize(
    ("test", "found"),
    [
        (
            (IMAGES / 255).astype(np.float32),
            r"test images are float32 \(1, 5, 7\) and the train images uint8 \(1, 5, 7\)",
        ),
        (IMAGES.astype(np.uint16), "test images are uint16"),
        (IMAGES[:, 1:], r"test images are uint8 \(1, 4, 7\)"),
    ],
)
def test_splits_of_other_types_or_shapes_are_rejected(tmp_path, test, found):
    np.savez(tmp_path / "a.npz", x_train=IMAGES, x_test=test)
    data = {"name": "arrays", "root": str(tmp_path / "a.npz"), "validation_size": None, "batch_size": 5}
    with pytest.raises(UserError, match=found):
        ImageDataModule(**DATA | data).setup()


def test_a_npy_is_mapped(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, IMAGES)
    train = load_arrays(path, "train")
    assert isinstance(train.pixels, LazySubset)
    before = train.tensor().clone()
    with open(path, "r+b") as file:  # a change of the file is visible, so nothing was copied
        file.seek(-IMAGES.nbytes, 2)
        file.write(bytes(255 - IMAGES.reshape(-1)))
    assert torch.equal(train.tensor(), 255 - before)


def test_a_file_larger_than_memory_is_mapped(tmp_path):
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shape = (2 * memory // 2**20, 1024, 1024)
    path = tmp_path / "a.npy"
    with open(path, "wb") as file:  # a sparse file takes no space on the disk
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + shape[0] * 2**20)
    test = load_arrays(path, "test", test_size=2).tensor()
    assert test.shape == (2, 1, 1024, 1024) and not test.any()
