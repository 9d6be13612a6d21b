import numpy as np
import pytest
import torch

from betavae.data.datasets.dsprites import FILE, load_dsprites
from betavae.data.datasets.sprites import split_indices
from betavae.errors import UserError


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.fixture(scope="module")
def arrays():
    """The arrays of the published file, with fewer and smaller images."""
    random = np.random.RandomState(0)
    return {
        "imgs": random.randint(2, size=(21_000, 8, 16)).astype(np.uint8),
        "latents_classes": random.randint(6, size=(21_000, 6)),
        "metadata": np.array(Trap(), dtype=object),  # pickled, as in the published file
    }


def write(folder, arrays):
    np.savez_compressed(folder / FILE, **arrays)
    return folder


def test_images_and_factors_are_read_from_the_file(tmp_path, arrays):
    write(tmp_path, arrays)
    images = torch.from_numpy(arrays["imgs"])[:, None] * 255
    labels = torch.from_numpy(arrays["latents_classes"])[:, 1:]
    train = load_dsprites(tmp_path, "train")
    assert train.pixels.shape == images.shape and len(train.pixels) == 21_000
    index = torch.tensor([20_999, 0, 5, 5, 8191, 8192])
    for pixels in (train.pixels, train.pixels.to("cpu")):
        assert torch.equal(pixels.index_select(0, index), images[index])
    assert train.labels.dtype == torch.int64 and torch.equal(train.labels, labels)
    test = load_dsprites(tmp_path, "test")
    rows = split_indices("test", 21_000)
    assert torch.equal(test.pixels.index_select(0, torch.arange(10_000)), images[rows])
    assert torch.equal(test.labels, labels[rows])


@pytest.mark.parametrize(
    "wrong",
    [
        {"imgs": np.zeros((21_000, 8, 16))},
        {"imgs": np.zeros((21_000, 128), np.uint8)},
        {"imgs": np.full((21_000, 8, 16), 255, np.uint8)},
        {"imgs": np.asfortranarray(np.zeros((21_000, 8, 16), np.uint8))},
        {"imgs": np.zeros((20_999, 8, 16), np.uint8)},
        {"imgs": np.array([Trap()], dtype=object)},
        {"latents_classes": np.zeros((21_000, 5), int)},
        {"latents_classes": np.zeros((21_000, 6))},
        {"latents_classes": np.array([Trap()], dtype=object)},
    ],
)
def test_other_arrays_are_rejected(tmp_path, arrays, wrong):
    with pytest.raises(UserError, match="is not dSprites' file"):
        load_dsprites(write(tmp_path, arrays | wrong), "train")


def test_missing_damaged_and_other_files_are_rejected(tmp_path, arrays):
    with pytest.raises(UserError, match="is missing; download it"):
        load_dsprites(tmp_path, "train")
    path = write(tmp_path, arrays) / FILE
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[10_000:10_100] = bytes(100)
    for wrong in (b"", b"not a zip", content[:-1000], bytes(damaged)):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match="is not dSprites' file"):
            load_dsprites(tmp_path, "train")
    np.savez(path, imgs=arrays["imgs"])
    with pytest.raises(UserError, match="is not dSprites' file"):
        load_dsprites(tmp_path, "train")
