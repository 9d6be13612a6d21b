import itertools

import pytest
import torch
from matplotlib.image import imread

from betavae import plotting
from betavae.errors import UserError
from betavae.models.vae import VAE
from tests.conftest import MODEL


def test_a_grid_holds_each_image_pixel_for_pixel_clamped_and_never_stretched():
    images = torch.stack([torch.full((1, 3, 4), value) for value in (0.2, 0.4, -1.0, 7.0, 0.5)])
    picture = plotting.make_grid(images, columns=2)
    assert picture.shape == (1, 3 * 5 + 2, 2 * 6 + 2)
    corners = [picture[0, 2 + 5 * r, 2 + 6 * c].item() for r in range(3) for c in range(2)]
    assert corners == pytest.approx([0.2, 0.4, 0.0, 1.0, 0.5, 0.0])
    assert picture[0, :2].eq(0).all() and picture[0, 5:7].eq(0).all()


def test_a_saved_picture_has_those_grey_values(tmp_path):
    plotting.save_image(torch.tensor([[[0.0, 0.2], [0.6, 1.0]]]), tmp_path / "new" / "a.png", scale=3)
    pixels = imread(tmp_path / "new" / "a.png")
    assert pixels.shape[:2] == (6, 6)
    assert pixels[::3, ::3].flatten().tolist() == pytest.approx([0, 0.2, 0.6, 1], abs=1 / 255)


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: cannot write"):
        plotting.save_image(torch.zeros(1, 2, 2), tmp_path / "file" / "a.png")


def figure():
    drawn = plotting.create_figure(1, 1)
    drawn.add_subplot().plot([1, 2])
    return drawn


PIXELS = [".png", ".jpg", ".JPEG", ".webp", ".tif", ".tiff", ".pdf"]


@pytest.mark.parametrize(
    ("channels", "ending"), [*itertools.product([1, 3], PIXELS), *((None, ending) for ending in [*PIXELS, ".svg"])]
)
def test_a_picture_of_every_format_is_replaced_by_the_next_and_a_foreign_one_never(tmp_path, channels, ending):
    out = tmp_path / f"a{ending}"

    def save():
        if channels:
            plotting.save_image(torch.rand(channels, 40, 30), out)
        else:
            plotting.save_figure(figure(), out)

    figure().savefig(out)
    foreign = out.read_bytes()
    with pytest.raises(UserError, match="was not made by betavae"):
        save()
    assert out.read_bytes() == foreign
    out.unlink()
    save()
    first = out.read_bytes()
    save()
    assert first != foreign and [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("ending", ["", ".gif", ".bmp", ".eps", ".nonsense"])
def test_a_format_that_cannot_be_marked_is_rejected(tmp_path, ending):
    for save, what in ((plotting.save_image, torch.zeros(1, 2, 2)), (plotting.save_figure, figure())):
        with pytest.raises(UserError, match=r"a\S* is invalid: expected a name that ends in \.png, .*\.pdf"):
            save(what, tmp_path / f"a{ending}")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def vae():
    return VAE(**MODEL | {"latent_dim": 2})


def test_interpolation_ends_at_the_two_reconstructions(vae):
    start, end = torch.rand(2, 1, 1, 28, 28)
    row = plotting.interpolate(vae, start, end, steps=5)
    torch.testing.assert_close(row[0], vae.reconstruct(start)[0])
    torch.testing.assert_close(row[4], vae.reconstruct(end)[0])
    middle = (vae.encode(start).mean + vae.encode(end).mean) / 2
    torch.testing.assert_close(row[2], torch.sigmoid(vae.decode_params(middle))[0])


def test_a_traversal_moves_one_dimension_alone(vae):
    z, values = torch.tensor([0.3, -0.7]), torch.tensor([-1.0, 0.5])
    rows = plotting.traverse(vae, z, [1, 0], values)
    wanted = torch.tensor([[0.3, -1.0], [0.3, 0.5], [-1.0, -0.7], [0.5, -0.7]])
    torch.testing.assert_close(rows, torch.sigmoid(vae.decode_params(wanted)))


def test_the_manifold_is_at_quantiles_of_the_prior(vae):
    rows = plotting.decode_manifold(vae, 3)
    quantile = torch.distributions.Normal(0, 1).icdf(torch.tensor([1 / 6, 0.5, 5 / 6]))
    # First axis to the right, second axis up, as in a plot.
    torch.testing.assert_close(
        rows[1], torch.sigmoid(vae.decode_params(torch.stack((quantile[1], quantile[2])).view(1, 2)))[0]
    )
    torch.testing.assert_close(rows[6], torch.sigmoid(vae.decode_params(quantile[[0, 0]].view(1, 2)))[0])
    with pytest.raises(UserError, match="latent_dim=2"):
        plotting.decode_manifold(VAE(**MODEL), 3)


def test_reconstructions_stand_below_their_originals(vae):
    x = torch.rand(16, 1, 28, 28)
    rows = plotting.stack_reconstructions(vae, x)
    assert torch.equal(rows[:8], x[:8]) and torch.equal(rows[16:24], x[8:])
    torch.testing.assert_close(rows[24:], vae.reconstruct(x[8:]))


@pytest.mark.parametrize("n", [1, 5, 8, 9, 20])
def test_any_number_of_reconstructions(n):
    vae, x = VAE(**MODEL), torch.rand(n, 1, 28, 28)
    rows = plotting.stack_reconstructions(vae, x)
    columns = min(8, n)
    assert len(rows) == 2 * columns * -(-n // columns)
    assert torch.equal(rows[:columns], x[:columns])
    torch.testing.assert_close(rows[columns], vae.reconstruct(x[:1])[0])
