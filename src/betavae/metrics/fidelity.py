"""Compare generated images with real ones: pure functions of features `(N, D)`, one row per image.

All results depend on the features. The Fréchet distance and the four shares also depend on the number of images.
Compare results only for the same features and the same N, and beside the bounds that real images give.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from betavae.metrics.features import Classifier

MAX_PIXEL_FEATURES = 1024  # a Fréchet distance takes the cube of it


class Moments(NamedTuple):
    """Mean and covariance of features, in double precision."""

    mean: Tensor  # (D,)
    covariance: Tensor  # (D, D)


def estimate_moments(features: Tensor) -> Moments:
    """Estimate the mean and the covariance of features `(N, D)`."""
    features = features.double()
    return Moments(features.mean(0), torch.cov(features.T).view(features.shape[1], -1))


def frechet_distance(one: Moments, two: Moments) -> float:
    """Return the squared 2-Wasserstein distance of two normal distributions (Dowson & Landau 1982).

    It is |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), in squared units of the features. With Inception's
    features it is the FID (Heusel et al. 2017). Estimated moments make it too large, by a term in 1 / N.
    """
    # Only symmetric matrices: the root of C_1 on both sides of C_2 has the eigenvalues of C_1 C_2.
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp(min=0).sqrt()
    overlap = torch.linalg.eigvalsh(root.T @ two.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (one.mean - two.mean).square().sum() + one.covariance.trace() + two.covariance.trace() - 2 * overlap
    return max(0.0, distance.item())


def kid(one: Tensor, two: Tensor) -> float:
    """Return the kernel distance KID (Binkowski et al. 2018).

    It is the squared maximum mean discrepancy with the kernel (a . b / D + 1)^3. It is unbiased: it does not depend on
    N, and is about 0, of either sign, for samples of one distribution.
    """
    one, two = one.double(), two.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_within(a: Tensor) -> Tensor:
        pairs = kernel(a, a)
        return (pairs.sum() - pairs.trace()) / (len(a) * (len(a) - 1))

    return (mean_within(one) + mean_within(two) - 2 * kernel(one, two).mean()).item()


class PRDC(NamedTuple):
    """Precision, recall, density and coverage; density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: Tensor, fake: Tensor, k: int = 3, k_density: int = 5) -> PRDC:
    """Count the points of two sets of features that lie in each other's k-nearest-neighbor balls.

    The ball around an image reaches its k-th nearest neighbor in its own set.

    - Precision is the share of fakes in a ball of any real, recall the share of reals in a ball of any fake
      (Kynkäänniemi et al. 2019, k = 3). Both are forgiving, since the large ball of one outlier holds many points.
    - Density is the mean number of reals' balls that a fake lies in, divided by k. Coverage is the share of reals with
      a fake in their ball (Naeem et al. 2020, k = 5).
    """

    def distances(a: Tensor, b: Tensor) -> Tensor:
        # The default, matrix products, loses the distance of two features far from 0.
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")

    def radius(points: Tensor, neighbors: int) -> Tensor:
        return distances(points, points).kthvalue(neighbors + 1, dim=1).values  # the nearest is the point itself

    between = distances(real, fake)  # (N, M)
    is_inside = between <= radius(real, k_density)[:, None]
    return PRDC(
        precision=(between <= radius(real, k)[:, None]).any(0).float().mean().item(),
        recall=(between <= radius(fake, k)).any(1).float().mean().item(),
        density=is_inside.float().sum(0).mean().item() / k_density,
        coverage=is_inside.any(1).float().mean().item(),
    )


def find_nearest(points: Tensor, among: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Find the k rows of `among` `(M, D)` nearest to each of `points` `(N, D)`.

    Returns:
        Their distances and row numbers, both `(N, k)`.
    """
    # Matrix products are several times as fast as differences, and in double precision they find the nearest.
    wide = among.double()
    chunks = [torch.cdist(chunk.double(), wide).topk(k, largest=False).indices for chunk in points.split(1000)]
    rows = torch.cat(chunks)
    return torch.linalg.vector_norm(points[:, None] - among[rows], dim=2), rows


def label_tv_distance(labels: Tensor, reference: Tensor) -> float:
    """Return the total variation distance in [0, 1] of the frequencies of `(N,)` and `(M,)` labels.

    It is the share of images that would have to change their label.
    """
    _, classes = torch.cat((labels, reference)).unique(return_inverse=True)
    sizes = [len(labels), len(reference)]
    one, two = (part.bincount(minlength=int(classes.max()) + 1) / len(part) for part in classes.split(sizes))
    return 0.5 * (one - two).abs().sum().item()


def compute_scores(real: Tensor, fake: Tensor, n: int) -> list[dict[str, float]]:
    """Compute the scores of each `n` rows of `fake` features, one repeat each.

    `fid` and `nearest`, the median distance to the nearest real image, compare with all of `real`. `kid` and the four
    shares compare with `n` rows of `real`, different ones in each repeat as long as there are enough.
    """
    moments, rows = estimate_moments(real), []
    for repeat, part in enumerate(fake.split(n)):
        some = real.roll(-n * repeat, 0)[:n]
        rows.append(
            {
                "fid": frechet_distance(moments, estimate_moments(part)),
                "kid": kid(some, part),
                **prdc(some, part)._asdict(),
                "nearest": find_nearest(part, real)[0].median().item(),
            }
        )
    return rows


def extract_pixel_features(images: Tensor) -> Tensor:
    """Flatten images `(N, C, H, W)`, halved until a row has at most `MAX_PIXEL_FEATURES` numbers."""
    while images[0].numel() > MAX_PIXEL_FEATURES and max(images.shape[2:]) > 1:
        height, width = images.shape[2:]
        images = F.avg_pool2d(images, (min(2, height), min(2, width)), ceil_mode=True)
    return images.flatten(1)


def average_repeats(repeats: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the `mean` of each score over repeats, with its standard error `se`."""
    columns = {name: torch.tensor([row[name] for row in repeats], dtype=torch.float64) for name in repeats[0]}
    return {
        name: {"mean": values.mean().item(), "se": values.std().item() / math.sqrt(len(values))}
        for name, values in columns.items()
    }


class Reference:
    """Real images that generated ones are compared with.

    Images come in batches `(B, C, H, W)` in [0, 1], so that they are never all in memory. The `classifier` computes
    their features; None takes pixels.
    """

    def __init__(self, batches: Iterable[Tensor], labels: Tensor, classifier: Classifier | None):
        self.labels, self.classifier = labels, classifier
        self.features, pixels = self.extract(batches)
        self.pixel_moments = estimate_moments(pixels)

    def extract(self, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        extract_features = self.classifier.features if self.classifier else extract_pixel_features
        pairs = [(extract_features(batch), extract_pixel_features(batch)) for batch in batches]
        features, pixels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return features, pixels

    def score(
        self, batches: Iterable[Tensor], n: int, labels: Tensor | None = None
    ) -> tuple[dict[str, dict[str, float]], Tensor]:
        """Return the `mean` and `se` of each score over repeats of `n` generated images, and their features.

        With the `labels` that the images should have, `label_match` is the share that the classifier assigns to them.
        """
        features, pixels = self.extract(batches)
        rows, wanted = compute_scores(self.features, features, n), [None] * -(-len(features) // n)
        if labels is not None:
            wanted = labels.split(n)
        for row, part, pixel_part, some in zip(rows, features.split(n), pixels.split(n), wanted, strict=True):
            row["pixel_fid"] = frechet_distance(self.pixel_moments, estimate_moments(pixel_part))
            if self.classifier:
                found = self.classifier.classify(part)
                row["imbalance"] = label_tv_distance(found, self.labels)
                if some is not None:
                    row["label_match"] = (found == some).float().mean().item()
        return average_repeats(rows), features


def find_likely_copies(fake: Tensor, real: Tensor, count: int, neighbors: int = 7) -> tuple[Tensor, Tensor]:
    """Find the fakes nearest to a real image, relative to that image's distance to its neighbor.

    Copies of real images would be among them.

    Returns:
        The rows `(count,)` of `fake`, and the rows `(count, neighbors)` of their nearest in `real`.
    """
    distances, rows = find_nearest(fake, real, neighbors)
    usual = find_nearest(real[rows[:, 0]], real, 2)[0][:, 1]
    usual = usual.clamp(min=max(0.1 * usual.median().item(), 1e-12))  # it is 0 if the real image has a duplicate
    likeliest = (distances[:, 0] / usual).argsort()[:count]
    return likeliest, rows[likeliest]
