import math

import numpy as np
import pytest
import torch

from betavae.data.datasets.sprites import (
    FACTORS,
    NUM_IMAGES,
    SHAPES,
    Sprites,
    factor_labels,
    load_sprites,
    split_indices,
)
from betavae.errors import UserError

SIZES = tuple(FACTORS.values())


@pytest.fixture(scope="module", params=[64, 32])
def pixels(request):
    return Sprites(request.param)


def index_of(*values):
    return torch.from_numpy(np.ravel_multi_index(values, SIZES)).reshape(-1)


def draw(image_size, shape, scale, orientation, pos_x, pos_y):
    """Draw one sprite at its position, with 4 x 4 points to a pixel."""
    grid = (np.arange(4 * image_size) + 0.5) * 16 / image_size
    x, y = grid[None, :] - (16.5 + pos_x), grid[:, None] - (16.5 + pos_y)
    x, y = x / (0.5 + 0.1 * scale), y / (0.5 + 0.1 * scale)
    turn = complex(math.cos(2 * math.pi / 39 * orientation), math.sin(2 * math.pi / 39 * orientation))
    turned = (x + 1j * y) / turn
    x, y = turned.real, turned.imag
    if SHAPES[shape] == "square":
        lit = np.maximum(abs(x), abs(y)) < 11.3
    elif SHAPES[shape] == "ellipse":
        lit = np.hypot(x / 16.3, y / 8.2) < 1
    else:
        x, y = x / 12.7, 0.2935 - y / 12.7
        lit = np.cbrt(x**2 * y**3) > x**2 + y**2 - 1
    points = lit.reshape(image_size, 4, image_size, 4).sum((1, 3))
    return torch.from_numpy((points >= 8).astype(np.uint8) * 255)[None]


def test_a_batch_is_each_sprite_at_its_position(pixels):
    size = pixels.shape[-1]
    random = torch.randint(NUM_IMAGES, (60,), generator=torch.Generator().manual_seed(0))
    largest = index_of(*np.ix_(range(3), [5], range(0, 40, 6), [0, 15, 31], [0, 31]))  # in all corners
    index = torch.cat([random, largest, torch.tensor([0, NUM_IMAGES - 1])])
    expected = torch.stack([draw(size, *row) for row in factor_labels(index).tolist()])
    images = pixels.index_select(0, index)
    assert images.dtype == torch.uint8 and images.shape == (len(index), 1, size, size)
    assert torch.equal(images, expected)


def test_factors_number_the_images_in_order():
    rows = torch.tensor([0, 1, 32, 1024, 40 * 1024, 6 * 40 * 1024, NUM_IMAGES - 1])
    expected = [[0] * 5, [0, 0, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert factor_labels(rows).tolist() == [*expected, [2, 5, 39, 31, 31]]
    table = factor_labels()
    assert table.shape == (NUM_IMAGES, 5) and table.dtype == torch.int64
    assert torch.equal(index_of(*table.T.numpy()), torch.arange(NUM_IMAGES))


def test_positions_move_sprites_right_and_down(pixels):
    size = pixels.shape[-1]
    step = size / 64
    kind = np.stack(np.meshgrid(range(3), range(6), range(0, 40, 3), indexing="ij")).reshape(3, -1)

    def center_of_mass(pos_x, pos_y):
        images = pixels.index_select(0, index_of(*kind, pos_x, pos_y)).double()[:, 0] / 255
        place = (torch.arange(size) + 0.5) / step  # in pixels of 64
        mass = images.sum((1, 2))
        return torch.stack([(images.sum(1) * place).sum(1), (images.sum(2) * place).sum(1)], 1) / mass[:, None]

    for pos_x, pos_y in [(0, 0), (31, 0), (0, 31), (31, 31), (7, 20)]:
        expected = torch.tensor([16.5 + pos_x, 16.5 + pos_y]).double().expand(kind.shape[1], 2)
        torch.testing.assert_close(center_of_mass(pos_x, pos_y), expected, rtol=0, atol=0.35 if size == 64 else 0.55)
    # A shift by whole pixels changes nothing else.
    pixel = pixels.phases
    moved = center_of_mass(4 + pixel, 9 + 3 * pixel) - center_of_mass(4, 9)
    expected = torch.tensor([pixel, 3.0 * pixel]).double().expand(kind.shape[1], 2)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-9)


def test_no_sprite_is_cut_and_each_has_its_area(pixels):
    kind = np.stack(np.meshgrid(range(3), range(6), range(40), indexing="ij")).reshape(3, -1)

    def lit(pos_x, pos_y):
        return (pixels.index_select(0, index_of(*kind, pos_x, pos_y)) == 255).sum((1, 2, 3)).view(3, 6, 40)

    middle = lit(16, 16)
    for pos_x, pos_y in [(0, 0), (0, 30), (30, 0), (30, 30)]:  # in the same phase; position 31 is tested above
        assert torch.equal(lit(pos_x, pos_y), middle)
    size = torch.tensor([22.6**2, math.pi * 16.3 * 8.2, 3.662 * 12.7**2])  # at scale 1, in pixels of 64
    area = size[:, None] * torch.linspace(0.5, 1, 6) ** 2 * (pixels.shape[-1] / 64) ** 2
    torch.testing.assert_close(middle.float().mean(2), area, rtol=0.03, atol=0)


def test_sprites_differ_except_for_full_turns():
    """Orientations 0 and 39 are equal; the other equal pairs are small rotated squares."""
    images = Sprites().index_select(0, torch.arange(720) * 1024).flatten(1).unflatten(0, (3, 6, 40))
    assert torch.equal(images[:, :, 0], images[:, :, 39])
    different = [len(torch.unique(images[shape].flatten(0, 1), dim=0)) for shape in range(3)]
    assert different == [208, 6 * 39, 6 * 39]
    assert len(torch.unique(images.flatten(0, 2), dim=0)) == 676
    # A quarter turn is 9.75 orientations, so a rotated square is never the same, as in dSprites.
    largest_square = images[0, 5]
    assert len(torch.unique(largest_square, dim=0)) == 38


def test_splits_are_fixed_and_disjoint():
    train, test, validation = (load_sprites("unused", split) for split in ("train", "test", "validation"))
    assert (
        train.pixels.shape == (NUM_IMAGES, 1, 64, 64)
        and len(train.pixels) == NUM_IMAGES
        and train.labels.shape == (NUM_IMAGES, 5)
    )
    indices = {split: split_indices(split, NUM_IMAGES) for split in ("test", "validation")}
    assert len(torch.unique(torch.cat(list(indices.values())))) == 20_000
    assert indices["test"][:3].tolist() == [42, 51, 73]  # pinned, since published numbers depend on them
    for split, images in (("test", test), ("validation", validation)):
        assert len(images.pixels) == 10_000 and torch.equal(images.labels, train.labels[indices[split]])
        some = torch.arange(0, 10_000, 997)
        expected = train.pixels.index_select(0, indices[split][some])
        assert torch.equal(images.pixels.index_select(0, some), expected)
        assert torch.equal(images.pixels.to("cpu").index_select(0, some), expected)


def test_images_have_64_or_32_pixels():
    assert load_sprites("unused", "test", image_size=32).pixels.shape == (10_000, 1, 32, 32)
    with pytest.raises(UserError, match=r"data.image_size=48 is invalid: expected 64 or 32"):
        load_sprites("unused", "train", image_size=48)
