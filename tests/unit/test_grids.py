import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from betavae import grids
from betavae.errors import UserError
from betavae.grids import Grid
from betavae.models.vae import VAE
from tests.conftest import MODEL


def constant_images(*values, height=28, width=28):
    return torch.stack([torch.full((1, height, width), value) for value in values])


def read_pixels(path):
    return np.asarray(Image.open(path))


def test_small_images_are_enlarged_with_thin_white_gaps(tmp_path):
    grids.save_grids([Grid(constant_images(0.2, 0.4, 0.6), 2)], tmp_path / "a.png")
    pixels, left, step = read_pixels(tmp_path / "a.png"), grids.MARGIN + 2, 3 * 28 + 2
    assert pixels.ndim == 2
    for number, value in enumerate((51, 102, 153)):
        y, x = left + number // 2 * step, left + number % 2 * step
        assert (pixels[y : y + 84, x : x + 84] == value).all()
        assert (pixels[y - 2 : y, x : x + 84] == 255).all() and (pixels[y : y + 84, x - 2 : x] == 255).all()
    assert (pixels[left + step :, left + step :] == 255).all()  # the fourth tile, and the margin


@pytest.mark.parametrize(("size", "columns", "scale"), [(28, 8, 3), (28, 20, 2), (64, 8, 1), (8, 4, 8), (300, 9, 1)])
def test_images_keep_whole_pixels_in_a_legible_size(size, columns, scale):
    assert grids.choose_scale(Grid(torch.zeros(columns, 1, size, size), columns), 1) == scale


def test_labels_are_beside_their_rows_and_columns():
    grid = Grid(constant_images(0, 0, 0, 0), 2, ["first", "second"], ["a", "b"], "one\ntwo")
    drawing = grids.arrange([grid], 1, "caption")
    places = {line.text: line for line in drawing.texts}
    assert list(places) == ["one", "two", "a", "b", "first", "second", "caption"]
    _, x, y = drawing.pictures[0]
    middles = [44, 130]  # 2 + 84 / 2, and 86 more
    assert [places[label].y - y for label in ("first", "second")] == middles
    assert [places[label].x - x for label in ("a", "b")] == middles
    assert places["first"].x < x and places["a"].y < y and places["one"].y < places["two"].y < places["a"].y
    assert places["caption"].y > y + 2 * 86


def test_long_labels_are_cut_and_keep_to_one_line(tmp_path):
    labels = ["a long\nname of a class", "b"]
    grid = Grid(constant_images(0, 0), 2, ["row\none"], labels)
    drawing = grids.arrange([grid], 1)
    first, second, row = drawing.texts
    assert first.text.startswith("a long n") and first.text.endswith("…") and second.text == "b"
    assert grids.measure(first.text) <= 86 and row.text == "row one"
    grids.save_grids([grid], tmp_path / "a.png")


def test_labels_without_room_are_left_out():
    labels = [f"value {number}" for number in range(20)]
    grid = Grid(torch.zeros(400, 1, 80, 80), 20, labels, labels)
    drawn = [line.text for line in grids.label_tiles(grid, 1, 0, 0)]
    assert drawn == labels + labels
    narrow = [line.text for line in grids.label_tiles(grid._replace(images=torch.zeros(400, 1, 12, 30)), 1, 0, 0)]
    assert narrow == labels[::2] + labels[::2]


def test_grids_side_by_side_have_equal_cells_and_titles():
    drawn = [Grid(torch.zeros(4, 1, size, size), 2, title=f"size {size}\n{'x' * 30}") for size in (28, 12, 28)]
    drawing = grids.arrange(drawn, 2)
    (first, *_), (_, x1, y1), (_, x2, y2) = drawing.pictures
    assert drawing.pictures[0][1] == x2 < x1 and drawing.pictures[0][2] == y1 < y2
    width = max(first.shape[2], grids.measure("x" * 30))
    assert x1 - x2 == width + 2 * grids.MARGIN and drawing.width == 2 * (width + 2 * grids.MARGIN)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_svg_has_exact_pixels_and_text_as_text(tmp_path, channels):
    grid = Grid(torch.rand(4, channels, 5, 5), 2, ["z0", "z$1$"], title="β=4 <&>")
    grids.save_grids([grid], tmp_path / "a.svg", "a caption")
    text = (tmp_path / "a.svg").read_text()
    assert [*re.findall(r"<text [^>]*>([^<]*)</text>", text)] == ["β=4 &lt;&amp;&gt;", "z0", "z$1$", "a caption"]
    (encoded,) = re.findall(r'base64,\s*([^"]+)"', text)
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
    wanted = grids.draw_tiles(grid, grids.choose_scale(grid, 1)).expand(3, -1, -1).permute(1, 2, 0)
    assert np.array_equal(found, (255 * wanted).round().byte().numpy()) and "pixelated" in text


def test_a_pdf_replaces_only_its_own_file(tmp_path):
    for _ in range(2):
        grids.save_grids([Grid(torch.rand(2, 1, 5, 5), 2)], tmp_path / "a.pdf")
    content = (tmp_path / "a.pdf").read_bytes()
    assert content.startswith(b"%PDF") and b"betavae" in content
    (tmp_path / "a.pdf").write_bytes(b"%PDF of another program")
    with pytest.raises(UserError, match="not made by betavae"):
        grids.save_grids([Grid(torch.rand(2, 1, 5, 5), 2)], tmp_path / "a.pdf")
    with pytest.raises(UserError, match=r"expected a name that ends in \.png, .*\.svg"):
        grids.save_grids([Grid(torch.rand(2, 1, 5, 5), 2)], tmp_path / "a.gif")


def test_a_caption_is_broken_between_words():
    text = "the quick brown fox jumps over the lazy dog " * 4
    lines = grids.wrap(text, 300)
    assert " ".join(lines) == text.strip() and len(lines) > 3 and all(grids.measure(line) <= 300 for line in lines)
    assert grids.wrap("x" * 300, 100) == ["x" * 79 + "…"] and grids.wrap("", 100) == []


def test_a_traversal_is_labeled_with_the_kl_of_each_row():
    vae, kl = VAE(**MODEL | {"latent_dim": 3}), torch.tensor([0.5, 2.25, 0.0])
    grid = grids.make_traversal_grid(vae, torch.zeros(3), torch.tensor([-3.0, 0, 3]), kl, rows=2)
    assert grid.row_labels == ["z1  2.25 nats", "z0  0.50 nats"] and grid.column_labels == ["-3.0", "0.0", "3.0"]
    torch.testing.assert_close(grid.images[0], vae.decode(torch.tensor([[0.0, -3, 0]]))[0])


def test_reconstructions_and_the_manifold_are_labeled():
    vae = VAE(**MODEL | {"latent_dim": 2})
    assert grids.make_reconstruction_grid(vae, torch.rand(9, 1, 28, 28)).row_labels == ["input", "reconstruction"] * 2
    grid = grids.make_manifold_grid(vae, 3)
    assert grid.column_labels == ["-1.0", "0.0", "1.0"] and grid.row_labels == ["1.0", "0.0", "-1.0"]
    corner = vae.decode(torch.special.ndtri(torch.tensor([[1 / 6, 5 / 6]])))[0]  # left and up
    torch.testing.assert_close(grid.images[0], corner)
