"""How near generated images come to real ones: pure functions of features `(N, D)`, one row an image.

All depend on the features, and the Fréchet distance and the four shares on how many images there are: compare numbers
of the same features and the same N, and with the bounds that real images give.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Moments(NamedTuple):
    mean: Tensor  # (D,)
    covariance: Tensor  # (D, D)


def moments(features: Tensor) -> Moments:
    """In double precision."""
    features = features.double()
    return Moments(features.mean(0), torch.cov(features.T).view(features.shape[1], -1))


def frechet_distance(one: Moments, two: Moments) -> float:
    """The squared 2-Wasserstein distance |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) of two normal distributions
    (Dowson & Landau 1982), in squared units of the features; of Inception's features, the FID (Heusel et al. 2017).

    Estimated moments make it too large, by a term in 1 / N.
    """
    # tr (C_1 C_2)^(1/2) by symmetric matrices only: the root of C_1 on both sides of C_2 has the same eigenvalues.
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp(min=0).sqrt()
    overlap = torch.linalg.eigvalsh(root.T @ two.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (one.mean - two.mean).square().sum() + one.covariance.trace() + two.covariance.trace() - 2 * overlap
    return max(0.0, distance.item())


def kid(one: Tensor, two: Tensor) -> float:
    """The squared maximum mean discrepancy under the kernel (a . b / D + 1)^3 (KID, Binkowski et al. 2018).

    Unbiased, so that it does not depend on N and is about 0, of either sign, for samples of one distribution.
    """
    one, two = one.double(), two.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        pairs = kernel(a, a)
        return (pairs.sum() - pairs.trace()) / (len(a) * (len(a) - 1))

    return (within(one) + within(two) - 2 * kernel(one, two).mean()).item()


class PRDC(NamedTuple):
    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: Tensor, fake: Tensor, k: int = 3, k_density: int = 5) -> PRDC:
    """How the k-nearest-neighbour balls of two sets of images hold each other's points.

    A ball around an image reaches its k-th nearest neighbour in its own set. Precision is the share of fakes in a ball
    of any real, recall that of reals in a ball of any fake (Kynkäänniemi et al. 2019, k = 3); one far outlier's large
    ball holds much, so both forgive it. Density is the number of reals' balls that a fake lies in over k, averaged (it
    may exceed 1), coverage the share of reals with a fake in their ball (Naeem et al. 2020, k = 5).
    """

    def distances(a: Tensor, b: Tensor) -> Tensor:
        # By default from matrix products, which leave nothing of the distance of two features far from 0.
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")

    def radius(points: Tensor, neighbours: int) -> Tensor:
        return distances(points, points).kthvalue(neighbours + 1, dim=1).values  # the nearest is the point itself

    between = distances(real, fake)  # (N, M)
    inside = between <= radius(real, k_density)[:, None]
    return PRDC(
        precision=(between <= radius(real, k)[:, None]).any(0).float().mean().item(),
        recall=(between <= radius(fake, k)).any(1).float().mean().item(),
        density=inside.float().sum(0).mean().item() / k_density,
        coverage=inside.any(1).float().mean().item(),
    )


def nearest(points: Tensor, among: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Of each of `points` (N, D) the distances to the nearest k of `among` (M, D), and their places there: (N, k)."""
    # Matrix products are several times as fast as differences, and in double precision know which are the nearest.
    wide = among.double()
    found = [torch.cdist(part.double(), wide).topk(k, largest=False).indices for part in points.split(1000)]
    places = torch.cat(found)
    return torch.linalg.vector_norm(points[:, None] - among[places], dim=2), places


def label_tv_distance(found: Tensor, wanted: Tensor) -> float:
    """The total variation distance between the frequencies of labels `(N,)` and `(M,)`: the share of images that would
    have to change their label, in [0, 1]."""
    _, places = torch.cat((found, wanted)).unique(return_inverse=True)
    counts = [part.bincount(minlength=int(places.max()) + 1) for part in places.split([len(found), len(wanted)])]
    return 0.5 * (counts[0] / len(found) - counts[1] / len(wanted)).abs().sum().item()


def scores(real: Tensor, fake: Tensor, n: int) -> list[dict[str, float]]:
    """Of each `n` of `fake` the Fréchet distance to all of `real` and the median distance to the nearest of them; and
    the kernel distance and the shares beside `n` of `real`, others each time where there are enough."""
    wanted, rows = moments(real), []
    for number, part in enumerate(fake.split(n)):
        some = real.roll(-n * number, 0)[:n]
        rows.append(
            {
                "fid": frechet_distance(wanted, moments(part)),
                "kid": kid(some, part),
                **prdc(some, part)._asdict(),
                "nearest": nearest(part, real)[0].median().item(),
            }
        )
    return rows


def pixel_features(images: Tensor) -> Tensor:
    """Images `(N, C, H, W)` as features: `(N, at most 1024)`, halved as often as it takes, since a Fréchet distance
    takes the cube of that."""
    while images[0].numel() > 1024 and max(images.shape[2:]) > 1:
        height, width = images.shape[2:]
        images = F.avg_pool2d(images, (min(2, height), min(2, width)), ceil_mode=True)
    return images.flatten(1)


def mean_and_se(values: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The mean over repeats of each number, with its standard error."""
    rows = {name: torch.tensor([value[name] for value in values], dtype=torch.float64) for name in values[0]}
    return {name: {"mean": r.mean().item(), "se": r.std().item() / math.sqrt(len(r))} for name, r in rows.items()}
