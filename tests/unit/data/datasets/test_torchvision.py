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
from betavae.data.datasets.torchvision import load_cifar10, load_fashion_mnist, load_kmnist, load_svhn
from betavae.errors import UserError


@pytest.fixture
def no_network(monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (
            load_kmnist,
            r"KMNIST is not in .*KMNIST/raw and the download failed .*train-images-idx3-ubyte.*t10k-labels-idx1-ubyte",
        ),
        (
            load_fashion_mnist,
            r"FashionMNIST is not in .*FashionMNIST/raw and .*put these files there: train-images-idx3-ubyte",
        ),
        (load_cifar10, r"CIFAR-10 is not in .*put these files there: cifar-10-python.tar.gz, from https://"),
        (load_svhn, r"SVHN is not in .*SVHN and .*put these files there: test_32x32.mat, from http://"),
    ],
)
def test_a_failed_download_says_where_to_put_the_files(tmp_path, no_network, load, message):
    assert load(tmp_path, "validation") is None
    with pytest.raises(UserError, match=message):
        load(tmp_path, "test")


def test_sets_in_the_format_of_mnist_are_read(tmp_path, no_network):
    for folder in ("FashionMNIST", "KMNIST"):
        (tmp_path / folder / "raw").mkdir(parents=True)
        for packed in Path(betavae.__file__).parent.rglob("*-ubyte.xz"):
            (tmp_path / folder / "raw" / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
    images = load_fashion_mnist(tmp_path, "test")
    assert images.pixels.shape == (10000, 1, 28, 28) and images.labels[:3].tolist() == [7, 2, 1]
    assert images.classes[9] == "Ankle boot" and len(load_kmnist(tmp_path, "train").pixels) == 60000
    raw = tmp_path / "KMNIST" / "raw"
    shutil.copy(raw / "t10k-images-idx3-ubyte", raw / "train-images-idx3-ubyte")
    with pytest.raises(UserError, match=r"KMNIST/raw holds files that are not KMNIST's: the shape is wrong"):
        load_kmnist(tmp_path, "train")
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"KMNIST/raw holds damaged files, or files that are not KMNIST's"):
        load_kmnist(tmp_path, "test")


def test_cifar10_is_read(tmp_path, monkeypatch):
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
    images = load_cifar10(tmp_path, "test")
    assert torch.equal(images.pixels, torch.from_numpy(pixels)) and images.pixels.is_contiguous()
    assert images.labels.tolist() == [3, 8] and images.classes == names


def test_svhn_is_read_if_scipy_is_installed(tmp_path, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    pixels = np.arange(3 * 3072, dtype=np.int64).reshape(3, 3, 32, 32).astype(np.uint8)
    (tmp_path / "SVHN").mkdir()
    path = tmp_path / "SVHN" / "test_32x32.mat"
    scipy_io.savemat(path, {"X": pixels.transpose(2, 3, 1, 0), "y": np.array([[1], [10], [9]])})
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(datasets.SVHN.split_list, "test", ["http://nowhere", path.name, md5])
    images = load_svhn(tmp_path, "test")
    assert torch.equal(images.pixels, torch.from_numpy(pixels)) and images.labels.tolist() == [1, 0, 9]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"data=svhn needs scipy.*pip install scipy"):
        load_svhn(tmp_path, "test")
