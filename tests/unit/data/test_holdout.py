import pytest
import torch

from betavae.data.holdout import exclude_indices, hold_out_at_random, hold_out_by_name, resolve_count
from betavae.errors import UserError


def test_a_size_is_a_share_or_a_count():
    assert [resolve_count(size, 8, "k") for size in (0.01, 0.5, 1, 7)] == [1, 4, 1, 7]
    for size in (0, 8, -1, 9.0):
        with pytest.raises(UserError, match=rf"data.test_size={size} is invalid: .* at least 1 of 8 images"):
            resolve_count(size, 8, "data.test_size")


def test_random_holdout_does_not_depend_on_the_seed():
    torch.manual_seed(1)
    first = hold_out_at_random(40, 0.25, "k")
    torch.manual_seed(2)
    assert torch.equal(first, hold_out_at_random(40, 10, "k")) and len(first.unique()) == 10
    assert sorted(first.tolist() + exclude_indices(first, 40).tolist()) == list(range(40))
    assert exclude_indices(torch.tensor([3, 1]), 5).tolist() == [0, 2, 4]


@pytest.mark.parametrize("share", [0.02, 0.2, 0.7])
def test_holdout_by_name_is_about_the_share(share):
    names = [f"{i}.png" for i in range(5000)]
    held = hold_out_by_name(names, share, "k", "test/")
    assert abs(len(held) - 5000 * share) < 4 * (5000 * share * (1 - share)) ** 0.5
    assert set(held.tolist()) != set(hold_out_by_name(names, share, "k").tolist())


def test_holdout_by_name_takes_and_leaves_at_least_one():
    names = [f"{i}.png" for i in range(5)]
    assert len(hold_out_by_name(names, 1e-9, "k")) == 1 and len(hold_out_by_name(names, 0.89, "k")) == 4
    assert len(hold_out_by_name(names, 3, "k")) == 3
