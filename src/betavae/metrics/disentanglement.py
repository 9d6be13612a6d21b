"""Disentanglement scores: does each latent dimension follow one factor that the images were made from?

All take latents `(N, D)`, one row an image, and factors `(N, F)` int64, the values of the factors of that image, and
say nothing about images. Latents are posterior samples or posterior means, and the choice changes the value: a
collapsed dimension is noise in a sample; in the means it is small, not constant, and no score here looks at scale. Chen
et al. define MIG by samples; most published numbers of the other scores are of means.

Left out before anything is computed: a factor of one value (it has no entropy, and nothing to predict) and a constant
dimension (it would enter averages and the base of entropies). With no dimension left, scores are at their chance level.
Which factors count is the caller's choice of columns. So Chen et al.'s MIG on dSprites is that of `factors[:, 1:]`,
which leaves the shape out.

Classifiers and trees are scikit-learn's and train on two thirds of the rows; values depend on them.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from betavae.errors import UserError

SCORES = (
    *("beta_vae_score", "factor_vae_score", "mig", "sap", "dci_disentanglement", "dci_completeness"),
    *("dci_informativeness", "modularity", "explicitness"),
)
MIN_LEAF_SIZES = (10, 30, 100, 300)  # least rows in a leaf of DCI's trees


def beta_vae_score(latents: Tensor, factors: Tensor, seed: int = 0, points: int = 3000, pairs: int = 64) -> float:
    """Accuracy of a linear classifier that tells which factor was held fixed (Higgins et al. 2017). Chance 1/F, best 1.

    A point is the mean of |z_1 - z_2| over `pairs` pairs of rows with the same value of one factor; there are `points`
    for each factor. The classifier is logistic regression on standardised differences. It misses a factor spread over
    several dimensions, and can be 1 with one factor not encoded at all.
    """
    from sklearn.linear_model import LogisticRegression  # in functions, since it takes a second
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    z, v = drop_constant_columns(latents, factors)
    rng = np.random.default_rng(seed)
    # The first two thirds of each factor's points are for training.
    train = np.tile(np.arange(points) < 2 * points // 3, v.shape[1])
    fixed = np.arange(v.shape[1]).repeat(points)
    difference = np.concatenate([pair_differences(z, values, points, pairs, rng) for values in v.T])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(classifier.fit(difference[train], fixed[train]).score(difference[~train], fixed[~train]))


def pair_differences(
    z: np.ndarray, values: np.ndarray, points: int, pairs: int, rng: np.random.Generator
) -> np.ndarray:
    """(points, D): mean |z_1 - z_2| over pairs of two rows, drawn at random, that share a value."""
    order, start, count = rows_by_value(values)
    place = np.flatnonzero(count[values[order]] > 1)  # in `order`, of rows that are not alone
    if not len(place):
        raise UserError(f"latents: in {len(z)} rows no two share a value of a factor; give more rows")
    first = rng.choice(place, (points, pairs))
    n, start = count[values[order[first]]], start[values[order[first]]]
    second = start + (first - start + 1 + (rng.random(first.shape) * (n - 1)).astype(int)) % n
    return np.abs(z[order[first]] - z[order[second]]).mean(1)


def factor_vae_score(latents: Tensor, factors: Tensor, seed: int = 0, votes: int = 3000, batch: int = 64) -> float:
    """Accuracy of the majority vote of the dimension that varies least (Kim & Mnih 2018). Chance 1/F, best 1.

    For each factor `votes` batches of rows that share a value of it are drawn. Each batch votes with the dimension of
    the least variance, divided by its variance in all rows; a dimension stands for the factor that it got most votes
    from. Votes are learnt from two thirds of the batches and counted in the rest. It misses a factor that has a second
    dimension, and other factors in the same dimension, as long as that dimension varies least.
    """
    z, v = drop_constant_columns(latents, factors)
    rng = np.random.default_rng(seed)
    z = z / np.where(np.ptp(z, 0) > 0, z.std(0), 1)
    least = np.zeros((v.shape[1], votes), dtype=int)
    for factor, values in enumerate(v.T):
        order, start, count = rows_by_value(values)
        value = values[rng.integers(len(z), size=(votes, 1))]
        rows = order[start[value] + (rng.random((votes, batch)) * count[value]).astype(int)]
        least[factor] = z[rows].var(1, ddof=1).argmin(1)
    train, test = np.split(least, [2 * votes // 3], axis=1)
    factor_of = np.stack([(train == dimension).sum(1) for dimension in range(z.shape[1])]).argmax(1)
    return float((factor_of[test] == np.arange(len(test))[:, None]).mean())


def rows_by_value(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows `(N,)` in the order of their value 0, 1, ..., and of each value the first place there and how many rows."""
    count = np.bincount(values)
    return values.argsort(kind="stable"), count.cumsum() - count, count


def mig(latents: Tensor, factors: Tensor, bins: int = 20) -> float:
    """Mutual information gap (Chen et al. 2018), in [0, 1]; noise is at 0 but for the finite sample.

    For each factor the largest I(z_d; v) less the second largest, divided by H(v); the mean over factors. I is that of
    equally wide `bins` between the least and the largest z_d, as in disentanglement_lib. With 20 bins a factor of more
    values cannot reach 1 (32 equally frequent values on a line: 0.85). It misses a second factor in the same dimension.
    """
    z, v = drop_constant_columns(latents, factors)
    information = mutual_information(z, v, bins)
    second, first = np.sort(np.pad(information, ((1, 0), (0, 0))), axis=0)[-2:]  # no dimension: no information
    return float(((first - second) / [entropy(np.bincount(values)) for values in v.T]).mean())


def mutual_information(z: np.ndarray, v: np.ndarray, bins: int) -> np.ndarray:
    """(D, F) in nats, of the observed frequencies; independent ones give about (bins - 1)(values - 1) / 2N, not 0."""
    spread = np.ptp(z, 0)
    place = np.minimum((z - z.min(0)) / np.where(spread > 0, spread, 1) * bins, bins - 1).astype(int)
    return np.array(
        [
            [
                entropy(np.bincount(cells)) + entropy(np.bincount(values)) - entropy(np.bincount(values * bins + cells))
                for values in v.T
            ]
            for cells in place.T
        ]
    ).clip(0)


def entropy(weights: np.ndarray) -> float:
    """In nats, of non-negative weights that need not add up to 1."""
    p = weights[weights > 0] / weights.sum()
    return float(-(p * np.log(p)).sum())


def sap(latents: Tensor, factors: Tensor, seed: int = 0) -> float:
    """Separated attribute predictability (Kumar et al. 2018), in [0, 1 - the mean of 1 / values]; noise is at 0.

    For each factor of K values, how well each dimension alone predicts it by thresholds; the best less the second best,
    and the mean over factors. Thresholds are a tree's of at most K leaves; how well is the test accuracy averaged over
    the K values, of which chance is 1/K. (disentanglement_lib has a linear classifier in place of the thresholds, which
    cannot tell most of many values on a line, so its values are smaller.) It misses a second factor in
    the dimension.
    """
    from sklearn.tree import DecisionTreeClassifier

    z, v = drop_constant_columns(latents, factors)
    gaps = []
    for values, train, test in iter_factor_splits(v, seed):
        present = np.unique(values[test])
        accuracy = [1 / len(present)]  # of no dimension
        for code in z.T[:, :, None]:
            tree = DecisionTreeClassifier(
                max_leaf_nodes=values.max() + 1, class_weight="balanced", random_state=seed % 2**32
            )
            right = tree.fit(code[train], values[train]).predict(code[test]) == values[test]
            accuracy.append(np.mean([right[values[test] == value].mean() for value in present]))
        second, first = np.sort(accuracy)[-2:]
        gaps.append(first - second)
    return float(np.mean(gaps))


class DCI(NamedTuple):
    disentanglement: float
    completeness: float
    informativeness: float


def dci(latents: Tensor, factors: Tensor, seed: int = 0, trees: int = 20) -> DCI:
    """Disentanglement, completeness and informativeness (Eastwood & Williams 2018), each in [0, 1].

    R (D, F) holds how much each dimension counts in predicting each factor. Disentanglement is 1 - the entropy of a
    dimension's row of R, to base F, weighted by the row's share of R; completeness is 1 - that of a factor's column, to
    base D, averaged; informativeness is the test accuracy (their paper: the error), averaged, which noise has at 1 /
    values.

    R is the Gini importance in a random forest of `trees` trees that see every dimension at each split. As in the paper
    the size of trees is chosen on held-out rows, a quarter of those for training: the largest of `LEAVES` that is
    within a standard error of the best. R depends on it a great deal, since trees that overfit split by every
    dimension; disentanglement_lib's boosted trees are of one size, and many times slower. Importances of a factor
    add up to 1 however badly it is predicted, so the first two miss that a factor is not there at all.
    """
    from sklearn.ensemble import RandomForestClassifier

    z, v = drop_constant_columns(latents, factors)
    importances, accuracies = [], []
    for values, train, test in iter_factor_splits(v, seed):
        fit, check = np.split(train, [3 * len(train) // 4])
        forests = [
            RandomForestClassifier(trees, min_samples_leaf=leaf, max_features=None, random_state=seed % 2**32)
            for leaf in MIN_LEAF_SIZES
        ]
        checked = np.array([forest.fit(z[fit], values[fit]).score(z[check], values[check]) for forest in forests])
        enough = checked.max() - math.sqrt(checked.max() * (1 - checked.max()) / len(check))
        forest = forests[np.flatnonzero(checked >= enough)[-1]]
        importances.append(forest.feature_importances_)
        accuracies.append(forest.score(z[test], values[test]))
    r = np.stack(importances, 1)
    if not r.any():  # no dimension is left
        return DCI(0.0, 0.0, float(np.mean(accuracies)))
    live = r[r.sum(1) > 0]
    rows = [1 - entropy(row) / math.log(r.shape[1]) for row in live]
    columns = [1 - entropy(column) / math.log(max(len(r), 2)) for column in r.T if column.any()]
    disentanglement = float(np.average(rows, weights=live.sum(1)))
    return DCI(disentanglement, float(np.sum(columns)) / r.shape[1], float(np.mean(accuracies)))


def modularity(latents: Tensor, factors: Tensor, bins: int = 20) -> float:
    """Modularity (Ridgeway & Mozer 2018), in [0, 1]: whether each dimension has information on one factor only.

    For each dimension 1 - (the other factors' I(z_d; v)^2, averaged) / (the largest I(z_d; v))^2, and the mean over
    dimensions; I as in `mig`. A dimension whose information on no factor exceeds what independence gives (by 4 standard
    deviations of the G-test) is left out, or a few collapsed dimensions would decide the score; with none left it is 0.
    It misses factors that no dimension has, and how little information it may be.
    """
    z, v = drop_constant_columns(latents, factors)
    information = mutual_information(z, v, bins)
    freedom = (bins - 1) * v.max(0)
    informed = (2 * len(z) * information > freedom + 4 * np.sqrt(2 * freedom)).any(1)
    if not informed.any():
        return 0.0
    squares = information[informed] ** 2
    largest = squares.max(1)
    return float((1 - (squares.sum(1) - largest) / (largest * (v.shape[1] - 1))).mean())


def explicitness(latents: Tensor, factors: Tensor, seed: int = 0) -> float:
    """Explicitness (Ridgeway & Mozer 2018), chance 0.5, best 1: whether factors can be read off all dimensions at once.

    The area under the ROC curve of each value of a factor against its others, averaged over values, then factors, of
    test rows by logistic regression on standardised latents. It is multinomial: of 32 values on a line it can tell the
    middle ones, where one classifier a value, scikit-learn's default before 0.22 and so in older numbers, cannot. It
    misses axes: any rotation scores the same.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    z, v = drop_constant_columns(latents, factors)
    areas = []
    for values, train, test in iter_factor_splits(v, seed):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probability = classifier.fit(z[train], values[train]).predict_proba(z[test])
        present = [(column, values[test] == value) for column, value in enumerate(classifier.classes_)]
        areas.append(np.mean([roc_auc_score(own, probability[:, column]) for column, own in present if own.any()]))
    return float(np.mean(areas))


def drop_constant_columns(latents: Tensor, factors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Latents and factors less constant columns; the values of each factor are numbered 0, 1, ... in their order."""
    shapes = f"latents {tuple(latents.shape)} and factors {tuple(factors.shape)}"
    if latents.ndim != 2 or factors.ndim != 2 or len(latents) != len(factors):
        raise UserError(f"{shapes} cannot be: they must be (rows, dimensions) and (rows, factors), of the same rows")
    if factors.is_floating_point():
        raise UserError(f"factors cannot be {factors.dtype}: they must be whole numbers, the index of each value")
    if not latents.isfinite().all():
        raise UserError("latents cannot be: some are infinite or not numbers")
    z, v = latents.detach().cpu().double().numpy(), factors.cpu().numpy()
    columns = [np.unique(values, return_inverse=True)[1] for values in v.T]
    columns = [values for values in columns if values.any()]
    if len(columns) < 2:
        raise UserError(f"{shapes} cannot be scored: at least two factors must take more than one value in these rows")
    alive = np.ptp(z, 0) > 0
    return (z[:, alive] if alive.any() else z[:, :1]), np.stack(columns, 1)


def iter_factor_splits(v: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each factor its values `(N,)`, and which rows are for training, two thirds, and which for testing."""
    train, test = np.split(np.random.default_rng(seed).permutation(len(v)), [2 * len(v) // 3])
    for values in v.T:
        yield values, train, test


def scores(latents: Tensor, factors: Tensor, seed: int = 0) -> dict[str, float]:
    """`SCORES`."""
    dci_scores = {f"dci_{name}": value for name, value in dci(latents, factors, seed)._asdict().items()}
    return {
        "beta_vae_score": beta_vae_score(latents, factors, seed),
        "factor_vae_score": factor_vae_score(latents, factors, seed),
        "mig": mig(latents, factors),
        "sap": sap(latents, factors, seed),
        **dci_scores,
        "modularity": modularity(latents, factors),
        "explicitness": explicitness(latents, factors, seed),
    }


def scores_with_errors(latents: Tensor, factors: Tensor, seed: int = 0, parts: int = 5) -> dict[str, dict[str, float]]:
    """Every score as `{"value", "se"}`: of all rows, and the deviation over `parts` disjoint parts / sqrt(parts).

    Not a bootstrap, since repeated rows would be trained on and tested. This is the error of the rows drawn; models
    trained with another seed differ by much more (Locatello et al. 2019).
    """
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed))
    of_parts = [scores(latents[rows], factors[rows], seed) for rows in order.tensor_split(parts)]
    return {
        name: {"value": value, "se": float(np.std([part[name] for part in of_parts], ddof=1)) / math.sqrt(parts)}
        for name, value in scores(latents, factors, seed).items()
    }
