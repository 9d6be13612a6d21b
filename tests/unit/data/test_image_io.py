import itertools
import os

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from betavae.data.image_io import UnreadableImage, find_common_dtype, read_image, read_images
from betavae.errors import UserError

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)


def chw(array):
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def save(path, array, **settings):
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **settings)
    return path


@pytest.mark.parametrize(
    ("name", "settings"), [("a.png", {}), ("a.webp", {"lossless": True}), ("a.bmp", {}), ("a.tif", {}), ("A.TIFF", {})]
)
@pytest.mark.parametrize("array", [COLOR, GRAY])
def test_lossless_formats_keep_every_byte(tmp_path, name, settings, array):
    pixels, notes = read_image(save(tmp_path / name, array, **settings), (3 if array.ndim == 3 else 1, 6, 9))
    if name == "a.webp" and array.ndim == 2:  # WebP has no gray mode
        assert (pixels[0].int() - chw(array)[0].int()).abs().max() <= 1 and notes == ["color converted to gray"]
    else:
        assert pixels.dtype == torch.uint8 and torch.equal(pixels, chw(array)) and notes == []


def test_jpeg_cmyk_and_multi_picture_files_are_read(tmp_path):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(32, 0)
    flat = np.stack([ramp, 255 - ramp, ramp // 2], -1)
    for name, image in {"a": Image.fromarray(flat), "b": Image.fromarray(flat).convert("CMYK")}.items():
        pixels, notes = read_image(save(tmp_path / f"{name}.jpg", image, quality=98), (3, 32, 64))
        assert (pixels.int() - chw(flat).int()).abs().float().mean() < 3 and notes == []
    Image.fromarray(flat).save(
        tmp_path / "c.jpg", "MPO", save_all=True, append_images=[Image.fromarray(255 - flat)], quality=98
    )
    pixels, notes = read_image(tmp_path / "c.jpg", (3, 32, 64))
    assert (pixels.int() - chw(flat).int()).abs().float().mean() < 3 and notes == ["first of several frames"]


def test_a_large_jpeg_is_close_to_a_full_decode(tmp_path):
    y, x = np.mgrid[:1001, :1501] / 1000
    waves = [np.sin(40 * x + 7 * c) * np.cos(30 * y) for c in range(3)]
    array = (127 + 120 * np.stack(waves, -1)).astype(np.uint8)
    fast = read_image(save(tmp_path / "a.jpg", array, quality=95), (3, 48, 64))[0]
    whole = read_image(save(tmp_path / "a.png", array), (3, 48, 64))[0]
    assert (fast.float() - whole.float()).square().mean().sqrt() < 1.5


def test_gif_frames_and_transparent_palette_colors_are_read(tmp_path):
    frames = [Image.fromarray(np.full((4, 4), v, np.uint8)) for v in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    pixels, notes = read_image(tmp_path / "a.gif", (1, 4, 4))
    assert not pixels.any() and "first of several frames" in notes
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 2), 1)
    for name in ("b.gif", "b.png"):
        pixels, notes = read_image(save(tmp_path / name, palette, transparency=1), (3, 4, 4), background="#ff8000")
        expected = torch.tensor([10, 20, 30]).view(3, 1, 1).repeat(1, 4, 4)
        expected[:, 2, 1] = torch.tensor([255, 128, 0])
        assert torch.equal(pixels.long(), expected) and notes == ["transparent parts filled with #ff8000"]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_is_rounded_to_8(tmp_path, suffix):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels, notes = read_image(save(tmp_path / f"a.{suffix}", values), (1, 256, 256))
    assert np.array_equal(pixels[0].numpy(), np.rint(values / 65535 * 255).astype(np.uint8))
    assert notes == ["converted from 16 to 8 bits"]
    pixels, notes = read_image(tmp_path / f"a.{suffix}", (3, 256, 256))
    assert pixels[:, -1, -1].tolist() == [255] * 3
    assert notes == ["converted from 16 to 8 bits", "gray converted to color"]


def test_16_bit_tiffs_of_both_byte_orders_are_read(tmp_path):
    def tiff(path, order, values):  # Pillow does not write 16-bit color
        data = values.astype(order + "u2").tobytes()
        samples = values.shape[2]
        tags = [(256, 3, 1, values.shape[1]), (257, 3, 1, values.shape[0]), (258, 3, 1, 16), (259, 3, 1, 1)]
        tags += [(262, 3, 1, 2 if samples == 3 else 1), (273, 4, 1, 8), (277, 3, 1, samples)]
        tags += [(278, 3, 1, values.shape[0]), (279, 4, 1, len(data))]
        at = 8 + len(data)
        if samples == 3:
            tags[2] = (258, 3, 3, at)
            at += 6
        int_ = lambda v, n: int(v).to_bytes(n, "little" if order == "<" else "big")  # noqa: E731
        out = (b"II*\0" if order == "<" else b"MM\0*") + int_(at, 4) + data + (int_(16, 2) * 3 if samples == 3 else b"")
        out += int_(len(tags), 2)
        for tag, kind, count, value in tags:
            field = int_(value, 2) + b"\0\0" if kind == 3 and count == 1 else int_(value, 4)
            out += int_(tag, 2) + int_(kind, 2) + int_(count, 4) + field
        path.write_bytes(out + bytes(4))
        return path

    gray = np.array([[0, 65535, 32896, 257]], np.uint16)
    for order, name in (("<", "a.tif"), (">", "b.tif")):
        assert read_image(tiff(tmp_path / name, order, gray[..., None]), (1, 1, 4))[0].tolist() == [[[0, 255, 128, 1]]]
        color = np.stack([gray, gray // 2, 65535 - gray], -1)
        pixels = read_image(tiff(tmp_path / f"color_{name}", order, color), (3, 1, 4))[0]
        assert torch.equal(pixels, chw((color >> 8).astype(np.uint8)))


# The transformation of each orientation in the EXIF standard, and of a number that it does not have.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
    9: lambda a: a,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg"])
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    array = COLOR if suffix != "jpg" else np.kron(COLOR, np.ones((16, 16, 1), np.uint8))  # whole JPEG blocks
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    settings = {"lossless": True} if suffix == "webp" else {"quality": 98, "subsampling": 0} if suffix == "jpg" else {}
    path = save(tmp_path / f"a.{suffix}", array, exif=exif, **settings)
    expected = TURNS[orientation](array)
    pixels, notes = read_image(path, (3, *expected.shape[:2]))
    difference = (pixels.int() - chw(expected).int()).abs().float().mean()
    assert difference < 2 if suffix == "jpg" else difference == 0
    assert notes == (["rotated by its EXIF orientation"] if 1 < orientation < 9 else [])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_gray_tiffs_is_applied(tmp_path, orientation, dtype):
    array = np.arange(54, dtype=dtype).reshape(6, 9)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(array).save(tmp_path / "a.tif", exif=exif)
    expected = TURNS[orientation](array)
    found = read_image(tmp_path / "a.tif", (1, *expected.shape), dtype=torch.from_numpy(array).dtype).pixels
    assert np.array_equal(found[0].numpy(), expected)


def test_a_pipe_has_no_type(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert find_common_dtype([tmp_path / "a.png"]) == torch.uint8


def test_alpha_is_composited_before_resizing(tmp_path):
    rgba = np.zeros((2, 4, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, [[0, 255, 128, 51]] * 2
    path = save(tmp_path / "a.png", rgba)
    pixels, notes = read_image(path, (3, 2, 4), background="black")
    assert pixels[0].tolist() == [[0, 200, 100, 40]] * 2 and not pixels[1:].any()
    assert notes == ["transparent parts filled with black"]
    expected = [[255, 200, 227, 244], [255, 0, 127, 204], [255, 0, 127, 204]]
    assert read_image(path, (3, 2, 4))[0][:, 0].tolist() == expected
    # Invisible black beside visible white leaves no gray rim.
    rim = np.zeros((8, 8, 4), np.uint8)
    rim[:, :3] = 255
    assert (read_image(save(tmp_path / "b.png", rim), (3, 4, 4))[0] == 255).all()
    # An opaque image is not composited.
    assert read_image(save(tmp_path / "c.png", np.dstack([COLOR, np.full((6, 9), 255, np.uint8)])), (3, 6, 9))[1] == []
    gray = np.dstack([GRAY, np.full((6, 9), 255, np.uint8)])
    pixels, notes = read_image(save(tmp_path / "d.png", Image.fromarray(gray, "LA")), (1, 6, 9))
    assert torch.equal(pixels, chw(GRAY)) and notes == []


def test_color_and_gray_are_converted(tmp_path):
    primaries = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [90, 90, 90]]], np.uint8)
    pixels, notes = read_image(save(tmp_path / "a.png", primaries), (1, 1, 4))
    assert pixels.tolist() == [[[76, 150, 29, 90]]] and notes == ["color converted to gray"]  # 0.299, 0.587, 0.114
    pixels, notes = read_image(save(tmp_path / "b.png", GRAY), (3, 6, 9))
    assert torch.equal(pixels, chw(GRAY).repeat(3, 1, 1)) and notes == ["gray converted to color"]
    bits = Image.fromarray(GRAY > 127)
    assert torch.equal(
        read_image(save(tmp_path / "c.png", bits), (1, 6, 9))[0], chw((GRAY > 127).astype(np.uint8) * 255)
    )


def test_crop_keeps_the_middle_and_pad_the_whole_image(tmp_path):
    path = save(tmp_path / "a.png", GRAY)  # 6 high, 9 wide
    pixels, notes = read_image(path, (1, 6, 6))
    assert torch.equal(pixels[0], torch.from_numpy(GRAY[:, 1:7])) and notes == ["center-cropped"]
    assert torch.equal(read_image(path, (1, 3, 9))[0][0], torch.from_numpy(GRAY[1:4]))
    pixels, notes = read_image(path, (1, 9, 9), fit="pad", background="black")
    assert torch.equal(pixels[0, 2:8], torch.from_numpy(GRAY)) and notes == ["padded with black"]
    assert not pixels[0, :2].any() and not pixels[0, 8:].any()
    assert (read_image(path, (1, 9, 9), fit="pad")[0][0, [0, 1, 8]] == 255).all()
    halves = np.repeat([[[255, 0, 0]], [[0, 0, 255]]], 100, 1).repeat(20, 0).astype(np.uint8)  # red above blue
    pixels, notes = read_image(save(tmp_path / "b.png", halves), (3, 8, 8))
    assert notes == ["downsized", "center-cropped"] and pixels[0, 0, 0] > 250 and pixels[2, -1, 0] > 250
    pixels, notes = read_image(tmp_path / "b.png", (3, 8, 200), fit="pad")
    assert notes == ["downsized", "padded with white"]
    assert read_image(tmp_path / "b.png", (3, 80, 200))[1] == ["enlarged"]
    for shape, fit in itertools.product([(1, 3, 100), (1, 100, 3), (1, 1, 1)], ["crop", "pad"]):  # and for thin images
        for thin in ((1, 300), (300, 1), (2, 3)):
            pixels, _ = read_image(save(tmp_path / "c.png", np.full(thin, 99, np.uint8)), shape, fit, "black")
            assert pixels.shape == shape and 99 in pixels.unique()


def test_shrinking_is_antialiased(tmp_path):
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    pixels, _ = read_image(save(tmp_path / "a.png", checks), (1, 8, 8))
    assert pixels.float().mean() == pytest.approx(127.5, abs=1) and pixels.float().std() < 3  # nearest: 0 or 255


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable_images_have_a_reason(tmp_path, monkeypatch):
    whole = save(tmp_path / "whole.png", np.kron(COLOR, np.ones((20, 20, 1), np.uint8))).read_bytes()
    noise = RNG.integers(0, 256, (90, 90, 3), dtype=np.uint8)
    jpeg = save(tmp_path / "whole.jpg", noise).read_bytes()
    reasons = {}
    for name, content in {
        "cut.png": whole[: len(whole) // 2],
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "text.png": b"text",
        "empty.gif": b"",
        "flipped.png": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
        "page.tif": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # starts Ghostscript if Pillow may
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableImage) as error:
            read_image(tmp_path / name, (3, 8, 8))
        reasons[name] = str(error.value)
    assert "truncated" in reasons["cut.jpg"] and reasons["text.png"] == reasons["page.tif"] == (
        "not a PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM, JPEG2000, AVIF"
    )
    os.mkfifo(tmp_path / "pipe.png")  # reading it would block
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "link.png"):
        with pytest.raises(UnreadableImage, match="not a regular file"):
            read_image(tmp_path / name, (3, 8, 8))
    with pytest.raises(UnreadableImage, match="No such file"):
        read_image(tmp_path / "none.png", (3, 8, 8))
    with pytest.raises(UnreadableImage, match="32 bits"):
        read_image(save(tmp_path / "float.tif", np.ones((4, 4), np.float32)), (1, 4, 4))
    for limit in (8_099, 3_000):  # Pillow warns above the limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UnreadableImage, match=r"8100 pixels|90 x 90 pixels are above the limit of 8,099"):
            read_image(tmp_path / "whole.jpg", (3, 8, 8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8_100)
    read_image(tmp_path / "whole.jpg", (3, 8, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_shape": (2, 8, 8)}, "C 1 or 3"),
        ({"fit": "stretch"}, "fit=stretch.*crop, pad"),
        ({"background": "whitish"}, "background=whitish is invalid: expected a color"),
    ],
)
def test_invalid_settings_are_rejected(tmp_path, settings, message):
    save(tmp_path / "a.png", COLOR)
    for read in (read_image, read_images):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "a.png", **{"image_shape": (3, 8, 8)} | settings)


@pytest.fixture
def folder(tmp_path):
    """A folder with two classes."""
    for name in ("b/10.png", "b/9.PNG", "a/grün 猫.png", "a/deep/er/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / name, COLOR)
    return tmp_path


def test_a_folder_is_read_in_natural_order_with_labels(folder):
    (folder / "b" / "11.png").write_bytes(b"")
    images = read_images(folder, (3, 6, 6))
    assert images.names == ["a/deep/er/1.png", "a/grün 猫.png", "b/9.PNG", "b/10.png"]
    assert images.labels == ["a", "a", "b", "b"]
    assert torch.equal(images.pixels, chw(COLOR[:, 1:7]).expand(4, 3, 6, 6))
    reason = "not a PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM, JPEG2000, AVIF"
    assert images.notes == ["4 of 4 images: center-cropped", f"1 could not be read: b/11.png ({reason})"]
    assert images.skipped == [("b/11.png", reason)]


def test_the_folders_below_splits_are_the_labels(folder):
    for before, after in (("a", "train"), ("b", "test")):
        (folder / before).rename(folder / after)
    images = read_images(folder, (3, 6, 6))
    assert images.names[-1] == "train/grün 猫.png" and images.labels == [".", ".", "deep", "."]
    (folder / "train" / "deep").rename(folder / "deep")  # beside another folder, splits are labels
    assert read_images(folder, (3, 6, 6)).labels == ["deep", "test", "test", "train"]


@pytest.mark.parametrize("labels", [[True, True], [False, False], [True, False], [b"a", b"b"], [5, 3]])
def test_labels_of_an_array_do_not_depend_on_the_others(tmp_path, labels):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 6, 9), np.uint8), labels=np.array(labels))
    found = read_images(tmp_path / "a.npz", (1, 6, 9)).labels
    assert list(map(str, found)) == [x.decode() if isinstance(x, bytes) else str(int(x)) for x in labels]


def test_a_list_of_files_and_folders_has_no_labels(folder):
    images = read_images([folder / "b" / "10.png", str(folder / "a")], (3, 6, 9))
    assert images.names == ["10.png", "a/deep/er/1.png", "a/grün 猫.png"]
    assert images.labels is None and images.notes == [] and read_images(folder / "b", (3, 6, 9)).labels is None


def test_no_readable_image_is_an_error(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    (tmp_path / "none").mkdir()
    for name, message in (
        ("broken.png", r"broken.png: 1 could not be read"),
        ("nowhere", r"nowhere.*No such file"),
        ("none", r"none: there are no images \(.png"),
    ):
        with pytest.raises(UserError, match=message):
            read_images(tmp_path / name, (3, 6, 6))


def test_unreadable_images_are_counted_and_five_named(tmp_path):
    save(tmp_path / "z.png", GRAY)
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(b"")
    note = read_images(tmp_path, (1, 6, 9)).notes[-1]
    assert note.startswith("12 could not be read: 0.png (") and "4.png" in note and "5.png" not in note
    assert note.endswith("and 7 more")


def test_arrays_are_converted_like_files(tmp_path):
    batch = RNG.integers(0, 256, (5, 6, 9, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", batch)
    same = read_images(tmp_path / "a.npy", (3, 6, 9))
    assert torch.equal(same.pixels, torch.from_numpy(batch).permute(0, 3, 1, 2)) and same.notes == []
    assert same.names == ["0", "1", "2", "3", "4"] and same.labels is None
    np.savez(tmp_path / "a.npz", images=batch, labels=np.arange(5))
    other = read_images(tmp_path / "a.npz", (1, 4, 4))
    save(tmp_path / "a.png", batch[3])
    assert torch.equal(other.pixels[3], read_image(tmp_path / "a.png", (1, 4, 4))[0])
    np.savez(tmp_path / "b.npz", images=batch, labels=np.array([b"cat", b"dog", b"cat", b"dog", b"cat"]))
    assert read_images(tmp_path / "b.npz", (3, 6, 9)).labels == ["cat", "dog", "cat", "dog", "cat"]
    assert other.labels == [0, 1, 2, 3, 4] and "5 of 5 images: color converted to gray" in other.notes
