import itertools

import pytest
import torch
from matplotlib.image import imread

from betavae import plotting
from betavae.errors import UserError
from betavae.models.vae import VAE
from tests.conftest import MODEL


def test_a_grid_has_the_clamped_pixels_of_each_image():
    images = torch.stack([torch.full((1, 3, 4), value) for value in (0.2, 0.4, -1.0, 7.0, 0.5)])
    grid = plotting.make_grid(images, columns=2)
    assert grid.shape == (1, 3 * 5 + 2, 2 * 6 + 2)
    corners = [grid[0, 2 + 5 * r, 2 + 6 * c].item() for r in range(3) for c in range(2)]
    assert corners == pytest.approx([0.2, 0.4, 0.0, 1.0, 0.5, 0.0])
    assert grid[0, :2].eq(0).all() and grid[0, 5:7].eq(0).all()


def test_a_saved_image_has_the_gray_values(tmp_path):
    plotting.save_image(torch.tensor([[[0.0, 0.2], [0.6, 1.0]]]), tmp_path / "new" / "a.png", scale=3)
    pixels = imread(tmp_path / "new" / "a.png")
    assert pixels.shape[:2] == (6, 6)
    assert pixels[::3, ::3].flatten().tolist() == pytest.approx([0, 0.2, 0.6, 1], abs=1 / 255)


def test_an_unwritable_path_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: cannot write"):
        plotting.save_image(torch.zeros(1, 2, 2), tmp_path / "file" / "a.png")


def make_figure():
    figure = plotting.create_figure(1, 1)
    figure.add_subplot().plot([1, 2])
    return figure


SUFFIXES = [".png", ".jpg", ".JPEG", ".webp", ".tif", ".tiff", ".pdf"]


@pytest.mark.parametrize(
    ("channels", "suffix"), [*itertools.product([1, 3], SUFFIXES), *((None, suffix) for suffix in [*SUFFIXES, ".svg"])]
)
def test_own_files_are_replaced_and_foreign_ones_are_kept(tmp_path, channels, suffix):
    out = tmp_path / f"a{suffix}"

    def save():
        if channels:
            plotting.save_image(torch.rand(channels, 40, 30), out)
        else:
            plotting.save_figure(make_figure(), out)

    make_figure().savefig(out)
    foreign = out.read_bytes()
    with pytest.raises(UserError, match="was not made by betavae"):
        save()
    assert out.read_bytes() == foreign
    out.unlink()
    save()
    first = out.read_bytes()
    save()
    assert first != foreign and [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("suffix", ["", ".gif", ".bmp", ".eps", ".nonsense"])
def test_formats_without_a_place_for_the_stamp_are_rejected(tmp_path, suffix):
    for save, content in ((plotting.save_image, torch.zeros(1, 2, 2)), (plotting.save_figure, make_figure())):
        with pytest.raises(UserError, match=r"a\S* is invalid: expected a name that ends in \.png, .*\.pdf"):
            save(content, tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def vae():
    return VAE(**MODEL | {"latent_dim": 2})


def test_interpolation_starts_and_ends_at_reconstructions(vae):
    start, end = torch.rand(2, 1, 1, 28, 28)
    row = plotting.interpolate(vae, start, end, steps=5)
    torch.testing.assert_close(row[0], vae.reconstruct(start)[0])
    torch.testing.assert_close(row[4], vae.reconstruct(end)[0])
    middle = (vae.encode(start).mean + vae.encode(end).mean) / 2
    torch.testing.assert_close(row[2], torch.sigmoid(vae.decode_params(middle))[0])


def test_a_traversal_changes_one_dimension_per_row(vae):
    z, values = torch.tensor([0.3, -0.7]), torch.tensor([-1.0, 0.5])
    rows = plotting.traverse(vae, z, [1, 0], values)
    wanted = torch.tensor([[0.3, -1.0], [0.3, 0.5], [-1.0, -0.7], [0.5, -0.7]])
    torch.testing.assert_close(rows, torch.sigmoid(vae.decode_params(wanted)))


def test_the_manifold_has_quantiles_of_the_prior(vae):
    rows = plotting.decode_manifold(vae, 3)
    quantile = torch.distributions.Normal(0, 1).icdf(torch.tensor([1 / 6, 0.5, 5 / 6]))
    # As in a plot, the first axis points right and the second axis up.
    torch.testing.assert_close(
        rows[1], torch.sigmoid(vae.decode_params(torch.stack((quantile[1], quantile[2])).view(1, 2)))[0]
    )
    torch.testing.assert_close(rows[6], torch.sigmoid(vae.decode_params(quantile[[0, 0]].view(1, 2)))[0])
    with pytest.raises(UserError, match="latent_dim=2"):
        plotting.decode_manifold(VAE(**MODEL), 3)


def test_reconstructions_are_below_their_originals(vae):
    x = torch.rand(16, 1, 28, 28)
    rows = plotting.stack_reconstructions(vae, x)
    assert torch.equal(rows[:8], x[:8]) and torch.equal(rows[16:24], x[8:])
    torch.testing.assert_close(rows[24:], vae.reconstruct(x[8:]))


@pytest.mark.parametrize("n", [1, 5, 8, 9, 20])
def test_reconstructions_of_any_number_of_images_fill_rows(n):
    vae, x = VAE(**MODEL), torch.rand(n, 1, 28, 28)
    rows = plotting.stack_reconstructions(vae, x)
    columns = min(8, n)
    assert len(rows) == 2 * columns * -(-n // columns)
    assert torch.equal(rows[:columns], x[:columns])
    torch.testing.assert_close(rows[columns], vae.reconstruct(x[:1])[0])
