import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from betavae.data.datasets import image_folder
from betavae.data.datasets.image_folder import load_image_folder
from betavae.data.source import DataSource
from betavae.errors import UserError
from betavae.storage.files import STAMP

fork = multiprocessing.get_context("fork")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "images"


@pytest.fixture
def load(root, tmp_path):
    """Load a split of `root` as gray images of 4 x 4, or with other settings."""
    defaults = {"root": root, "image_size": 4, "channels": 1, "cache": str(tmp_path / "cache")}
    return lambda split="train", **settings: load_image_folder(split=split, **defaults | settings)


@pytest.fixture
def caches(tmp_path):
    return lambda: sorted(path for path in (tmp_path / "cache").iterdir() if path.is_dir())


@pytest.fixture
def split_names(root, tmp_path):
    """Return the names of the images of each split, as a training has them."""

    def load_names(root=root, validation_size=0.2, test_size=0.2):
        settings = {"image_size": 4, "channels": 1, "cache": str(tmp_path / "cache"), "test_size": test_size}
        source = DataSource("folder", str(root), validation_size, "none", **settings)
        splits = source.load_training() | {"test": source.load_split("test")}
        return {split: set(images.names) for split, images in splits.items()}

    return load_names


def fill(root, names):
    """Write images of one gray value each, counted from 1."""
    for value, name in enumerate(names, 1):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), value).save(root / name)


def values(*sets):
    return [value for images in sets for value in images.pixels[:, 0, 0, 0].tolist()]


def test_labels_are_the_first_level_folders(root, load):
    fill(root, ["b/1.png", "b/deep/2.png", "b10/3.png", "b9/4.png", "a/5.png", "b/6.png"])
    train, test = load(test_size=2), load("test", test_size=2)
    assert load("validation") is None and train.classes == test.classes == ["a", "b", "b9", "b10"]
    labels = dict(zip([1, 2, 3, 4, 5, 6], [1, 1, 3, 2, 0, 1], strict=True))
    assert len(train) == 4 and sorted(values(train, test)) == [1, 2, 3, 4, 5, 6]
    assert train.labels.tolist() + test.labels.tolist() == [labels[value] for value in values(train, test)]
    assert train.pixels.dtype == torch.uint8 and train.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("names", "classes"),
    [(["1.png", "2.png"], None), (["cat/1.png", "cat/2.png"], ["cat"]), (["1.png", "cat/2.png"], [".", "cat"])],
)
def test_images_beside_folders_are_a_class(root, load, names, classes):
    fill(root, names)
    images = [load(split, test_size=1) for split in ("train", "test")]
    assert [i.classes for i in images] == [classes] * 2
    assert sorted(int(i.labels) for i in images) == ([0, 1] if classes == [".", "cat"] else [0, 0])


def test_folders_named_as_splits_are_the_splits(root, load):
    fill(root, ["train/x/1.png", "train/y/2.png", "val/y/3.png", "test/z/4.png", "test/x/5.png", "6.png"])
    train, validation, test = (load(split) for split in ("train", "validation", "test"))
    assert (values(train), values(validation), values(test)) == ([1, 2], [3], [5, 4])
    assert train.classes == ["x", "y", "z"] and test.labels.tolist() == [0, 2] and validation.labels.tolist() == [1]
    assert test.names == ["test/x/5.png", "test/z/4.png"]
    for before, name in itertools.pairwise(["val", "valid", "Valid", "validation"]):
        (root / before).rename(root / name)
        assert values(load("validation")) == [3]
    (root / "notes").mkdir()
    (root / "notes" / "a.txt").write_text("")  # a folder without images is ignored
    shutil.rmtree(root / "test")  # then training images are held out
    assert sorted(values(load(), load("test"))) == [1, 2] and values(load("validation")) == [3]
    fill(root, ["val/1.png"])
    with pytest.raises(UserError, match="has the folders val and validation for one split"):
        load()
    shutil.rmtree(root / "val")
    shutil.rmtree(root / "train")
    with pytest.raises(UserError, match="has a folder validation, but no folder train"):
        load()


def test_a_size_is_rejected_for_a_split_that_is_there(root, split_names):
    fill(root, [f"{split}/{i}.png" for split in ("train", "val", "test") for i in range(20)])
    found = split_names(validation_size=None, test_size=None)
    assert {split: len(names) for split, names in found.items()} == {"train": 20, "validation": 20, "test": 20}
    assert len(split_names(validation_size=0, test_size=None)["validation"]) == 0
    with pytest.raises(UserError, match=r"data.test_size=0.1 is invalid: expected null .* own test images"):
        split_names(validation_size=None, test_size=0.1)
    with pytest.raises(UserError, match=r"data.validation_size=5 is invalid: expected null or 0"):
        split_names(validation_size=5, test_size=None)


def test_a_single_folder_named_as_a_split_is_a_class(root, load, capsys):
    fill(root, ["bus/1.png", "train/2.png", "train/3.png", "car/4.png"])
    images = [load(split, test_size=1) for split in ("train", "test")]
    assert load("validation") is None and sorted(values(*images)) == [1, 2, 3, 4]
    assert images[0].classes == ["bus", "car", "train"]
    assert capsys.readouterr().err.count("train is a class, like bus, car; splits have only the folders") == 1
    fill(root, ["test/5.png"])
    with pytest.raises(UserError, match=r"has images in test and train, as splits, and in bus, car, as classes"):
        load()
    for name in ("bus", "car"):
        shutil.rmtree(root / name)
    assert values(load()) == [2, 3] and values(load("test")) == [1]


def test_links_do_not_put_an_image_into_two_splits(root, load):
    fill(root, ["train/1.png", "train/2.png", "test/3.png"])
    (root / "test" / "again.png").symlink_to(root / "train" / "1.png")
    assert values(load("test")) == [3]
    (root / "val").symlink_to(root / "test")
    with pytest.raises(UserError, match=r"has no images in val .*, or only links to those of another split"):
        load()


def test_conversions_are_reported_once(root, load, capsys):
    fill(root, ["1.png", "2.png", "3.png"])
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(root / "4.png")
    load()
    lines = capsys.readouterr().err.splitlines()
    notes = ("transparent parts filled with white", "color converted to gray", "downsized")
    assert lines == [f"1 of 4 images in {root}: {note}" for note in notes]
    load()
    assert not capsys.readouterr().err


def test_added_and_removed_images_move_no_other(root, split_names, tmp_path):
    names = [f"{i}.png" for i in range(200)]
    fill(root, names)
    before = split_names()
    assert set.union(*before.values()) == set(names) and sum(map(len, before.values())) == 200
    assert all(20 <= len(before[split]) <= 60 for split in ("validation", "test"))  # 3.5 standard deviations
    for change in ("add", "remove"):
        if change == "add":
            fill(root, [f"new/{i}.png" for i in range(50)])
        else:
            for name in names[:100]:
                (root / name).unlink()
        after = split_names()
        there = {name for name in names if (root / name).exists()}
        assert {split: found & there for split, found in after.items()} == {
            split: found & there for split, found in before.items()
        }
    moved = root.rename(tmp_path / "moved")
    assert split_names(root=moved) == after


def test_a_count_is_exact(root, split_names):
    fill(root, [f"{i}.png" for i in range(100)])
    found = split_names(test_size=20, validation_size=7)
    assert (len(found["test"]), len(found["validation"]), len(found["train"])) == (20, 7, 73)
    assert len(split_names(test_size=20, validation_size=1)["validation"]) == 1  # not a share of 1
    (root / "new.png").write_bytes((root / "3.png").read_bytes())
    assert len(found["test"] & split_names(test_size=20)["test"]) >= 19


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("share", [0.001, 0.5])
def test_a_few_images_are_in_all_splits_or_rejected(root, split_names, n, share):
    fill(root, [f"{i}.png" for i in range(n)])
    if n < 3:
        with pytest.raises(UserError, match=f"_size={share} is invalid: .* of 1 images"):
            split_names(test_size=share, validation_size=share)
    else:
        found = split_names(test_size=0.1, validation_size=share)
        assert all(found.values()) and sum(map(len, found.values())) == n


def test_images_are_converted_as_the_settings_say(root, load):
    root.mkdir()
    Image.new("RGBA", (8, 4), (0, 0, 0, 0)).save(root / "a.png")
    Image.new("RGB", (8, 4), "red").save(root / "b.png")
    settings = {"channels": 3, "image_size": [4, 6], "fit": "pad", "background": "#010203", "test_size": 1}
    both = torch.cat([load(split, **settings).pixels for split in ("train", "test")])
    assert both.shape == (2, 3, 4, 6)
    clear, red = sorted(both, key=lambda image: image[0, 1, 3].item())
    assert clear[:, 1, 3].tolist() == [1, 2, 3] == red[:, 3, 0].tolist() and red[:, 1, 3].tolist() == [255, 0, 0]
    for invalid, message in (
        ({"fit": "fill"}, "data.fit=fill is invalid"),
        ({"channels": 2}, "data.channels=2 is invalid: expected 1 or 3"),
        ({"background": "-"}, "data.background=- is invalid"),
    ):
        with pytest.raises(UserError, match=message):
            load(**invalid, cache=str(root.parent / "unused"))
    assert not (root.parent / "unused").exists()


def test_images_are_decoded_once_and_mapped(root, load, caches, monkeypatch):
    fill(root, [f"{i}.png" for i in range(10)])
    (root / "broken.png").write_bytes(b"")
    first = [load(split) for split in ("train", "test")]
    (cache,) = caches()
    assert sorted(path.name for path in cache.iterdir()) == ["index.json", "pixels.npy"]
    assert cache.name.startswith("images-1x4x4-")
    array = np.load(cache / "pixels.npy")  # a plain array, without the unreadable image
    assert array.shape == (10, 1, 4, 4) and sorted(array[:, 0, 0, 0].tolist()) == list(range(1, 11))
    monkeypatch.setattr(image_folder, "decode_to_cache", None)
    assert all(map(torch.equal, [load(split).pixels for split in ("train", "test")], [i.pixels for i in first]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of read-only memory
        train = load()
    with open(cache / "pixels.npy", "r+b") as file:
        file.seek(-10 * 16, 2)
        file.write(bytes([77]))
    assert train.pixels[0, 0, 0, 0] == 77  # a change of the file is visible, so nothing was copied


def test_folders_with_equal_files_have_their_own_caches(root, load, tmp_path):
    """Names, sizes and times are equal, as in archives with normalized times."""
    other = tmp_path / "elsewhere" / "images"
    for folder, value in ((root, 0), (other, 255)):
        for name in ("1.bmp", "2.bmp"):
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), value).save(folder / name)
            os.utime(folder / name, (10**9, 10**9))
    assert load().pixels[0, 0, 0, 0] == 0
    assert load(root=other).pixels[0, 0, 0, 0] == 255


@pytest.mark.parametrize("change", ["add", "remove", "rename", "rewrite", "touch", "relabel"])
def test_a_changed_folder_is_decoded_again(root, load, caches, change):
    fill(root, [f"a/{i}.png" for i in range(10)])
    load()
    image = root / "a" / "3.png"
    status = image.stat()
    {
        "add": lambda: fill(root, ["a/x.png"]),
        "remove": image.unlink,
        "rename": lambda: image.rename(root / "a" / "y.png"),
        "rewrite": lambda: Image.new("L", (40, 40), 99).save(image),
        "touch": lambda: os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1)),
        "relabel": lambda: [(root / "b").mkdir(), image.rename(root / "b" / "3.png")],
    }[change]()
    if change == "rewrite":
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    before = caches()
    found = values(load(), load("test"))
    assert len(caches()) == 1 and caches() != before
    assert len(found) == {"add": 11, "remove": 9}.get(change, 10) and (99 in found) == (change == "rewrite")


def test_other_settings_have_their_own_cache(root, load, caches):
    fill(root, [f"{i}.png" for i in range(10)])
    changes = [{}, {"image_size": 5}, {"image_size": [4, 5]}, {"channels": 3}]
    changes += [{"fit": "pad"}, {"background": "red"}, {"test_size": 3}]
    for number, settings in enumerate(changes, 1):
        load(**settings)
        load("test", **settings)
        assert len(caches()) == number


def test_only_caches_of_the_images_before_are_removed(root, load, caches, tmp_path, capsys):
    fill(root, [f"{i}.png" for i in range(10)])
    train = load()
    before = values(train)
    (old,) = caches()
    load(test_size=2)
    load(image_size=5)
    other = tmp_path / "elsewhere" / "images"
    fill(other, [f"{i}.png" for i in range(9)])
    load(root=other)
    others = [path for path in caches() if path != old]
    prefix = old.name.rpartition("-")[0]
    part = tmp_path / "cache" / f"{prefix}-{'0' * 16}.part"  # of a process that was killed
    part.mkdir()
    (part / "index.json").write_text(json.dumps({"made_by": STAMP}))
    names = (
        *(f"{prefix}-{digit * 16}" for digit in "1345"),
        f"{prefix}-{'6' * 16}.part",
        f"{prefix}-copy",
        "images-1x4x4",
    )
    foreign = [tmp_path / "cache" / name for name in names]
    for folder in foreign:
        folder.mkdir()
        (folder / "pixels.npy").write_text("mine")
    shutil.copy(old / "index.json", foreign[0])
    (foreign[0] / "notes.txt").write_text("mine")
    (foreign[1] / "index.json").write_text("{}")
    (foreign[2] / "index.json").write_text("mine")
    (tmp_path / "cache" / f"{prefix}-{'2' * 16}").write_text("a file")
    capsys.readouterr()
    fill(root, ["new.png"])
    load()
    lines = capsys.readouterr().err
    assert lines.count("removed ") == 2 and f"removed {old}, the cache from before the images changed" in lines
    assert not old.exists() and not part.exists() and all(path.exists() for path in others)
    assert all((folder / "pixels.npy").read_text() == "mine" for folder in foreign)
    assert values(train) == before  # a process that has mapped the cache still reads it


def test_unreadable_images_are_skipped_and_named(root, load, capsys):
    fill(root, [f"{i}.png" for i in range(10)])
    (root / "broken.jpg").write_bytes(b"no")
    (root / "notes.txt").write_text("no image")
    for _ in range(2):  # when the images are decoded, and later
        assert sorted(values(load(), load("test"))) == list(range(1, 11))
        assert capsys.readouterr().err.count(f"images in {root}: 1 could not be read: broken.jpg (not a PNG") == 1


def test_missing_images_are_rejected(root, load, caches, tmp_path):
    with pytest.raises(UserError, match=r"data.root=.*images is not a folder"):
        load()
    root.mkdir()
    (root / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"has no images \(.png, .jpg"):
        load()
    for name in ("a.png", "b.png"):
        (root / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"no readable (train|test) images: 2 could not be read: [ab].png"):
        load(test_size=1)
    assert not caches()
    fill(root, ["train/a.png", "train/b.png"])
    (root / "test").mkdir()
    with pytest.raises(UserError, match=r"has no images in test"):
        load()


def test_an_invalid_cache_folder_is_rejected(root, load, tmp_path):
    fill(root, ["a.png", "b.png"])
    with pytest.raises(UserError, match=r"data.cache=.* is invalid: expected a folder outside data.root="):
        load(cache=str(root / "cache"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache=.*: cannot write"):
        load(cache=str(tmp_path / "file" / "below"))


def test_two_processes_decode_once(root, load, caches, monkeypatch):
    fill(root, [f"{i}.png" for i in range(50)])
    decode, barrier, results = image_folder.decode_to_cache, fork.Barrier(2), fork.Queue()

    def decode_and_report(*arguments):
        results.put("decoded")
        decode(*arguments)

    monkeypatch.setattr(image_folder, "decode_to_cache", decode_and_report)

    def run():
        barrier.wait(30)
        results.put(sorted(values(load(), load("test"))))

    processes = [fork.Process(target=run) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=30) for _ in range(3)]
    for process in processes:
        process.join(30)
    assert found.count("decoded") == 1 and found.count(list(range(1, 51))) == 2
    assert len(caches()) == 1


def test_a_killed_process_leaves_no_cache(root, load, caches):
    fill(root, [f"{i}.png" for i in range(50)])

    def run():
        iter_images = image_folder.iter_images

        def iter_until_killed(*arguments):
            for number, result in enumerate(iter_images(*arguments)):
                if number == 30:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield result

        image_folder.iter_images = iter_until_killed
        load()

    process = fork.Process(target=run)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    (part,) = caches()
    assert part.suffix == ".part" and (part / "pixels.npy").exists()
    assert sorted(values(load(), load("test"))) == list(range(1, 51))
    (whole,) = caches()
    assert whole.suffix != ".part"


def test_a_full_disk_is_reported(root, load, caches):
    fill(root, [f"{i}.png" for i in range(50)])
    message = fork.Queue()

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))  # the bytes of the largest file
        try:
            load()
        except UserError as error:
            message.put(str(error))

    process = fork.Process(target=run)
    process.start()
    assert re.search(r"data.cache=.*: cannot write .*\.part \(File too large\)", message.get(timeout=30))
    process.join(30)
    assert not caches()


def test_names_that_are_not_utf8_are_read(root, load):
    fill(root, ["a.png", "b.png", "grün/猫 1.png"])
    with open(os.path.join(os.fsencode(root), b"\xff\xfe.png"), "wb") as file:
        Image.new("L", (4, 4), 4).save(file, "PNG")
    assert sorted(values(load(), load("test"))) == [1, 2, 3, 4]
    assert load().classes == [".", "grün"]


def test_a_damaged_cache_is_rejected(root, load, caches):
    fill(root, [f"{i}.png" for i in range(10)])
    load()
    (cache,) = caches()
    pixels = (cache / "pixels.npy").read_bytes()
    (cache / "pixels.npy").write_bytes(pixels[:-1])
    with pytest.raises(UserError, match=f"{cache} is damaged; delete it"):
        load()
    shutil.rmtree(cache)
    assert sorted(values(load(), load("test"))) == list(range(1, 11))
    assert (cache / "pixels.npy").read_bytes() == pixels
    (cache / "index.json").write_text("")
    with pytest.raises(UserError, match=f"{cache} is damaged; delete it"):
        load()
