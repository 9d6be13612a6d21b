import importlib
import itertools
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

from betavae.data.datamodule import ImageDataModule
from betavae.data.datasets.image_folder import folder
from betavae.data.file_listing import picture_files
from betavae.data.holdout import holdout_indices
from betavae.errors import UserError

module = importlib.import_module("betavae.data.datasets.image_folder")  # whose name in the package is the function's
fork = multiprocessing.get_context("fork")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "pictures"


@pytest.fixture
def load(root, tmp_path):
    return lambda split="train", **settings: folder(
        root, split, **{"image_size": 4, "channels": 1, "cache": str(tmp_path / "cache")} | settings
    )


def fill(root, names):
    """Pictures each of one grey value, in turn from 1."""
    for value, name in enumerate(names, 1):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), value).save(root / name)


def values(images):
    return images.pixels[:, 0, 0, 0].tolist()


def kept(tmp_path):
    return sorted(path for path in (tmp_path / "cache").iterdir() if path.is_dir())


def test_labels_are_the_first_folders(root, load):
    fill(root, ["b/1.png", "b/deep/2.png", "b10/3.png", "b9/4.png", "a/5.png", "b/6.png"])
    train, test = load(test_size=2), load("test", test_size=2)
    assert load("validation") is None and train.classes == test.classes == ["a", "b", "b9", "b10"]
    label = dict(zip([1, 2, 3, 4, 5, 6], [1, 1, 3, 2, 0, 1], strict=True))
    found = values(train) + values(test)
    assert len(train.pixels) == 4 and sorted(found) == [1, 2, 3, 4, 5, 6]
    assert train.labels.tolist() + test.labels.tolist() == [label[value] for value in found]
    assert train.pixels.dtype == torch.uint8 and train.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("names", "classes"),
    [(["1.png", "2.png"], None), (["cat/1.png", "cat/2.png"], ["cat"]), (["1.png", "cat/2.png"], [".", "cat"])],
)
def test_few_classes(root, load, names, classes):
    fill(root, names)
    images = [load(split, test_size=1) for split in ("train", "test")]
    assert [i.classes for i in images] == [classes] * 2
    assert sorted(int(i.labels) for i in images) == ([0, 1] if classes == [".", "cat"] else [0, 0])


def test_each_picture_is_listed_once_by_its_own_name_or_its_first(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "other").mkdir()
    for path in ("a/own.png", "other/far.png"):
        (tmp_path / path).write_bytes(b"1")
    for name, to in (("alias.png", "own.png"), ("p10.png", "../other/far.png"), ("p9.png", "../other/far.png")):
        (tmp_path / "a" / name).symlink_to(to)
    (tmp_path / "a" / "loop").symlink_to("."), (tmp_path / "a" / "more").symlink_to("../other")
    assert [name for name, *_ in picture_files(tmp_path / "a")] == ["own.png", "p9.png"]


def test_the_splits_of_a_folder_are_kept(root, load):
    fill(root, ["train/x/1.png", "train/y/2.png", "val/y/3.png", "test/z/4.png", "test/x/5.png", "6.png"])
    train, validation, test = (load(split) for split in ("train", "validation", "test"))
    assert (values(train), values(validation), values(test)) == ([1, 2], [3], [5, 4])
    assert train.classes == ["x", "y", "z"] and test.labels.tolist() == [0, 2] and validation.labels.tolist() == [1]
    assert test.names == ["test/x/5.png", "test/z/4.png"]
    for before, name in itertools.pairwise(["val", "valid", "Valid", "validation"]):
        (root / before).rename(root / name)
        assert values(load("validation")) == [3]
    (root / "notes").mkdir()  # without pictures
    (root / "notes" / "a.txt").write_text("")
    shutil.rmtree(root / "test")  # then some of the training pictures
    assert sorted(values(load()) + values(load("test"))) == [1, 2] and values(load("validation")) == [3]
    fill(root, ["val/1.png"])
    with pytest.raises(UserError, match="has a folder val and one validation"):
        load()
    shutil.rmtree(root / "val")
    shutil.rmtree(root / "train")
    with pytest.raises(UserError, match="has a folder validation, but none that is called train"):
        load()


@pytest.mark.parametrize("source", ["folder", "arrays"])
def test_a_size_of_a_split_that_the_data_have_is_rejected(root, tmp_path, source):
    if source == "folder":
        fill(root, [f"{split}/{i}.png" for split in ("train", "val", "test") for i in range(20)])
        settings = {"image_size": 4, "channels": 1, "cache": str(tmp_path / "cache")}
    else:
        root = tmp_path / "x.npz"
        np.savez(root, x_train=np.zeros((40, 4, 4), np.uint8), x_test=np.zeros((20, 4, 4), np.uint8))
        settings = {}

    def sizes(validation_size=None, **more):
        data = ImageDataModule(source, str(root), validation_size, 5, 5, "none", 0, **settings, **more)
        data.setup()
        return [len(data.splits[split]) for split in ("train", "validation", "test")]

    assert sizes() == ([20, 20, 20] if source == "folder" else [36, 4, 20])
    assert sizes(0) == ([20, 0, 20] if source == "folder" else [40, 0, 20])
    for size in (0.1, 5):
        with pytest.raises(UserError, match=f"data.test_size={size} is invalid: expected null .* own test images"):
            sizes(test_size=size)
        if source == "folder":
            with pytest.raises(UserError, match=f"data.validation_size={size} is invalid: expected null or 0"):
                sizes(size)
        else:
            assert sizes(size)[1] == (4 if size == 0.1 else 5)


def test_a_class_that_is_called_as_a_split_is(root, load, capsys):
    """Beside other classes, it is one of them; two such folders may be splits, and are asked about."""
    fill(root, ["bus/1.png", "train/2.png", "train/3.png", "car/4.png"])
    images = [load(split, test_size=1) for split in ("train", "test")]
    assert load("validation") is None and sorted(values(images[0]) + values(images[1])) == [1, 2, 3, 4]
    assert images[0].classes == ["bus", "car", "train"]
    assert capsys.readouterr().err.count("train is taken for a class, as bus, car; splits are folders train, val") == 1
    fill(root, ["test/5.png"])
    with pytest.raises(UserError, match=r"has pictures in test and train, as a set .* but also in bus, car: are these"):
        load()
    for name in ("bus", "car"):
        shutil.rmtree(root / name)
    assert values(load()) == [2, 3] and values(load("test")) == [1]


def test_links_do_not_bring_a_picture_into_two_splits(root, load):
    fill(root, ["train/1.png", "train/2.png", "test/3.png"])
    (root / "test" / "again.png").symlink_to(root / "train" / "1.png")
    assert values(load("test")) == [3]
    (root / "val").symlink_to(root / "test")
    with pytest.raises(UserError, match=r"has no pictures in val .*, or only links to those of another split"):
        load()


def test_what_was_done_to_the_pictures_is_said_once(root, load, capsys):
    fill(root, ["1.png", "2.png", "3.png"])
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(root / "4.png")
    load()
    said = capsys.readouterr().err.splitlines()
    for note in ("transparent parts laid on white", "colour made grey", "made smaller"):
        assert f"1 of 4 pictures in {root}: {note}" in said
    assert len(said) == 3
    load()
    assert not capsys.readouterr().err


def test_a_link_to_a_folder_of_the_tree_brings_nothing_twice(root, load):
    fill(root, ["a/1.png", "b/2.png", "b/c/3.png"])
    (root / "b" / "c" / "up").symlink_to(root / "b")
    (root / "again").symlink_to(root / "a")
    (root / "here").symlink_to(root)
    assert [name for name, *_ in picture_files(root)] == ["a/1.png", "b/2.png", "b/c/3.png"]


def splits(root, tmp_path, **settings):
    """The names of the pictures of each split, as a training has them."""
    own = {"image_size": 4, "channels": 1, "cache": str(tmp_path / "cache")}
    sizes = {"validation_size": 0.2, "test_size": 0.2}
    made = ImageDataModule(
        "folder", str(root), **{"batch_size": 1, "eval_batch_size": 1} | sizes | own | settings, binarize="none", seed=0
    )
    made.setup()
    return {split: set(images.names) for split, images in made.splits.items()}


def test_a_picture_stays_in_its_split_whatever_comes_or_goes(root, tmp_path):
    names = [f"{i}.png" for i in range(200)]
    fill(root, names)
    before = splits(root, tmp_path)
    assert set.union(*before.values()) == set(names) and sum(map(len, before.values())) == 200
    assert all(20 <= len(before[split]) <= 60 for split in ("validation", "test"))  # 3.5 standard deviations
    torch.manual_seed(2)
    for change in ("add", "remove"):
        if change == "add":
            fill(root, [f"new/{i}.png" for i in range(50)])
        else:
            for name in names[:100]:
                (root / name).unlink()
        after = splits(root, tmp_path)
        there = {name for name in names if (root / name).exists()}
        assert {split: found & there for split, found in after.items()} == {
            split: found & there for split, found in before.items()
        }
    moved = root.rename(tmp_path / "moved")
    assert splits(moved, tmp_path) == after


@pytest.mark.parametrize("share", [0.02, 0.2, 0.7])
def test_a_share_is_about_that_share(share):
    held = holdout_indices([f"{i}.png" for i in range(5000)], share, "data.test_size", "test/")
    assert abs(len(held) - 5000 * share) < 4 * (5000 * share * (1 - share)) ** 0.5


def test_a_count_is_kept_to(root, load, tmp_path):
    fill(root, [f"{i}.png" for i in range(100)])
    found = splits(root, tmp_path, test_size=20, validation_size=7)
    assert (len(found["test"]), len(found["validation"]), len(found["train"])) == (20, 7, 73)
    assert len(splits(root, tmp_path, test_size=20, validation_size=1)["validation"]) == 1  # not all
    (root / "new.png").write_bytes((root / "3.png").read_bytes())
    assert len(found["test"] & splits(root, tmp_path, test_size=20)["test"]) >= 19
    with pytest.raises(UserError, match=r"data.test_size=0 .*101 images"):
        load(test_size=0)


@pytest.mark.parametrize("n", range(1, 11))
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5])
def test_a_few_pictures_are_in_all_splits_or_it_is_said(root, tmp_path, n, share):
    fill(root, [f"{i}.png" for i in range(n)])
    if n < 3:
        with pytest.raises(UserError, match=f"_size={share} is invalid: .* of 1 images"):
            splits(root, tmp_path, test_size=share, validation_size=share)
    else:
        found = splits(root, tmp_path, test_size=0.1, validation_size=share)
        assert all(found.values()) and sum(map(len, found.values())) == n


def test_settings_of_reading(root, load):
    root.mkdir()
    Image.new("RGBA", (8, 4), (0, 0, 0, 0)).save(root / "a.png")
    Image.new("RGB", (8, 4), "red").save(root / "b.png")
    images = [
        load(s, channels=3, image_size=[4, 6], fit="pad", background="#010203", test_size=1) for s in ("train", "test")
    ]
    both = torch.cat([i.pixels for i in images])
    assert both.shape == (2, 3, 4, 6)
    clear, red = sorted(both, key=lambda picture: picture[0, 1, 3].item())
    assert clear[:, 1, 3].tolist() == [1, 2, 3] == red[:, 3, 0].tolist() and red[:, 1, 3].tolist() == [255, 0, 0]
    for wrong, sentence in (
        ({"fit": "fill"}, "fit=fill"),
        ({"channels": 2}, "C 1 or 3"),
        ({"background": "-"}, "no colour"),
    ):
        with pytest.raises(UserError, match=sentence):
            load(**wrong)


def test_pictures_are_decoded_once_and_mapped(root, load, tmp_path, monkeypatch):
    fill(root, [f"{i}.png" for i in range(10)])
    first = [load(split) for split in ("train", "test")]
    (place,) = kept(tmp_path)
    assert sorted(p.name for p in place.iterdir()) == ["index.json", "made_of.json", "pixels.npy"]
    assert place.name.startswith("pictures-")
    monkeypatch.setattr(module, "decode_to_cache", None)
    assert all(map(torch.equal, [load(split).pixels for split in ("train", "test")], [i.pixels for i in first]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of memory it may not write to
        train = load()
    with open(place / "pixels.npy", "r+b") as file:
        file.seek(-10 * 16, 2)
        file.write(bytes([77]))
    assert train.pixels[0, 0, 0, 0] == 77  # the file itself, and no copy


def test_a_folder_that_looks_the_same_has_a_file_of_its_own(root, load, tmp_path):
    """Names, sizes and times alike, as in archives with normalised times."""
    other = tmp_path / "elsewhere" / "pictures"
    for folder_, value in ((root, 0), (other, 255)):
        for name in ("1.bmp", "2.bmp"):
            folder_.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), value).save(folder_ / name)
            os.utime(folder_ / name, (10**9, 10**9))
    assert load().pixels[0, 0, 0, 0] == 0
    found = folder(other, "train", image_size=4, channels=1, cache=str(tmp_path / "cache"))
    assert found.pixels[0, 0, 0, 0] == 255


@pytest.mark.parametrize("change", ["add", "remove", "rename", "rewrite", "touch", "relabel"])
def test_a_changed_folder_is_noticed(root, load, tmp_path, change):
    fill(root, [f"a/{i}.png" for i in range(10)])
    load()
    picture = root / "a" / "3.png"
    status = picture.stat()
    {
        "add": lambda: fill(root, ["a/x.png"]),
        "remove": picture.unlink,
        "rename": lambda: picture.rename(root / "a" / "y.png"),
        "rewrite": lambda: Image.new("L", (40, 40), 99).save(picture),
        "touch": lambda: os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns + 1)),
        "relabel": lambda: [(root / "b").mkdir(), picture.rename(root / "b" / "3.png")],
    }[change]()
    if change == "rewrite":
        os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    before = kept(tmp_path)
    found = values(load()) + values(load("test"))
    assert len(kept(tmp_path)) == 1 and kept(tmp_path) != before
    assert len(found) == {"add": 11, "remove": 9}.get(change, 10) and (99 in found) == (change == "rewrite")


def test_other_settings_have_a_file_of_their_own(root, load, tmp_path):
    fill(root, [f"{i}.png" for i in range(10)])
    changes = [
        {},
        {"image_size": 5},
        {"image_size": [4, 5]},
        {"channels": 3},
        {"fit": "pad"},
        {"background": "red"},
        {"test_size": 3},
    ]
    for number, settings in enumerate(changes, 1):
        load(**settings)
        load("test", **settings)
        assert len(kept(tmp_path)) == number


def test_what_was_kept_of_the_pictures_before_is_removed_and_nothing_else(root, load, tmp_path, capsys):
    fill(root, [f"{i}.png" for i in range(10)])
    train = load()
    before = values(train)
    (old,) = kept(tmp_path)
    load(test_size=2)
    load(image_size=5)
    other = tmp_path / "elsewhere" / "pictures"
    fill(other, [f"{i}.png" for i in range(9)])
    folder(other, "train", image_size=4, channels=1, cache=str(tmp_path / "cache"))
    others = [place for place in kept(tmp_path) if place != old]
    part = tmp_path / "cache" / "pictures-1x4x4-0.part"  # of a process that was killed
    part.mkdir()
    shutil.copy(old / "made_of.json", part)
    strange = [tmp_path / "cache" / f"pictures-1x4x4-{i}" for i in range(1, 4)]
    for place in strange:
        place.mkdir()
        (place / "pixels.npy").write_text("mine")
    (strange[1] / "made_of.json").write_text("{}")
    shutil.copy(old / "made_of.json", strange[2])
    (strange[2] / "notes.txt").write_text("mine")
    capsys.readouterr()
    fill(root, ["new.png"])
    load()
    said = capsys.readouterr().err
    assert said.count("removed ") == 2 and f"removed {old}, of the pictures as they were before" in said
    assert not old.exists() and not part.exists() and all(place.exists() for place in others)
    assert all((place / "pixels.npy").read_text() == "mine" for place in strange)
    assert values(train) == before  # a run that has it mapped goes on


def test_what_cannot_be_read_is_left_out_and_named(root, load, capsys):
    fill(root, [f"{i}.png" for i in range(10)])
    (root / "broken.jpg").write_bytes(b"no")
    (root / "notes.txt").write_text("no picture")
    for _ in range(2):  # later as well
        found = values(load()) + values(load("test"))
        assert capsys.readouterr().err.count("pictures, 1 could not be read: broken.jpg (not a PNG") == 1
        assert sorted(found) == list(range(1, 11))


def test_nothing_to_read_is_a_sentence(root, load, tmp_path):
    with pytest.raises(UserError, match=r"data.root=.*pictures cannot be: there is no such folder"):
        load()
    root.mkdir()
    (root / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"has no pictures \(.png, .jpg"):
        load()
    for name in ("a.png", "b.png"):
        (root / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"no picture for (train|test) that can be read: 2 could not be read: [ab].png"):
        load(test_size=1)
    assert not kept(tmp_path)
    fill(root, ["train/a.png"])
    (root / "test").mkdir()
    with pytest.raises(UserError, match=r"has no pictures in test"):
        load()
    with pytest.raises(UserError, match=r"data.cache=.* lies in the pictures' own folder"):
        load(cache=str(root / "cache"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache=.*cannot be written"):
        shutil.rmtree(root / "test")
        fill(root, ["train/b.png"])
        load(cache=str(tmp_path / "file" / "below"))


def test_two_first_runs_at_once_decode_once(root, load, tmp_path, monkeypatch):
    fill(root, [f"{i}.png" for i in range(50)])
    decode, barrier, results = module.decode_to_cache, fork.Barrier(2), fork.Queue()

    def noted(*arguments):
        results.put("decoded")
        decode(*arguments)

    monkeypatch.setattr(module, "decode_to_cache", noted)

    def run():
        barrier.wait(30)
        results.put(sorted(values(load()) + values(load("test"))))

    processes = [fork.Process(target=run) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=30) for _ in range(3)]
    for process in processes:
        process.join(30)
    assert found.count("decoded") == 1 and found.count(list(range(1, 51))) == 2
    assert len(kept(tmp_path)) == 1


def test_a_killed_run_leaves_nothing_that_looks_whole(root, load, tmp_path, monkeypatch):
    fill(root, [f"{i}.png" for i in range(50)])

    def run():
        def killed(*arguments):
            for number, result in enumerate(iter_images(*arguments)):
                if number == 30:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield result

        iter_images = module.iter_images
        module.iter_images = killed
        load()

    process = fork.Process(target=run)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    (part,) = kept(tmp_path)
    assert part.suffix == ".part" and (part / "pixels.npy").exists()
    assert sorted(values(load()) + values(load("test"))) == list(range(1, 51))
    (whole,) = kept(tmp_path)
    assert whole.suffix != ".part"


def test_a_full_disk_is_a_sentence(root, load, tmp_path):
    fill(root, [f"{i}.png" for i in range(50)])
    sentence = fork.Queue()

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))  # bytes a file may have
        try:
            load()
        except UserError as error:
            sentence.put(str(error))

    process = fork.Process(target=run)
    process.start()
    assert re.search(r"data.cache=.*\.part cannot be written \(File too large\)", sentence.get(timeout=30))
    process.join(30)
    assert not kept(tmp_path)


def test_names_that_are_not_text(root, load):
    fill(root, ["a.png", "b.png", "grün/猫 1.png"])
    with open(os.path.join(os.fsencode(root), b"\xff\xfe.png"), "wb") as file:  # of another code page
        Image.new("L", (4, 4), 4).save(file, "PNG")
    assert sorted(values(load()) + values(load("test"))) == [1, 2, 3, 4]
    assert load().classes == [".", "grün"]


def test_a_damaged_file_is_not_read(root, load, tmp_path):
    fill(root, [f"{i}.png" for i in range(10)])
    load()
    (place,) = kept(tmp_path)
    pixels = (place / "pixels.npy").read_bytes()
    (place / "pixels.npy").write_bytes(pixels[:-1])
    with pytest.raises(UserError, match=f"{place} is damaged; delete it"):
        load()
    shutil.rmtree(place)
    assert sorted(values(load()) + values(load("test"))) == list(range(1, 11))
    assert (place / "pixels.npy").read_bytes() == pixels
    (place / "index.json").write_text("")
    with pytest.raises(UserError, match=f"{place} is damaged; delete it"):
        load()


def test_the_file_is_a_plain_npy(root, load, tmp_path):
    fill(root, [f"{i}.png" for i in range(10)])
    (root / "x.png").write_bytes(b"")
    load()
    array = np.load(kept(tmp_path)[0] / "pixels.npy")
    assert array.shape == (10, 1, 4, 4) and sorted(array[:, 0, 0, 0].tolist()) == list(range(1, 11))
