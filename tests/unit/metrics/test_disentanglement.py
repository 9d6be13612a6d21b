import math

import numpy as np
import pytest
import torch

from betavae.errors import UserError
from betavae.metrics import disentanglement
from betavae.metrics.disentanglement import (
    beta_vae_score,
    compute_scores,
    compute_scores_with_errors,
    dci,
    explicitness,
    factor_vae_score,
    mig,
    modularity,
    sample_pair_differences,
    sap,
)

SIZES = (4, 6, 10)


def grid(*sizes, times=1):
    """List every combination of factor values, `times` times."""
    return torch.cartesian_prod(*map(torch.arange, sizes)).repeat(times, 1)


@pytest.fixture(scope="module")
def factors():
    return grid(*SIZES, times=10)


@pytest.fixture(scope="module")
def perfect(factors):
    return compute_scores(factors.double(), factors)


@pytest.fixture(scope="module")
def noise(factors):
    return torch.randn(len(factors), 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def noisy(factors, noise):
    """Return the factors with some noise, and their scores with a tolerance for the rows drawn."""
    latents = factors / torch.tensor(SIZES) + 0.1 * noise[:, :3]
    return latents, {name: pytest.approx(value, abs=0.02) for name, value in compute_scores(latents, factors).items()}


def test_factors_as_latents_reach_the_best_scores(perfect):
    sap_at_best = 1 - (1 / 4 + 1 / 6 + 1 / 10) / 3
    assert perfect == {name: pytest.approx(1) for name in perfect} | {
        "sap": pytest.approx(sap_at_best),
        "explicitness": pytest.approx(1, abs=0.002),
    }


def test_noise_scores_at_chance(factors, noise):
    assert compute_scores(noise, factors) == {
        "beta_vae_score": pytest.approx(1 / 3, abs=0.04),
        "factor_vae_score": pytest.approx(1 / 3, abs=0.04),
        "mig": pytest.approx(0, abs=0.005),
        "sap": pytest.approx(0, abs=0.03),
        "dci_disentanglement": pytest.approx(0, abs=0.08),
        "dci_completeness": pytest.approx(0, abs=0.08),
        "dci_informativeness": pytest.approx((1 / 4 + 1 / 6 + 1 / 10) / 3, abs=0.03),
        "modularity": 0,
        "explicitness": pytest.approx(0.5, abs=0.02),
    }


def test_rotated_factors_lower_the_axis_scores():
    factors = grid(9, 9, times=40)
    a, b = (factors - 4.0).double().T
    straight, turned = torch.stack([a, b], 1), torch.stack([a + b, a - b], 1) / math.sqrt(2)
    result = compute_scores(turned, factors)
    # Both dimensions follow both factors alike; only scores of all dimensions at once do not change.
    assert result == {
        "beta_vae_score": pytest.approx(0.5, abs=0.03),
        "factor_vae_score": pytest.approx(0.5, abs=0.03),
        "mig": pytest.approx(0, abs=0.02),
        "sap": pytest.approx(0, abs=0.03),
        "dci_disentanglement": pytest.approx(0, abs=0.01),
        "dci_completeness": pytest.approx(0, abs=0.01),
        "dci_informativeness": pytest.approx(1, abs=0.01),
        "modularity": pytest.approx(0, abs=0.03),
        "explicitness": pytest.approx(explicitness(straight, factors), abs=0.001),
    }


def test_scores_ignore_order_scale_sign_and_dead_dimensions(factors, noisy):
    latents, expected = noisy
    dead = torch.full((len(factors), 2), 3.7)
    changed = torch.cat([latents[:, [2, 0, 1]] * torch.tensor([-8.0, 0.25, 1024.0]), dead], 1)
    assert compute_scores(changed, factors) == expected


def test_a_copy_of_a_dimension_lowers_the_gaps(factors, perfect):
    latents = torch.cat([factors, factors[:, :1]], 1).double()
    # For MIG and SAP, two dimensions of a factor are as bad as none; its completeness is 1 - log 2 / log 4.
    assert compute_scores(latents, factors) == {
        name: pytest.approx(value, abs=0.002) for name, value in perfect.items()
    } | {
        "mig": pytest.approx(2 / 3),
        "sap": pytest.approx((1 - 1 / 6 + 1 - 1 / 10) / 3),
        "dci_completeness": pytest.approx((0.5 + 1 + 1) / 3, abs=0.02),
    }


def test_a_noise_dimension_beside_the_factors_changes_no_score(factors, noise, perfect):
    latents = torch.cat([factors.double(), noise[:, :1]], 1)
    # MIG loses the information of noise in few rows: (bins - 1)(values - 1) / 2N / H, 0.012 on average.
    expected = {name: pytest.approx(value, abs=0.015) for name, value in perfect.items()}
    assert compute_scores(latents, factors) == expected


def test_a_factor_that_is_not_encoded_lowers_most_scores(factors, perfect):
    latents = factors[:, :2].double()
    assert (
        beta_vae_score(latents, factors) == 1
    )  # known to miss it: where no dimension is still, it is the third factor
    assert factor_vae_score(latents, factors) == pytest.approx(2 / 3)
    assert mig(latents, factors) == pytest.approx(2 / 3)
    assert sap(latents, factors) == pytest.approx((1 - 1 / 4 + 1 - 1 / 6) / 3, abs=0.01)
    assert modularity(latents, factors) == pytest.approx(1)


def test_scores_of_binary_factors_match_a_hand_calculation():
    """The first latent is wrong in every fourth row: I = log 2 - H(1/4)."""
    factors = grid(2, 2, times=800)
    is_wrong = (torch.arange(len(factors)) // 4 % 4 == 0).long()
    latents = torch.stack([factors[:, 0] ^ is_wrong, factors[:, 1]], 1).double()
    left = 1 - (math.log(4) / 4 + math.log(4 / 3) * 3 / 4) / math.log(2)
    assert mig(latents, factors) == pytest.approx((left + 1) / 2)
    assert sap(latents, factors) == pytest.approx((0.25 + 0.5) / 2, abs=0.02)
    assert dci(latents, factors).informativeness == pytest.approx((0.75 + 1) / 2, abs=0.02)
    assert explicitness(latents, factors) == pytest.approx((0.75 + 1) / 2, abs=0.02)
    both = latents[:, :1] + 2 * latents[:, 1:]  # one dimension encodes the second factor and part of the first
    assert modularity(both, factors) == pytest.approx(1 - left**2)
    assert modularity(torch.cat([both, latents], 1), factors) == pytest.approx((1 - left**2 + 2) / 3)


def test_factor_vae_score_matches_a_hand_calculation():
    """The first dimension is constant if the first factor is 1; else the second dimension varies less."""
    factors = grid(2, 2, times=500)
    a, b = factors.T
    n = torch.randn(2, len(factors), generator=torch.Generator().manual_seed(0))
    latents = torch.stack([(a == 0) * n[0], b + 0.1 * n[1]], 1)
    assert factor_vae_score(latents, factors) == pytest.approx((1 / 2 + 1) / 2, abs=0.03)


@pytest.mark.parametrize("score, size", [(beta_vae_score, "points"), (factor_vae_score, "votes")])
def test_training_points_are_not_scored(factors, noise, score, size):
    few = [score(noise, factors, seed=seed, **{size: 9}) for seed in range(60)]
    assert np.mean(few) == pytest.approx(1 / 3, abs=0.06)  # on training points it would be at least 0.5


def test_mig_is_limited_by_its_bins():
    factors = grid(2, 32, times=4)
    # 32 values on a line: 12 bins hold two of them, 8 one.
    information = (24 * math.log(16) + 8 * math.log(32)) / 32
    assert mig(factors.double(), factors) == pytest.approx((1 + information / math.log(32)) / 2)
    assert mig(factors.double(), factors, bins=32) == pytest.approx(1)


@pytest.mark.parametrize("score", [sap, dci])
def test_large_seeds_are_accepted(factors, score):
    found = [score(factors.float(), factors, seed=2**63 - 1) for _ in range(2)]
    assert found[0] == found[1]


def test_constant_factors_and_other_values_do_not_matter(factors, noisy):
    latents, expected = noisy
    one_value = torch.full((len(factors), 1), 7)
    more = torch.cat([one_value, factors * torch.tensor([5, -3, 1]) - 2, one_value], 1)
    # The values of one factor are reversed, so other rows are drawn.
    assert compute_scores(latents, more) == expected
    assert sap(latents, torch.cat([one_value, factors], 1)) == sap(latents, factors)


@pytest.mark.parametrize("row", range(12))
def test_a_value_of_one_row_is_left_out_of_the_explicitness(row):
    factors = torch.stack((torch.arange(12) % 2, torch.zeros(12, dtype=torch.long)), 1)
    factors[row, 1] = 1  # in the training rows or in the test rows
    assert 0 <= explicitness(torch.randn(12, 3), factors) <= 1


def test_constant_latents_score_at_chance(factors):
    assert compute_scores(torch.ones(len(factors), 3), factors) == {
        "beta_vae_score": pytest.approx(1 / 3),
        "factor_vae_score": pytest.approx(1 / 3),
        "mig": 0,
        "sap": 0,
        "dci_disentanglement": 0,
        "dci_completeness": 0,
        "dci_informativeness": pytest.approx((1 / 4 + 1 / 6 + 1 / 10) / 3, abs=0.03),
        "modularity": 0,
        "explicitness": 0.5,
    }


def test_pairs_are_two_rows_that_share_a_value():
    values = np.array([0, 2, 0, 1, 2, 2, 0])  # the row of value 1 is alone
    z = np.stack([values, 10.0 ** np.arange(7)], 1)
    difference = sample_pair_differences(z, values, 2000, 1, np.random.default_rng(0))
    assert (difference[:, 0] == 0).all()
    of_value_0, of_value_2 = [1, 1e6, 100], [10, 1e4, 1e5]
    pairs = {abs(a - b) for rows in (of_value_0, of_value_2) for a in rows for b in rows if a != b}
    assert set(difference[:, 1]) == pairs


def entangled():
    """Make latents of medium quality, the same on every machine."""
    random = np.random.RandomState(0)
    factors = random.randint(SIZES, size=(6000, 3))
    a, b, c = (factors / [3, 5, 9]).T
    n = random.randn(6000, 4)
    latents = np.stack([a + 0.15 * n[:, 0], b + 0.5 * c + 0.1 * n[:, 1], c - 0.2 * b + 0.1 * n[:, 2], n[:, 3]], 1)
    return torch.tensor(latents), torch.tensor(factors)


def test_scores_agree_with_disent():
    """Compare with disent 0.8.0, a port of disentanglement_lib (scikit-learn 1.9.1)."""
    latents, factors = entangled()
    # The same definition: the same number.
    assert mig(latents, factors) == pytest.approx(0.4551822407404, abs=1e-10)
    # Both are perfect according to disent and disentanglement_lib too, which draw new images.
    assert beta_vae_score(latents, factors) == factor_vae_score(latents, factors) == 1
    # disent lacks these scores; the values are those of disentanglement_lib's formulas. With the fourth dimension,
    # which is noise, its modularity is 0.9153.
    assert modularity(latents, factors) == pytest.approx(0.9922097415720, abs=1e-10)
    assert explicitness(latents, factors) == pytest.approx(0.9401, abs=0.005)  # other rows are tested
    # Thresholds predict a factor of many values better than disent's linear classifier (0.223).
    assert sap(latents, factors) == pytest.approx(0.342, abs=0.02)
    # disent's boosted trees give 0.543, 0.571 and 0.647 (0.802 in training): they overfit and use every dimension.
    assert dci(latents, factors) == pytest.approx((0.675, 0.744, 0.651), abs=0.03)


def test_standard_errors_match_the_spread_of_new_rows(monkeypatch):
    monkeypatch.setattr(disentanglement, "compute_scores", lambda z, v, seed: {"mig": mig(z, v)})  # the others are slow

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        factors = torch.stack([torch.randint(size, (2000,), generator=generator) for size in SIZES], 1)
        return factors / torch.tensor(SIZES) + 0.2 * torch.randn(2000, 3, generator=generator), factors

    deviation = np.std([mig(*draw(seed)) for seed in range(100)], ddof=1)
    results = [compute_scores_with_errors(*draw(seed), parts=8)["mig"] for seed in range(20)]
    assert results[0]["value"] == mig(*draw(0))
    assert math.sqrt(np.mean([result["se"] ** 2 for result in results])) == pytest.approx(deviation, rel=0.25)


def test_invalid_input_is_rejected(factors):
    latents = factors.double()
    for invalid in [
        (latents[0], factors),
        (latents, factors[:, 0]),
        (latents[1:], factors),
        (latents, factors.float()),
        (latents.where(factors > 0, torch.nan), factors),
        (latents, factors[:, :1]),
        (latents, factors * torch.tensor([1, 0, 0])),
        (latents[:0], factors[:0]),
    ]:
        with pytest.raises(UserError, match="invalid: expected"):
            mig(*invalid)
    with pytest.raises(UserError, match="no two share a value"):
        beta_vae_score(latents[:4], torch.arange(8).view(4, 2))
