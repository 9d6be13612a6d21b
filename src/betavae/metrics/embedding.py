"""A picture of a latent space: t-SNE of the posterior means."""

import torch
from torch import Tensor

from betavae.errors import UserError

MAX_TSNE_ROWS = 10_000  # more would take many minutes
PERPLEXITY = 30.0


def check_tsne(rows: int) -> None:
    """Raise UserError if scikit-learn is missing, or the rows are too few or too many."""
    try:
        import sklearn.manifold  # noqa: F401
    except ImportError as error:
        raise UserError('t-SNE needs scikit-learn: pip install -e ".[evaluation]"') from error
    if not 4 <= rows <= MAX_TSNE_ROWS:
        raise UserError(f"t-SNE of {rows:,} images is not supported: expected 4 to {MAX_TSNE_ROWS:,} images")


def compute_tsne(means: Tensor, seed: int = 0) -> Tensor:
    """Embed rows `(N, latent_dim)` in a plane `(N, 2)` by t-SNE (van der Maaten & Hinton 2008).

    Near rows stay near. Only neighborhoods have a meaning: neither distances between groups nor their sizes do.

    Raises:
        UserError: If scikit-learn is missing, or the rows are too few or too many.
    """
    check_tsne(len(means))
    from sklearn.manifold import TSNE

    tsne = TSNE(
        perplexity=min(PERPLEXITY, (len(means) - 1) / 3),
        init="pca" if means.shape[1] > 1 else "random",
        random_state=seed % 2**32,
    )
    return torch.from_numpy(tsne.fit_transform(means.float().cpu().numpy()))
