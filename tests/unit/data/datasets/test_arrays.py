import os
import re

import numpy as np
import pytest
import torch

from betavae.data.datasets.arrays import arrays
from betavae.data.holdout import resolve_count
from betavae.data.image_set import LazySubset
from betavae.errors import UserError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (40, 5, 7, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
NCHW = torch.from_numpy(COLOUR).permute(0, 3, 1, 2)


def rows(images):
    return images.pixels.index_select(0, torch.arange(len(images.pixels)))


def together(path, **settings):
    """Both splits' rows, and their numbers."""
    train, test = arrays(path, "train", **settings), arrays(path, "test", **settings)
    return torch.cat([rows(train), rows(test)]), len(train.pixels), len(test.pixels)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (GREY, NCHW[:, :1]),
        (COLOUR, NCHW),
        (COLOUR[..., :1], NCHW[:, :1]),
        (np.ascontiguousarray(COLOUR.transpose(0, 3, 1, 2)), NCHW),
        (NCHW[:, :1].numpy(), NCHW[:, :1]),  # (N, 1, 5, 7)
        (COLOUR[:, :1], torch.from_numpy(COLOUR[:, :1])),  # (N, 1, 7, 3) too is taken as (N, C, H, W)
        (COLOUR[:, :3], NCHW[:, :, :3]),  # (N, 3, 7, 3) is taken as (N, C, H, W)
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_all_layouts_give_every_picture_once(tmp_path, array, expected, suffix):
    path = tmp_path / f"a.{suffix}"
    np.save(path, array) if suffix == "npy" else np.savez(path, pictures=array)
    if array.shape[1:] == (3, 7, 3):
        expected = torch.from_numpy(array)
    pixels, train, test = together(path)
    assert pixels.dtype == torch.uint8 and pixels.shape == expected.shape and (train, test) == (36, 4)
    key = lambda x: sorted(map(bytes, x.reshape(len(x), -1).numpy()))  # noqa: E731
    assert key(pixels) == key(expected)
    assert arrays(path, "validation") is None
    assert not arrays(path, "train").labels.any() and arrays(path, "train").classes is None


def test_the_split_is_fixed_and_labels_go_with_their_pictures(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.arange(40, dtype=np.uint8).repeat(4).reshape(40, 2, 2), labels=np.arange(40)[:, None])
    torch.manual_seed(3)
    a = arrays(path, "test", 0.25)
    torch.manual_seed(4)
    b = arrays(path, "test", test_size=10)
    assert len(a.pixels) == 10 and torch.equal(a.labels, b.labels) and a.labels.tolist() != list(range(10))
    assert torch.equal(rows(a)[:, 0, 0, 0].long(), a.labels) and a.labels.dtype == torch.int64
    assert not set(a.labels.tolist()) & set(arrays(path, "train", 0.25).labels.tolist())
    for wrong in (0, 40, -1, 1.0 * 41):
        with pytest.raises(UserError, match=r"data.test_size=.* of 40 images"):
            arrays(path, "test", test_size=wrong)
    np.savez(path, images=GREY, labels=np.arange(80).reshape(40, 2))  # two factors
    assert arrays(path, "train").labels.shape == (36, 2)


def test_splits_of_the_files_own(tmp_path):
    path = tmp_path / "keras.npz"
    np.savez(path, x_train=GREY[:30], y_train=np.arange(30), x_test=GREY[30:], y_test=np.arange(10))
    train, test = arrays(path, "train"), arrays(path, "test")
    assert torch.equal(train.pixels, torch.from_numpy(GREY[:30, None])) and train.labels.tolist() == list(range(30))
    assert torch.equal(test.pixels, torch.from_numpy(GREY[30:, None])) and test.labels.tolist() == list(range(10))
    np.savez(path, x_train=GREY[:30])
    with pytest.raises(UserError, match=r"keras.npz holds x_train; it must hold x_test as well"):
        arrays(path, "test")


def test_a_npy_stays_in_its_file(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, GREY)
    train = arrays(path, "train")
    assert isinstance(train.pixels, LazySubset)
    before = rows(train).clone()
    with open(path, "r+b") as file:  # seen through the mapping, so nothing was copied
        file.seek(-GREY.nbytes, 2)
        file.write(bytes(255 - GREY.reshape(-1)))
    assert torch.equal(rows(train), 255 - before)


def test_a_file_larger_than_memory_is_mapped(tmp_path):
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shape = (2 * memory // 2**20, 1024, 1024)
    path = tmp_path / "a.npy"
    with open(path, "wb") as file:  # sparse: it takes no room on the disk
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + shape[0] * 2**20)
    test = arrays(path, "test", test_size=2)
    assert rows(test).shape == (2, 1, 1024, 1024) and not rows(test).any()


@pytest.mark.parametrize(
    ("name", "held", "sentence"),
    [
        ("a.npy", GREY / 255, r"floats in \[0, 1\].*\(images \* 255\)\.round\(\).*astype\('uint8'\)"),
        ("a.npy", GREY.astype(np.int64), r"int64.*\(images\)\.round\(\)"),
        ("a.npy", GREY * np.uint16(257), r"uint16.*\(images / 257\)\.round\(\)"),
        ("a.npy", GREY > 9, r"bool.*\* 255"),
        ("a.npy", GREY[0], r"images is \(5, 7\); it must be \(N, H, W\)"),
        ("a.npy", np.zeros((9, 8, 8, 4), np.uint8), r"\(9, 8, 8, 4\).*C 1 or 3"),
        ("a.npy", np.array([{}]), "is not a whole NumPy file"),
        ("a.npz", {"a": GREY, "b": GREY}, "holds a, b: which are the pictures"),
        ("a.npz", {}, "holds nothing"),
        ("a.npz", {"images": np.array([{}])}, "images cannot be read"),
        ("a.npz", {"images": GREY, "labels": np.arange(3)}, r"labels is \(3,\) of int64; .*\(40,\)"),
        ("a.npz", {"images": GREY, "labels": np.arange(40) / 2}, "float64; it must be whole numbers"),
        ("a.npz", {"images": GREY, "labels": np.array(["cat"] * 40)}, "it must be whole numbers"),
    ],
)
def test_what_cannot_be_taken_is_a_sentence(tmp_path, name, held, sentence):
    path = tmp_path / name
    np.savez(path, **held) if isinstance(held, dict) else np.save(path, held)
    with pytest.raises(UserError, match=rf"{name}.*{sentence}"):
        arrays(path, "train")


def test_the_line_that_converts_is_right(tmp_path):
    np.save(tmp_path / "a.npy", GREY / 255)
    with pytest.raises(UserError) as error:
        arrays(tmp_path / "a.npy", "train")
    made = {}
    exec(re.search("`(.*)`", str(error.value))[1], {"images": GREY / 255}, made)
    assert np.array_equal(made["pixels"], GREY) and made["pixels"].dtype == np.uint8


@pytest.mark.parametrize("cut", [0, 40, 500])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_cut_files_are_a_sentence(tmp_path, cut, suffix):
    path = tmp_path / f"a.{suffix}"
    np.save(path, GREY) if suffix == "npy" else np.savez(path, images=GREY)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=f"{path} is not a whole NumPy file"):
        arrays(path, "train")
    with pytest.raises(UserError, match=r"none.npy cannot be read: there is no such file"):
        arrays(tmp_path / "none.npy", "train")


def test_subsets_of_subsets_and_counts():
    pixels = torch.arange(12, dtype=torch.uint8).view(6, 2, 1, 1)
    inner = LazySubset(pixels, torch.tensor([5, 3, 1, 0]))
    outer = LazySubset(inner, torch.tensor([2, 0]))
    assert len(outer) == 2 and outer.shape == (2, 2, 1, 1) and outer.to("cpu") is outer
    assert torch.equal(outer.index_select(0, torch.tensor([1, 0, 1])), pixels[[5, 1, 5]])
    assert inner.to("meta").shape == (4, 2, 1, 1)
    assert [resolve_count(size, 8, "k") for size in (0.01, 0.5, 1, 7)] == [1, 4, 1, 7]
