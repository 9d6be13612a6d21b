import re

import numpy as np
import pytest
import torch

from betavae.data import image_set, scaling
from betavae.data.datamodule import ImageDataModule
from betavae.data.datasets.arrays import load_arrays
from betavae.data.fingerprint import fingerprint
from betavae.data.image_set import ImageSet, LazySubset
from betavae.data.loader import BatchLoader, binarize_images
from betavae.data.scaling import FULL_SCALE, MODES, Scaling, check_values, fit_scaling, measure
from betavae.errors import UserError
from tests.conftest import DATA

RNG = np.random.default_rng(0)
UNIT = RNG.random((40, 2, 3, 4)) * np.array([1, 0.8]).reshape(2, 1, 1)  # two channels of other ranges


def stored(dtype, values=UNIT):
    """Convert values in [0, 1] to all of the range of a type."""
    kind = getattr(torch, dtype)
    full = torch.from_numpy(values) * FULL_SCALE[dtype]
    return (full if kind.is_floating_point else full.round()).to(kind)


def as_set(pixels):
    return ImageSet(pixels, torch.zeros(len(pixels), dtype=torch.int64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FULL_SCALE)
def test_stored_values_return_from_every_type_and_scaling(dtype, mode):
    pixels = stored(dtype)
    before = pixels.clone()
    found = fit_scaling(mode, {"train": as_set(pixels)}, "a")
    x = found.apply(pixels)
    assert x.dtype == torch.float32 and torch.equal(pixels, before)  # scaled, and not in place
    if pixels.is_floating_point():
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == "float16" else {"rtol": 2e-6, "atol": 2e-6}
        torch.testing.assert_close(found.to_stored(x), pixels, **tolerance)
    else:
        assert torch.equal(found.to_stored(x), pixels)
    values = pixels.double().transpose(0, 1).flatten(1)
    span = {
        "unit": (0, FULL_SCALE[dtype]),
        "minmax": (values.amin(1), values.amax(1) - values.amin(1)),
        "standardize": (values.mean(1), values.std(1, correction=0)),
        "none": (0, 1),
    }[mode]
    expected = (values - torch.as_tensor(span[0]).view(-1, 1)) / torch.as_tensor(span[1]).view(-1, 1)
    torch.testing.assert_close(x.transpose(0, 1).flatten(1).double(), expected, rtol=1e-5, atol=1e-5)


def test_bytes_are_scaled_as_ever():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(Scaling.unit().apply(pixels), pixels.float().div_(255))


def test_a_checkpoint_gives_back_the_scaling_and_rejects_others():
    from dataclasses import asdict

    found = fit_scaling("standardize", {"train": as_set(stored("uint16"))}, "a")
    assert Scaling.from_dict(asdict(found), 2) == found
    for changes in ({"shift": [0.0]}, {"factor": [0.0, 1.0]}, {"mode": "x"}, {"dtype": "int8"}, {"low": "0"}, {"a": 1}):
        with pytest.raises(ValueError, match="scaling is not valid"):
            Scaling.from_dict(asdict(found) | changes, 2)
    with pytest.raises(ValueError, match="scaling is not valid"):
        Scaling.from_dict(asdict(found), 3)
    # Bytes are also scaled without these numbers.
    for changes in ({"factor": [5.0]}, {"shift": [1.0]}, {"high": -1.0}, {"shift": [], "factor": []}):
        with pytest.raises(ValueError, match="scaling is not valid"):
            Scaling.from_dict(asdict(Scaling.unit()) | changes, 1)


@pytest.mark.parametrize("mode", ["minmax", "standardize", "none"])
def test_pictures_of_constant_data_are_black(mode):
    pixels = torch.full((4, 1, 2, 2), 5.0)
    found = fit_scaling(mode, {"train": as_set(pixels)}, "a")
    x = found.apply(pixels)
    assert found.factor == [1.0] and torch.equal(found.to_picture(x), torch.zeros(4, 1, 2, 2))
    assert torch.equal(found.to_stored(x), pixels)


@pytest.mark.parametrize("mode", ["minmax", "standardize", "none"])
def test_values_beyond_float32_are_rejected(mode):
    pixels = torch.tensor([0.0, 1.7e308], dtype=torch.float64).view(2, 1, 1, 1)
    with pytest.raises(UserError, match=r"images have values from 0 to 1.7e.308: expected at most 3.4e38"):
        fit_scaling(mode, {"train": as_set(pixels)}, "a")


def test_large_float64_values_keep_their_differences():
    pixels = torch.from_numpy(1e9 + UNIT)
    x = fit_scaling("minmax", {"train": as_set(pixels)}, "a").apply(pixels)
    torch.testing.assert_close(
        x.double(),
        fit_scaling("minmax", {"train": as_set(pixels - 1e9)}, "a").apply(pixels - 1e9).double(),
        rtol=0,
        atol=1e-6,
    )


def test_statistics_of_blocks_are_those_of_the_whole(monkeypatch):
    pixels = 5 + 3 * torch.from_numpy(UNIT)
    whole = measure(as_set(pixels))
    monkeypatch.setattr(scaling, "BLOCK_VALUES", 70)  # two images
    blocks = measure(as_set(pixels))
    values = pixels.transpose(0, 1).flatten(1)
    for found in (whole, blocks):
        torch.testing.assert_close(found.mean, values.mean(1))
        torch.testing.assert_close(found.std, values.std(1, correction=0))
        assert torch.equal(found.low, values.amin(1)) and torch.equal(found.high, values.amax(1))


def test_only_training_images_are_fitted(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(40, dtype=np.float32).reshape(40, 1, 1))
    settings = {"name": "arrays", "root": str(tmp_path / "a.npy"), "validation_size": 8, "batch_size": 8}
    data = ImageDataModule(**DATA | settings, scaling="standardize", test_size=8)
    data.setup()
    train = data.originals["train"].tensor()
    assert data.scaling.shift == pytest.approx([train.mean().item()])
    assert data.scaling.factor == pytest.approx([train.std(correction=0).item()])
    x = torch.cat([x for x, _ in data.train_dataloader()])
    assert x.mean().abs() < 1e-6 and x.std(correction=0).item() == pytest.approx(1)
    test = torch.cat([x for x, _ in data.test_dataloader()])
    torch.testing.assert_close(test, (data.originals["test"].tensor() - train.mean()) / train.std(correction=0))


def test_a_mapped_file_of_floats_is_never_copied(tmp_path, monkeypatch):
    """A file above the limit is indexed lazily, and measured and loaded a block at a time."""
    np.save(tmp_path / "a.npy", RNG.random((500, 8, 8)).astype(np.float32))
    monkeypatch.setattr(image_set, "MAX_COPY_BYTES", 500 * 64 * 4 // 8)
    monkeypatch.setattr(scaling, "BLOCK_VALUES", 64 * 32)
    largest = 0
    read = LazySubset.index_select

    def spy(self, dim, index):
        nonlocal largest
        largest = max(largest, len(index))
        return read(self, dim, index)

    monkeypatch.setattr(LazySubset, "index_select", spy)
    settings = {"name": "arrays", "root": str(tmp_path / "a.npy"), "validation_size": 50, "batch_size": 16}
    data = ImageDataModule(**DATA | settings | {"eval_batch_size": 16}, scaling="minmax")
    data.setup()
    assert isinstance(data.splits["train"].pixels, LazySubset) and data.splits["train"].dtype == torch.float32
    assert sum(len(x) for x, _ in data.train_dataloader()) == 400
    assert largest == 32


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_damaged_values_are_counted_and_the_remedy_works(tmp_path, dtype):
    images = (3 - 6 * RNG.random((20, 4, 4))).astype(dtype)
    images[3, :2, 1], images[3, 0, 0], images[7, 1, 1] = np.nan, np.inf, -np.inf
    np.save(tmp_path / "a.npy", images)
    finite = images[np.isfinite(images)]
    with pytest.raises(UserError) as error:
        check_values(as_set(torch.from_numpy(images[:, None])), "minmax", "a.npy: the train images")
    text = str(error.value)
    assert "a.npy: the train images hold 2 NaN and 2 infinite values, in 2 of 20 images" in text
    assert f"from {finite.min():.6g} to {finite.max():.6g}" in text
    names = {"np": np, "images": images}
    exec(re.search("`(.*)`", text)[1], names)
    assert np.array_equal(names["images"], np.delete(images, [3, 7], 0))
    images[:, 0, 0] = np.nan
    with pytest.raises(UserError) as error:
        check_values(as_set(torch.from_numpy(images[:, None])), "minmax", "a")
    names = {"np": np, "images": images}
    exec(re.search("`(.*)`", str(error.value))[1], names)
    assert np.isfinite(names["images"]).all() and names["images"].min() >= images[np.isfinite(images)].min() - 1e-3


def test_floats_outside_the_unit_interval_are_counted():
    pixels = torch.linspace(-1, 4, 101).view(101, 1, 1, 1)
    message = r"a: the train images have 80 of 101 values outside of \[0, 1\] \(they are from -1 to 4\)"
    with pytest.raises(UserError, match=rf"{message}.*unit.*data.scaling=minmax, or .*standardize with .*=gaussian"):
        fit_scaling("unit", {"train": as_set(pixels)}, "a")
    assert fit_scaling("minmax", {"train": as_set(pixels)}, "a").apply(pixels).aminmax() == (0, 1)
    inside = as_set(pixels[20:40])
    assert fit_scaling("unit", {"train": inside}, "a") == Scaling.unit("float32")
    with pytest.raises(UserError, match="the test images have"):  # of every split
        fit_scaling("unit", {"train": inside, "test": as_set(pixels)}, "a")


@pytest.mark.parametrize(
    ("values", "dtype", "name"),
    [
        ([0, 255], "int64", "uint8"),
        ([0, 256], "int32", "uint16"),
        ([0, 65535], "uint32", "uint16"),
        ([-1024, 3071], "int16", "float32"),
        ([-5, 5], "int8", "float32"),
        ([0, 2**24 + 1], "int64", "float64"),
        ([0, 1], ">f4", "float32"),
        ([0, 7], ">u2", "uint16"),
    ],
)
def test_other_types_are_rejected_with_an_exact_conversion(tmp_path, values, dtype, name):
    images = np.array(values).astype(dtype)[RNG.integers(0, 2, (20, 3, 3))]
    np.save(tmp_path / "a.npy", images)
    with pytest.raises(
        UserError, match=rf"{tmp_path}/a.npy: images holds .* from {values[0]}.* to {values[1]}"
    ) as error:
        load_arrays(tmp_path / "a.npy", "train")
    names = {"images": images}
    exec(re.search("`(.*)`", str(error.value))[1], names)
    assert names["images"].dtype == name and np.array_equal(names["images"], images)
    assert ("data.scaling" in str(error.value)) == name.startswith("float")
    np.save(tmp_path / "a.npy", names["images"])
    assert load_arrays(tmp_path / "a.npy", "train").dtype == getattr(torch, name)


@pytest.mark.parametrize(("dtype", "high"), [("uint8", 1), ("uint16", 4095), ("uint16", 1023)])
def test_a_maximum_far_below_the_range_is_a_warning(capsys, dtype, high):
    pixels = (torch.from_numpy(UNIT) * high).round().to(getattr(torch, dtype))
    pixels[0, 0, 0, 0] = high
    fit_scaling("unit", {"train": as_set(pixels)}, "a")
    assert re.search(rf"a: the largest value is {high}, far below .*data.scaling=minmax", capsys.readouterr().err)
    fixed = fit_scaling("minmax", {"train": as_set(pixels)}, "a")
    assert fixed.apply(pixels).amax() == 1 and not capsys.readouterr().err
    fit_scaling("unit", {"train": as_set(stored(dtype))}, "a")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("mode", ["threshold", "dynamic"])
@pytest.mark.parametrize("pixels", [torch.rand(9, 1, 4, 4) > 0.5, (torch.rand(9, 1, 4, 4) > 0.5).byte()])
def test_masks_stay_as_they_are_when_they_are_binarized(pixels, mode):
    images = as_set(pixels)
    found = fit_scaling("minmax", {"train": images}, "a")
    assert torch.equal(binarize_images(images, mode, found).pixels, pixels)
    x, _ = next(iter(BatchLoader(images, 9, binarize=mode, scaling=found)))
    assert torch.equal(x, pixels.float())


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_dynamic_binarization_draws_with_probability_x(dtype):
    images = as_set(torch.full((1, 1, 200, 200), 0.3).mul(FULL_SCALE[dtype]).to(getattr(torch, dtype)))
    found = Scaling.unit(dtype)
    x = found.apply(binarize_images(images, "dynamic", found).pixels)
    assert set(x.flatten().tolist()) == {0, 1} and x.mean().item() == pytest.approx(0.3, abs=0.012)


def test_binarization_needs_values_in_the_unit_interval():
    with pytest.raises(
        UserError, match=r"data.scaling=none is invalid with data.binarize=dynamic: expected unit or mi"
    ):
        ImageDataModule(**DATA | {"root": "a", "binarize": "dynamic"}, scaling="none")


def test_fingerprints_tell_types_apart():
    pixels = torch.ones(4, 1, 2, 2)
    found = {fingerprint(as_set(pixels.to(getattr(torch, dtype)))) for dtype in FULL_SCALE}
    assert len(found) == len(FULL_SCALE)


def test_data_units_invert_and_pictures_span_the_training_data():
    pixels = 300 * torch.from_numpy(UNIT) - 100
    found = fit_scaling("standardize", {"train": as_set(pixels)}, "a")
    x = found.apply(pixels)
    torch.testing.assert_close(found.to_data_units(x), pixels, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.from_data_units(found.to_data_units(x)), x)
    picture = found.to_picture(x)
    assert picture.amin().item() == pytest.approx(0, abs=1e-6) and picture.amax().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(found.from_picture(picture), x, rtol=1e-4, atol=1e-4)
    # p(value) = p(x) |dx / dvalue|: the two densities of the same normal distribution.
    scale = torch.tensor(found.factor).view(2, 1, 1)
    mean = torch.tensor(found.shift).view(2, 1, 1)
    of_x = torch.distributions.Normal(0, 1).log_prob(x).sum((1, 2, 3))
    of_values = torch.distributions.Normal(mean, scale).log_prob(pixels.float()).sum((1, 2, 3))
    torch.testing.assert_close(-of_x + found.log_volume((2, 3, 4)), -of_values, rtol=1e-4, atol=1e-3)
