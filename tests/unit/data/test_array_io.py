import zipfile

import numpy as np
import pytest
import torch

from betavae.data.array_io import ArrayFile
from betavae.errors import UserError

COLOR = np.random.default_rng(0).integers(0, 256, (40, 5, 7, 3), dtype=np.uint8)
GRAY = COLOR[..., 0]
NCHW = torch.from_numpy(COLOR).permute(0, 3, 1, 2)


def save(path, content):
    """Save an array as .npy, or named arrays as .npz."""
    np.savez(path, **content) if isinstance(content, dict) else np.save(path, content)
    return path


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (GRAY, NCHW[:, :1]),
        (COLOR, NCHW),
        (COLOR[..., :1], NCHW[:, :1]),
        (np.ascontiguousarray(COLOR.transpose(0, 3, 1, 2)), NCHW),
        (NCHW[:, :1].numpy(), NCHW[:, :1]),
        (COLOR[:, :1], torch.from_numpy(COLOR[:, :1])),  # (N, 1, 7, 3) is taken as (N, C, H, W)
        (COLOR[:, :3], torch.from_numpy(COLOR[:, :3])),  # (N, 3, 7, 3) too
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_all_layouts_are_read_as_nchw(tmp_path, array, expected, suffix):
    path = save(tmp_path / f"a.{suffix}", array if suffix == "npy" else {"photos": array, "labels": np.arange(40)})
    pixels = ArrayFile(path).read_pixels()
    assert pixels.dtype == torch.uint8 and torch.equal(pixels, expected)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.arange(3)[:, None], [0, 1, 2]),
        (np.array([True, False, True]), [1, 0, 1]),
        (np.array([1, 2, 0], np.uint8), [1, 2, 0]),
        (np.arange(6).reshape(3, 2), [[0, 1], [2, 3], [4, 5]]),
    ],
)
def test_labels_are_integers_or_factors(tmp_path, labels, expected):
    file = ArrayFile(save(tmp_path / "a.npz", {"images": GRAY[:3], "labels": labels}))
    found, classes = file.read_labels("labels", 3)
    assert classes is None and found.dtype == torch.int64 and found.tolist() == expected
    assert file.read_labels("y_train", 3)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("labels", "numbers", "classes"),
    [
        (np.array([9, 2**40, -1]), [1, 2, 0], ["-1", "9", str(2**40)]),
        (np.array([3, 8, 3]), [0, 1, 0], ["3", "8"]),
        (np.array([[2**64 - 1], [5], [5]], np.uint64), [1, 0, 0], ["5", str(2**64 - 1)]),
        (np.array(["img10", "img9", "Katze"]), [1, 0, 2], ["img9", "img10", "Katze"]),
        (np.array([b"cat", b"dog", b"cat"]), [0, 1, 0], ["cat", "dog"]),
    ],
)
def test_other_labels_are_numbered_and_named(tmp_path, labels, numbers, classes):
    file = ArrayFile(save(tmp_path / "a.npz", {"images": GRAY[:3], "labels": labels}))
    found, names = file.read_labels("labels", 3)
    assert found.dtype == torch.int64 and found.tolist() == numbers and names == classes


def test_labels_of_splits_with_other_types_are_rejected(tmp_path):
    arrays = {"y_train": np.array([0, 1, 1]), "y_test": np.array(["cat", "dog", "dog"])}
    file = ArrayFile(save(tmp_path / "a.npz", arrays))
    with pytest.raises(UserError, match="y_train is int64, and other labels are <U3"):
        file.read_labels("y_train", 3, ["y_train", "y_val", "y_test"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", GRAY + 0j, r"images is of type complex128: expected one of bool, uint8, uint16, float16"),
        ("a.npy", GRAY[0], r"images has shape \(5, 7\): expected \(N, H, W\)"),
        ("a.npy", np.zeros((9, 8, 8, 4), np.uint8), r"\(9, 8, 8, 4\).*C 1 or 3"),
        ("a.npy", np.zeros((0, 8, 8), np.uint8), r"\(0, 1, 8, 8\)"),
        ("a.npy", np.array([{}]), "is not a complete NumPy file"),
        ("a.npz", {"a": GRAY, "b": GRAY}, "holds a, b: expected one array of images"),
        ("a.npz", {}, "holds no arrays"),
        ("a.npz", {"images": np.array([{}])}, "images is not a plain array"),
        (
            "a.npz",
            {"images": GRAY, "labels": np.arange(3)},
            r"labels is int64 \(3,\): expected integers or text",
        ),
        ("a.npz", {"images": GRAY, "labels": np.arange(40) / 2}, "float64 .*: expected integers"),
        ("a.npz", {"images": GRAY, "labels": np.array([["cat"] * 2] * 40)}, "expected integers"),
    ],
)
def test_other_arrays_are_rejected_with_a_reason(tmp_path, name, content, message):
    path = save(tmp_path / name, content)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        file = ArrayFile(path)
        file.read_labels("labels", len(file.read_pixels()))


@pytest.mark.parametrize("length", [0, 40, 500])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_truncated_files_are_rejected(tmp_path, length, suffix):
    path = save(tmp_path / f"a.{suffix}", GRAY if suffix == "npy" else {"images": GRAY})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=f"{path} is not a complete NumPy file"):
        ArrayFile(path)


def test_compression_without_a_limit_is_rejected(tmp_path):
    np.save(tmp_path / "images.npy", GRAY)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.write(tmp_path / "images.npy", "images.npy")
    with pytest.raises(UserError, match=r"images.npy is compressed by a method that NumPy does not write"):
        ArrayFile(tmp_path / "a.npz")


def test_missing_files_and_arrays_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none.npy does not exist"):
        ArrayFile(tmp_path / "none.npy")
    with pytest.raises(UserError, match=r"a.npz has no array names \(it has a, b\)"):
        ArrayFile(save(tmp_path / "a.npz", {"a": GRAY, "b": GRAY})).read("names")
