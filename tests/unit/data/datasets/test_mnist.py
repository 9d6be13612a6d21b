import shutil
from pathlib import Path

import pytest
import torch

from betavae.data.datasets.mnist import load_mnist
from betavae.errors import UserError


def test_the_package_holds_the_canonical_mnist(data_root):
    images = load_mnist(Path(data_root), "train")
    assert images.pixels.shape == (60000, 1, 28, 28) and images.pixels.dtype == torch.uint8
    assert images.labels[:5].tolist() == [5, 0, 4, 1, 9] and images.classes[4] == "4"
    assert images.pixels.double().mean().item() == pytest.approx(33.318421, abs=1e-6)  # the well-known 0.1307 of 255
    assert load_mnist(Path(data_root), "test").pixels.shape == (10000, 1, 28, 28)
    assert load_mnist(Path(data_root), "validation") is None


def test_files_are_unpacked_into_root_only_with_download(tmp_path):
    test = load_mnist(tmp_path / "new" / "data", "test")
    assert len(list((tmp_path / "new" / "data" / "MNIST" / "raw").iterdir())) == 2
    assert torch.equal(load_mnist(tmp_path / "other", "test", download=False).pixels, test.pixels)
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match=r"data.root: cannot write .*Not a directory"):
        load_mnist(tmp_path / "new/data/MNIST/raw/t10k-images-idx3-ubyte", "test")


def test_torchvision_reads_the_unpacked_files(data_root):
    from torchvision import datasets

    for train, split in ((True, "train"), (False, "test")):
        theirs, ours = datasets.MNIST(data_root, train=train), load_mnist(Path(data_root), split)
        assert torch.equal(theirs.data.unsqueeze(1), ours.pixels) and torch.equal(theirs.targets, ours.labels)


def test_a_flipped_byte_is_rejected(data_root, tmp_path):
    shutil.copytree(Path(data_root) / "MNIST", tmp_path / "MNIST")
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte.*MD5"):
        load_mnist(tmp_path, "test")
    assert file.read_bytes() == content  # the user's file is not overwritten
    file.unlink()
    load_mnist(tmp_path, "test")
