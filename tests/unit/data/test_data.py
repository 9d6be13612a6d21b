import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from betavae.data import DATASETS, ImageSet
from betavae.data.datamodule import ImageDataModule
from betavae.data.datasets.mnist import mnist
from betavae.data.loader import BatchLoader
from betavae.errors import UserError
from betavae.models.vae import VAE
from betavae.runtime import checkpoint
from tests.conftest import DATA, MODEL, MODULE


def module(data_root, **changes):
    made = ImageDataModule(**DATA | {"root": data_root} | changes)
    made.setup()
    return made


def numbered(n, pixels=None):
    """Images whose labels are their numbers."""
    return ImageSet(torch.zeros(n, 1, 1, 1, dtype=torch.uint8) if pixels is None else pixels, torch.arange(n))


def test_the_canonical_mnist_comes_out_of_the_package(data_root):
    images = mnist(Path(data_root), "train")
    assert images.pixels.shape == (60000, 1, 28, 28) and images.pixels.dtype == torch.uint8
    assert images.labels[:5].tolist() == [5, 0, 4, 1, 9] and images.classes[4] == "4"
    assert images.pixels.double().mean().item() == pytest.approx(33.318421, abs=1e-6)  # 0.1307 of 255, as is known
    assert mnist(Path(data_root), "test").pixels.shape == (10000, 1, 28, 28)
    assert mnist(Path(data_root), "validation") is None


def test_it_is_unpacked_into_the_data_folder_once_and_nowhere_for_none(tmp_path):
    test = mnist(tmp_path / "new" / "data", "test")
    assert len(list((tmp_path / "new" / "data" / "MNIST" / "raw").iterdir())) == 2
    assert torch.equal(mnist(tmp_path / "other", "test", download=False).pixels, test.pixels)
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match=r"data.root: cannot write .*Not a directory"):
        mnist(tmp_path / "new/data/MNIST/raw/t10k-images-idx3-ubyte", "test")


@pytest.mark.parametrize("name", DATASETS)
def test_a_path_that_a_checkpoint_names_is_only_read(tmp_path, monkeypatch, name):
    """Nothing is unpacked or downloaded there, and no cache is made."""
    victim = tmp_path / "victim"
    fixed = {"arrays": victim / "x.npz", "folder": victim}
    victim.mkdir()
    np.savez(victim / "x.npz", images=np.zeros((20, 28, 28), np.uint8))
    for i in range(20):
        Image.new("L", (28, 28), i).save(victim / f"{i}.png")
    before = {path: path.stat().st_mtime_ns for path in (victim, *victim.rglob("*"))}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    settings = {"folder": {"image_size": 28, "cache": str(victim)}}.get(name, {})
    data = DATA | {"name": name, "root": str(fixed.get(name, victim)), "validation_size": None} | settings
    run = checkpoint.TrainedRun(VAE(**MODEL), Path("a.ckpt"), MODULE, data)
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # where a download would fail, with another message
    if name in ("mnist", "sprites"):
        assert len(run.subset("test")) == 10_000
    else:  # a run made by hand knows no hashes
        with pytest.raises(UserError, match=r"have changed|is not in .*by data_root=PATH|dsprites.* is not there"):
            run.subset("test")
    assert before == {path: path.stat().st_mtime_ns for path in (victim, *victim.rglob("*"))}


def test_torchvision_finds_what_was_unpacked(data_root):
    from torchvision import datasets

    for train, split in ((True, "train"), (False, "test")):
        theirs, ours = datasets.MNIST(data_root, train=train), mnist(Path(data_root), split)
        assert torch.equal(theirs.data.unsqueeze(1), ours.pixels) and torch.equal(theirs.targets, ours.labels)


def test_a_flipped_byte_is_found(data_root, tmp_path):
    shutil.copytree(Path(data_root) / "MNIST", tmp_path / "MNIST")
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte.*MD5"):
        mnist(tmp_path, "test")
    assert file.read_bytes() == content  # nothing of the user's is overwritten
    file.unlink()
    mnist(tmp_path, "test")


def test_validation_comes_out_of_training_by_a_fixed_seed(data_root):
    a, b, whole = (module(data_root, seed=0), module(data_root, seed=9), module(data_root, validation_size=0))
    assert [len(a.splits[s]) for s in ("train", "validation", "test")] == [55000, 5000, 10000]
    assert torch.equal(a.splits["validation"].pixels, b.splits["validation"].pixels)
    assert len(whole.splits["train"]) == 60000 and whole.val_dataloader() == []
    # Together they are the training set: no image twice, none lost, no test image among them.
    counts = [s.pixels.long().sum((1, 2, 3)) * 10 + s.labels for s in (a.splits["train"], a.splits["validation"])]
    images = whole.splits["train"]
    all_counts = images.pixels.long().sum((1, 2, 3)) * 10 + images.labels
    assert torch.equal(torch.cat(counts).sort().values, all_counts.sort().values)
    share = module(data_root, validation_size=0.1)
    assert [len(share.splits[s]) for s in ("train", "validation", "test")] == [54000, 6000, 10000]
    with pytest.raises(UserError, match="validation_size=60000"):
        module(data_root, validation_size=60000)
    assert len(module(data_root, validation_size=1e-6).splits["validation"]) == 1  # a share is of one image at least


def test_a_source_with_a_validation_split_of_its_own_is_not_split(data_root, monkeypatch):
    from betavae import data

    sizes = {"train": 50, "validation": 20, "test": 10}
    seen = []

    def source(root, split, shade=3):
        seen.append((root, split, shade))
        return numbered(sizes[split], torch.full((sizes[split], 1, 2, 2), shade, dtype=torch.uint8))

    monkeypatch.setitem(data.DATASETS, "own", source)
    made = module("nowhere", name="own", shade=7, batch_size=5, validation_size=None)
    assert {name: len(images) for name, images in made.splits.items()} == sizes
    assert {shade for _, _, shade in seen} == {7} and made.splits["validation"].pixels.unique().tolist() == [7]
    with pytest.raises(UserError, match=r"data.colour is not a setting of data.name=own"):
        module("nowhere", name="own", colour=7)


def test_training_batches_cover_every_image_once_in_an_order_of_seed_and_epoch(data_root):
    data = module(data_root, batch_size=999)
    order = lambda seed, epoch, reshuffle=True: torch.cat(  # noqa: E731
        [y for _, y in BatchLoader(numbered(1000), 128, lambda: epoch, seed, reshuffle)]
    )
    assert torch.equal(order(0, 3).sort().values, torch.arange(1000))
    assert torch.equal(order(0, 3), order(0, 3))
    assert not torch.equal(order(0, 3), order(0, 4)) and not torch.equal(order(0, 3), order(1, 3))
    assert torch.equal(order(0, 3, False), order(0, 4, False)) and not torch.equal(order(0, 3, False), order(1, 3))
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (999, 1, 28, 28) and x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
    assert len(data.train_dataloader()) == 56 and len(y) == 999
    test = torch.cat([y for _, y in data.test_dataloader()])
    assert torch.equal(test, data.splits["test"].labels)  # not shuffled


def test_each_epoch_has_an_order_of_its_own_unless_asked_otherwise():
    def orders(**settings):
        return [torch.cat([y for _, y in BatchLoader(numbered(100), 16, lambda e=e: e, 5, **settings)]) for e in (0, 1)]

    assert not torch.equal(*orders()) and torch.equal(*orders(reshuffle=False))
    assert torch.equal(orders()[0], orders(reshuffle=False)[0])


def test_a_position_within_an_epoch_is_gone_back_to():
    make = lambda: BatchLoader(numbered(100), 16, lambda: 2, seed=5)  # noqa: E731
    first = make()
    labels = [y for _, y in first]
    stopped = make()
    iterator = iter(stopped)
    next(iterator), next(iterator), next(iterator)
    resumed = make()
    resumed.load_state_dict(stopped.state_dict())
    rest = [y for _, y in resumed]
    assert len(rest) == len(labels) - 3 and all(map(torch.equal, rest, labels[3:]))


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
def test_images_that_stay_on_the_host_are_read_one_batch_ahead(binarize):
    images = ImageSet(torch.randint(256, (103, 1, 4, 4), dtype=torch.uint8), torch.arange(103))
    plain, ahead = (BatchLoader(images, 10, lambda: 3, binarize=binarize) for _ in range(2))
    taken = []
    for batches, some in ((plain, iter(plain)), (ahead, ahead.from_host())):
        torch.manual_seed(0)
        taken.append([next(some) for _ in range(4)])
        assert batches.state_dict() == {"epoch": 3, "batches": 4}  # not of the one that has been read
        some = iter(plain) if batches is plain else ahead.from_host()  # resumed
        taken[-1] += list(some)
        assert batches.state_dict() == {"epoch": 3, "batches": 11} and len(taken[-1]) == 11
    for (x, label), (other, other_label) in zip(*taken, strict=True):
        assert torch.equal(x, other) and torch.equal(label, other_label)
    plain.load_state_dict({"epoch": -1, "batches": 0})
    plain.device = torch.device("meta")
    assert {(x.device.type, x.dtype, label.device.type) for x, label in plain} == {("meta", torch.float32, "meta")}


@pytest.mark.parametrize("epoch", [None, lambda: 1])
def test_shards_do_not_overlap(epoch):
    shards = [BatchLoader(numbered(101), 8, epoch) for _ in range(2)]
    for rank, shard in enumerate(shards):
        shard.shard(rank, 2)
    seen = [torch.cat([y for _, y in shard]) for shard in shards]
    assert not set(seen[0].tolist()) & set(seen[1].tolist())
    assert len(seen[0]) + len(seen[1]) == (100 if epoch else 101)  # training drops the odd one, evaluation none
    assert [len(shard) for shard in shards] == [7, 7]


def test_the_shards_of_a_step_are_the_images_of_that_step_in_one_process():
    whole = next(iter(BatchLoader(numbered(103), 20, lambda: 3)))[1].tolist()
    halves = []
    for rank in (0, 1):
        half = BatchLoader(numbered(103), 10, lambda: 3)
        half.shard(rank, 2)
        halves.append(next(iter(half))[1])
    assert sorted(whole) == sorted(torch.cat(halves).tolist())


def test_binarisation(data_root):
    grey, threshold, dynamic = (module(data_root, binarize=b) for b in ("none", "threshold", "dynamic"))
    pixels = grey.splits["test"].pixels
    assert torch.equal(threshold.splits["test"].pixels == 255, pixels > 127)
    x, _ = next(iter(threshold.train_dataloader()))
    assert torch.equal(x, next(iter(grey.train_dataloader()))[0].gt(0.5).float())
    once = dynamic.splits["test"].pixels
    again = module(data_root, binarize="dynamic", seed=8).splits["test"].pixels
    assert torch.equal(once, again) and set(once.unique().tolist()) == {0, 255}
    assert not (once[pixels == 0]).any() and (once[pixels == 255] == 255).all()
    assert (once / 255).mean().item() == pytest.approx((pixels / 255).mean().item(), abs=1e-3)
    first, second = (next(iter(dynamic.train_dataloader()))[0] for _ in range(2))
    assert set(first.unique().tolist()) == {0.0, 1.0} and not torch.equal(first, second)  # a fresh draw
    ramp = numbered(4000, torch.arange(256, dtype=torch.uint8).repeat(4000, 1).view(4000, 1, 16, 16))
    x, _ = next(iter(BatchLoader(ramp, 4000, lambda: 0, binarize="dynamic")))
    error = (x.mean(0).flatten() - torch.arange(256) / 255).abs().max()
    assert error < 0.04  # five standard errors of 4,000 draws
