"""Disentanglement scores: how far each latent dimension follows one factor of variation.

All scores take latents `(N, D)` and factor values `(N, F)` int64, one row per image. Latents are posterior samples or
posterior means, and the choice changes the score. A collapsed dimension is noise in a sample; in the means it is small
but not constant, and no score here depends on scale. Chen et al. define MIG with samples. Most published values of the
other scores use means.

Two kinds of columns are dropped first: factors with one value (no entropy, nothing to predict) and constant dimensions
(they would enter averages and the base of entropies). Without any dimension left, scores are at their chance level.
The caller selects the factors. Chen et al.'s MIG on dSprites leaves the shape out: pass `factors[:, 1:]`.

Classifiers and trees are scikit-learn's and train on two thirds of the rows. Scores depend on both choices.
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
MIN_LEAF_SIZES = (10, 30, 100, 300)  # candidates for the smallest leaf of DCI's trees, in rows


def beta_vae_score(latents: Tensor, factors: Tensor, seed: int = 0, points: int = 3000, pairs: int = 64) -> float:
    """Score how well a linear classifier recognizes the factor that was held fixed (Higgins et al. 2017).

    A point is the mean of |z_1 - z_2| over `pairs` of rows with the same value of one factor; there are `points` per
    factor. The classifier is logistic regression on standardized points, and its accuracy is that on the last third of
    each factor's points: chance is 1 / F, the best 1. The score misses a factor that is spread over several dimensions,
    and can be 1 while one factor is not encoded at all.
    """
    from sklearn.linear_model import LogisticRegression  # imported in functions, since it takes a second
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    z, v = drop_constant_columns(latents, factors)
    rng = np.random.default_rng(seed)
    is_train = np.tile(np.arange(points) < 2 * points // 3, v.shape[1])
    fixed = np.arange(v.shape[1]).repeat(points)
    differences = np.concatenate([sample_pair_differences(z, values, points, pairs, rng) for values in v.T])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(differences[is_train], fixed[is_train])
    return float(classifier.score(differences[~is_train], fixed[~is_train]))


def sample_pair_differences(
    z: np.ndarray, values: np.ndarray, points: int, pairs: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the mean |z_1 - z_2| over random pairs of two rows that share a value: `(points, D)`."""
    order, start, count = sort_rows_by_value(values)
    candidates = np.flatnonzero(count[values[order]] > 1)  # positions in `order` of rows that are not alone
    if not len(candidates):
        raise UserError(f"latents: in {len(z)} rows no two share a value of a factor; pass more rows")
    first = rng.choice(candidates, (points, pairs))
    n, start = count[values[order[first]]], start[values[order[first]]]
    second = start + (first - start + 1 + (rng.random(first.shape) * (n - 1)).astype(int)) % n
    return np.abs(z[order[first]] - z[order[second]]).mean(1)


def factor_vae_score(latents: Tensor, factors: Tensor, seed: int = 0, votes: int = 3000, batch: int = 64) -> float:
    """Score the majority vote of the dimension that varies least (Kim & Mnih 2018).

    Each of `votes` batches of rows that share a value of one factor votes with the dimension of the least variance,
    relative to its variance over all rows. A dimension stands for the factor that gave it most votes. Votes are learned
    from two thirds of the batches, and the accuracy is that on the rest: chance is 1 / F, the best 1. The score misses
    a factor that has a second dimension, and other factors in the same dimension, as long as that dimension varies
    least.
    """
    z, v = drop_constant_columns(latents, factors)
    rng = np.random.default_rng(seed)
    z = z / np.where(np.ptp(z, 0) > 0, z.std(0), 1)
    least = np.zeros((v.shape[1], votes), dtype=int)
    for factor, values in enumerate(v.T):
        order, start, count = sort_rows_by_value(values)
        value = values[rng.integers(len(z), size=(votes, 1))]
        rows = order[start[value] + (rng.random((votes, batch)) * count[value]).astype(int)]
        least[factor] = z[rows].var(1, ddof=1).argmin(1)
    train, test = np.split(least, [2 * votes // 3], axis=1)
    factor_of = np.stack([(train == dimension).sum(1) for dimension in range(z.shape[1])]).argmax(1)
    return float((factor_of[test] == np.arange(len(test))[:, None]).mean())


def sort_rows_by_value(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows `(N,)` sorted by value, and the first position and the count of each value."""
    count = np.bincount(values)
    return values.argsort(kind="stable"), count.cumsum() - count, count


def mig(latents: Tensor, factors: Tensor, bins: int = 20) -> float:
    """Return the mutual information gap (Chen et al. 2018), in [0, 1].

    It is the largest I(z_d; v) minus the second largest, divided by H(v), averaged over factors. Noise scores 0 up to
    the bias of a finite sample. As in disentanglement_lib, the `bins` have equal width between the least and the
    largest z_d. With 20 bins, a factor with more values does not reach 1 (32 equally frequent values on a line: 0.85).
    The score misses a second factor in the same dimension.
    """
    z, v = drop_constant_columns(latents, factors)
    information = mutual_information(z, v, bins)
    second, first = np.sort(np.pad(information, ((1, 0), (0, 0))), axis=0)[-2:]  # no dimension: no information
    return float(((first - second) / [entropy(np.bincount(values)) for values in v.T]).mean())


def mutual_information(z: np.ndarray, v: np.ndarray, bins: int) -> np.ndarray:
    """Return the mutual information `(D, F)` in nats of the observed frequencies.

    For independent columns it is about (bins - 1)(values - 1) / 2N, not 0.
    """
    spread = np.ptp(z, 0)
    bin_of = np.minimum((z - z.min(0)) / np.where(spread > 0, spread, 1) * bins, bins - 1).astype(int)
    return np.array(
        [
            [
                entropy(np.bincount(cells)) + entropy(np.bincount(values)) - entropy(np.bincount(values * bins + cells))
                for values in v.T
            ]
            for cells in bin_of.T
        ]
    ).clip(0)


def entropy(weights: np.ndarray) -> float:
    """Return the entropy in nats of non-negative weights, which are normalized first."""
    p = weights[weights > 0] / weights.sum()
    return float(-(p * np.log(p)).sum())


def sap(latents: Tensor, factors: Tensor, seed: int = 0) -> float:
    """Return the separated attribute predictability (Kumar et al. 2018), in [0, 1 - mean of 1 / K].

    For each factor of K values, each dimension alone predicts it with the thresholds of a tree of at most K leaves. The
    score is the best test accuracy minus the second best, averaged over factors. Accuracies are averaged over the K
    values, so chance is 1 / K. disentanglement_lib has a linear classifier in place of the thresholds. It does not
    separate many values on a line, so its scores are smaller. Noise scores about 0. The score misses a second factor in
    the same dimension.
    """
    from sklearn.tree import DecisionTreeClassifier

    z, v = drop_constant_columns(latents, factors)
    gaps = []
    for values, train, test in iter_factor_splits(v, seed):
        present = np.unique(values[test])
        accuracies = [1 / len(present)]  # without any dimension
        for code in z.T[:, :, None]:
            tree = DecisionTreeClassifier(
                max_leaf_nodes=values.max() + 1, class_weight="balanced", random_state=seed % 2**32
            )
            is_correct = tree.fit(code[train], values[train]).predict(code[test]) == values[test]
            accuracies.append(np.mean([is_correct[values[test] == value].mean() for value in present]))
        second, first = np.sort(accuracies)[-2:]
        gaps.append(first - second)
    return float(np.mean(gaps))


class DCI(NamedTuple):
    """The three scores of Eastwood & Williams (2018), each in [0, 1]."""

    disentanglement: float
    completeness: float
    informativeness: float


def dci(latents: Tensor, factors: Tensor, seed: int = 0, trees: int = 20) -> DCI:
    """Return disentanglement, completeness and informativeness (Eastwood & Williams 2018).

    R `(D, F)` holds the importance of each dimension in the prediction of each factor. Disentanglement is 1 - the
    entropy of a dimension's row of R to base F, weighted by the row's share of R. Completeness is 1 - the entropy of a
    factor's column to base D, averaged. Informativeness is the test accuracy, averaged (their paper: the error).

    R is the Gini importance in a random forest whose trees see every dimension at each split. As in the paper, the size
    of the trees is chosen on held-out rows, a quarter of those for training: the largest of `MIN_LEAF_SIZES` within one
    standard error of the best. R depends strongly on it, since trees that overfit split by every dimension.
    disentanglement_lib's boosted trees have one size and are many times slower. Importances of a factor add up to 1
    even if it is hardly predicted, so the first two scores miss a factor that is not encoded.
    """
    from sklearn.ensemble import RandomForestClassifier

    z, v = drop_constant_columns(latents, factors)
    importances, accuracies = [], []
    for values, train, test in iter_factor_splits(v, seed):
        fit, held_out = np.split(train, [3 * len(train) // 4])
        forests = [
            RandomForestClassifier(trees, min_samples_leaf=size, max_features=None, random_state=seed % 2**32)
            for size in MIN_LEAF_SIZES
        ]
        score = np.array([forest.fit(z[fit], values[fit]).score(z[held_out], values[held_out]) for forest in forests])
        threshold = score.max() - math.sqrt(score.max() * (1 - score.max()) / len(held_out))
        forest = forests[np.flatnonzero(score >= threshold)[-1]]
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
    """Return the modularity (Ridgeway & Mozer 2018), in [0, 1].

    It is 1 if each dimension informs about one factor only. For a dimension it is 1 - (mean of the other factors'
    I(z_d; v)^2) / (the largest I(z_d; v))^2, averaged over dimensions, with I as in `mig`. A dimension whose
    information on no factor exceeds that of independence (by 4 standard deviations of the G-test) is left out, because
    a few collapsed dimensions would decide the score. With none left the score is 0. It misses factors that no
    dimension encodes, and ignores the amount of information.
    """
    z, v = drop_constant_columns(latents, factors)
    information = mutual_information(z, v, bins)
    freedom = (bins - 1) * v.max(0)
    is_informed = (2 * len(z) * information > freedom + 4 * np.sqrt(2 * freedom)).any(1)
    if not is_informed.any():
        return 0.0
    squares = information[is_informed] ** 2
    largest = squares.max(1)
    return float((1 - (squares.sum(1) - largest) / (largest * (v.shape[1] - 1))).mean())


def explicitness(latents: Tensor, factors: Tensor, seed: int = 0) -> float:
    """Return the explicitness (Ridgeway & Mozer 2018): chance is 0.5, the best 1.

    It is the area under the ROC curve of each value of a factor against its other values, averaged over values, then
    factors, for test rows and logistic regression on all standardized latents. The regression is multinomial: it
    separates the middle ones of 32 values on a line. One classifier per value, scikit-learn's default before 0.22 and
    so in older results, does not. The score misses axes, since any rotation scores the same.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    z, v = drop_constant_columns(latents, factors)
    areas = []
    for values, train, test in iter_factor_splits(v, seed):
        if np.ptp(values[train]) == 0:  # a rare value may be in one test row only
            continue
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probability = classifier.fit(z[train], values[train]).predict_proba(z[test])
        masks = [values[test] == value for value in classifier.classes_]
        columns = zip(masks, probability.T, strict=True)
        found = [roc_auc_score(mask, column) for mask, column in columns if mask.any() and not mask.all()]
        areas += [np.mean(found)] if found else []
    return float(np.mean(areas))


def drop_constant_columns(latents: Tensor, factors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Check the input and drop constant columns.

    Returns:
        Latents `(N, D)` in double precision, and factors `(N, F)` whose values are numbered 0, 1, ... in their order.
        Without any dimension left, one constant dimension stays.

    Raises:
        UserError: For other shapes or types, non-finite latents, or fewer than two factors with several values.
    """
    shapes = f"latents {tuple(latents.shape)} and factors {tuple(factors.shape)}"
    if latents.ndim != 2 or factors.ndim != 2 or len(latents) != len(factors):
        raise UserError(f"{shapes} are invalid: expected (N, D) and (N, F) with one row per image")
    if factors.is_floating_point():
        raise UserError(f"factors of type {factors.dtype} are invalid: expected integers, the index of each value")
    if not latents.isfinite().all():
        raise UserError("latents are invalid: expected finite numbers")
    z, v = latents.detach().cpu().double().numpy(), factors.cpu().numpy()
    columns = [np.unique(values, return_inverse=True)[1] for values in v.T]
    columns = [values for values in columns if values.any()]
    if len(columns) < 2:
        raise UserError(f"{shapes} are invalid: expected at least two factors with several values in these rows")
    is_live = np.ptp(z, 0) > 0
    return (z[:, is_live] if is_live.any() else z[:, :1]), np.stack(columns, 1)


def iter_factor_splits(v: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield for each factor its values `(N,)`, the rows for training (two thirds) and those for testing."""
    train, test = np.split(np.random.default_rng(seed).permutation(len(v)), [2 * len(v) // 3])
    for values in v.T:
        yield values, train, test


def compute_scores(latents: Tensor, factors: Tensor, seed: int = 0) -> dict[str, float]:
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


def compute_scores_with_errors(
    latents: Tensor, factors: Tensor, seed: int = 0, parts: int = 5
) -> dict[str, dict[str, float]]:
    """Compute all `SCORES` with their standard errors over the rows drawn.

    The error is the standard deviation over disjoint parts of the rows, divided by sqrt(parts). It is not a bootstrap,
    since repeated rows would be in training and test sets. Models trained with another seed differ by much more
    (Locatello et al. 2019).

    Returns:
        `{"value", "se"}` for each name; `value` is the score of all rows.
    """
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed))
    part_scores = [compute_scores(latents[rows], factors[rows], seed) for rows in order.tensor_split(parts)]
    return {
        name: {"value": value, "se": float(np.std([part[name] for part in part_scores], ddof=1)) / math.sqrt(parts)}
        for name, value in compute_scores(latents, factors, seed).items()
    }
