import pytest
import torch

from betavae.errors import UserError
from betavae.metrics.embedding import MAX_TSNE_ROWS, check_tsne, compute_tsne

pytest.importorskip("sklearn")


@pytest.mark.parametrize("latent_dim", [1, 10])
def test_tsne_keeps_groups_together_and_repeats(latent_dim):
    group = torch.arange(90) % 3
    means = 0.1 * torch.randn(90, latent_dim) + 5.0 * group[:, None]
    points = compute_tsne(means, seed=1)
    assert points.shape == (90, 2) and torch.equal(points, compute_tsne(means, seed=1))
    away = torch.cdist(points, points).fill_diagonal_(torch.inf)
    assert torch.equal(group[away.argmin(1)], group)


def test_tsne_of_few_rows_works():
    assert compute_tsne(torch.rand(4, 3)).isfinite().all()


@pytest.mark.parametrize("rows", [3, MAX_TSNE_ROWS + 1])
def test_too_few_or_too_many_rows_are_rejected(rows):
    with pytest.raises(UserError, match=f"t-SNE of {rows:,} images is not supported: expected 4 to 10,000 images"):
        check_tsne(rows)
