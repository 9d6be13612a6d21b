import hashlib
import importlib.util
import lzma
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

import betavae
from betavae.data.datasets.torchvision import cifar10, fashion_mnist, kmnist, svhn
from betavae.errors import UserError


@pytest.fixture
def no_network(monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (kmnist, r"KMNIST is not in .*KMNIST/raw and could not be .*train-images-idx3-ubyte.*t10k-labels-idx1-ubyte"),
        (
            fashion_mnist,
            r"FashionMNIST is not in .*FashionMNIST/raw and .*put its files there: train-images-idx3-ubyte",
        ),
        (cifar10, r"CIFAR-10 is not in .*put its files there: cifar-10-python.tar.gz, from https://"),
        (svhn, r"SVHN is not in .*SVHN and .*put its files there: test_32x32.mat, from http://"),
    ],
)
def test_without_network_it_says_what_to_put_where(tmp_path, no_network, source, sentence):
    assert source(tmp_path, "validation") is None
    with pytest.raises(UserError, match=sentence):
        source(tmp_path, "test")


def test_sets_in_mnists_format(tmp_path, no_network):
    for folder in ("FashionMNIST", "KMNIST"):
        (tmp_path / folder / "raw").mkdir(parents=True)
        for packed in Path(betavae.__file__).parent.rglob("*-ubyte.xz"):
            (tmp_path / folder / "raw" / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
    images = fashion_mnist(tmp_path, "test")
    assert images.pixels.shape == (10000, 1, 28, 28) and images.labels[:3].tolist() == [7, 2, 1]
    assert images.classes[9] == "Ankle boot" and len(kmnist(tmp_path, "train").pixels) == 60000
    raw = tmp_path / "KMNIST" / "raw"
    shutil.copy(raw / "t10k-images-idx3-ubyte", raw / "train-images-idx3-ubyte")
    with pytest.raises(UserError, match=r"KMNIST/raw holds files that are not KMNIST's \(the shape is wrong\)"):
        kmnist(tmp_path, "train")
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"KMNIST/raw holds files that are not KMNIST's, or damaged"):
        kmnist(tmp_path, "test")


def test_cifar10_is_read_from_its_files(tmp_path, monkeypatch):
    pixels = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3, 32, 32).astype(np.uint8)
    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return name, hashlib.md5(data).hexdigest()

    names = [f"class{i}" for i in range(10)]
    meta = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [])
    monkeypatch.setattr(
        datasets.CIFAR10, "test_list", [write("test_batch", {"data": pixels.reshape(2, -1), "labels": [3, 8]})]
    )
    images = cifar10(tmp_path, "test")
    assert torch.equal(images.pixels, torch.from_numpy(pixels)) and images.pixels.is_contiguous()
    assert images.labels.tolist() == [3, 8] and images.classes == names


def test_svhn_is_read_from_its_files_with_scipy_and_asked_for_without(tmp_path, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    pixels = np.arange(3 * 3072, dtype=np.int64).reshape(3, 3, 32, 32).astype(np.uint8)
    (tmp_path / "SVHN").mkdir()
    path = tmp_path / "SVHN" / "test_32x32.mat"
    scipy_io.savemat(path, {"X": pixels.transpose(2, 3, 1, 0), "y": np.array([[1], [10], [9]])})
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(datasets.SVHN.split_list, "test", ["http://nowhere", path.name, md5])
    images = svhn(tmp_path, "test")
    assert torch.equal(images.pixels, torch.from_numpy(pixels)) and images.labels.tolist() == [1, 0, 9]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="scipy reads: pip install scipy"):
        svhn(tmp_path, "test")
