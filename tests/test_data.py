import shutil
from pathlib import Path

import pytest
import torch

from betavae.data import Batches, MNISTDataModule, mnist
from betavae.errors import UserError
from tests.conftest import DATA


def module(data_root, **changes):
    made = MNISTDataModule(**DATA | {"root": data_root} | changes)
    made.setup()
    return made


def test_the_canonical_mnist_comes_out_of_the_package(data_root):
    images, labels = mnist(Path(data_root), True)
    assert images.shape == (60000, 1, 28, 28) and images.dtype == torch.uint8
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert images.double().mean().item() == pytest.approx(33.318421, abs=1e-6)  # 0.1307 of 255, MNIST's known mean
    assert mnist(Path(data_root), False)[0].shape == (10000, 1, 28, 28)


def test_a_flipped_byte_is_found(data_root, tmp_path):
    shutil.copytree(Path(data_root) / "MNIST", tmp_path / "MNIST")
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte.*MD5"):
        mnist(tmp_path, True)
    assert file.read_bytes() == content  # nothing of the user's is overwritten
    file.unlink()
    mnist(tmp_path, True)


def test_validation_comes_out_of_training_by_a_fixed_seed(data_root):
    a, b, whole = (module(data_root, seed=0), module(data_root, seed=9), module(data_root, validation_size=0))
    assert [len(a.sets[s][0]) for s in ("train", "validation", "test")] == [55000, 5000, 10000]
    assert torch.equal(a.sets["validation"][0], b.sets["validation"][0])
    assert len(whole.sets["train"][0]) == 60000 and whole.val_dataloader() == []
    # Together they are the training set: no image twice, none lost, no test image among them.
    counts = [s.long().sum((1, 2, 3)) * 10 + y for s, y in (a.sets["train"], a.sets["validation"])]
    images, labels = whole.sets["train"]
    assert torch.equal(torch.cat(counts).sort().values, (images.long().sum((1, 2, 3)) * 10 + labels).sort().values)
    with pytest.raises(UserError, match="validation_size=60000"):
        module(data_root, validation_size=60000)


def test_training_batches_cover_every_image_once_in_an_order_of_seed_and_epoch(data_root):
    data = module(data_root, batch_size=999)
    images = torch.arange(1000, dtype=torch.uint8).view(1000, 1, 1, 1)
    order = lambda seed, epoch: torch.cat(  # noqa: E731
        [y for _, y in Batches(images, torch.arange(1000), 128, epoch=lambda: epoch, seed=seed)]
    )
    assert torch.equal(order(0, 3).sort().values, torch.arange(1000))
    assert torch.equal(order(0, 3), order(0, 3))
    assert not torch.equal(order(0, 3), order(0, 4)) and not torch.equal(order(0, 3), order(1, 3))
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (999, 1, 28, 28) and x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
    assert len(data.train_dataloader()) == 56 and len(y) == 999
    test = torch.cat([y for _, y in data.test_dataloader()])
    assert torch.equal(test, data.sets["test"][1])  # not shuffled


def test_a_position_within_an_epoch_is_gone_back_to():
    images = torch.zeros(100, 1, 1, 1, dtype=torch.uint8)
    make = lambda: Batches(images, torch.arange(100), 16, epoch=lambda: 2, seed=5)  # noqa: E731
    first = make()
    labels = [y for _, y in first]
    stopped = make()
    iterator = iter(stopped)
    next(iterator), next(iterator), next(iterator)
    resumed = make()
    resumed.load_state_dict(stopped.state_dict())
    rest = [y for _, y in resumed]
    assert len(rest) == len(labels) - 3 and all(map(torch.equal, rest, labels[3:]))


@pytest.mark.parametrize("epoch", [None, lambda: 1])
def test_shards_do_not_overlap(epoch):
    images = torch.zeros(101, 1, 1, 1, dtype=torch.uint8)
    shards = [Batches(images, torch.arange(101), 8, epoch=epoch, shard=(rank, 2)) for rank in range(2)]
    seen = [torch.cat([y for _, y in shard]) for shard in shards]
    assert not set(seen[0].tolist()) & set(seen[1].tolist())
    assert len(seen[0]) + len(seen[1]) == (100 if epoch else 101)  # training drops the odd one, evaluation none


def test_binarisation(data_root):
    grey, threshold, dynamic = (module(data_root, binarize=b) for b in ("none", "threshold", "dynamic"))
    pixels = grey.sets["test"][0]
    assert torch.equal(threshold.sets["test"][0] == 255, pixels > 127)
    once, again = dynamic.sets["test"][0], module(data_root, binarize="dynamic", seed=8).sets["test"][0]
    assert torch.equal(once, again) and set(once.unique().tolist()) == {0, 255}
    assert not (once[pixels == 0]).any() and (once[pixels == 255] == 255).all()
    assert (once / 255).mean().item() == pytest.approx((pixels / 255).mean().item(), abs=1e-3)
    first, second = (next(iter(dynamic.train_dataloader()))[0] for _ in range(2))
    assert set(first.unique().tolist()) == {0.0, 1.0} and not torch.equal(first, second)  # a fresh draw
    ramp = torch.arange(256, dtype=torch.uint8).repeat(4000, 1).view(4000, 1, 16, 16)
    x, _ = next(iter(Batches(ramp, torch.zeros(4000), 4000, epoch=lambda: 0, dynamic_binarization=True)))
    error = (x.mean(0).flatten() - torch.arange(256) / 255).abs().max()
    assert error < 0.04  # five standard errors of 4,000 draws


def test_a_download_without_network_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"KMNIST/raw.*train-images-idx3-ubyte.*t10k-labels-idx1-ubyte"):
        MNISTDataModule(**DATA | {"root": str(tmp_path), "name": "kmnist"}).setup()


def test_a_data_set_in_mnists_format_is_read_from_its_folder(data_root, tmp_path):
    shutil.copytree(Path(data_root) / "MNIST" / "raw", tmp_path / "FashionMNIST" / "raw")
    data = module(str(tmp_path), name="fashion_mnist")
    assert data.image_shape == [1, 28, 28] and len(data.sets["train"][0]) == 55000
