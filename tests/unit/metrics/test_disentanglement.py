import json
import math

import numpy as np
import pytest
import torch

from betavae.errors import UserError
from betavae.metrics import disentanglement
from betavae.metrics.disentanglement import (
    beta_vae_score,
    compute_scores_with_errors,
    dci,
    explicitness,
    factor_vae_score,
    mig,
    modularity,
    sample_pair_differences,
    sap,
    scores,
)
from betavae.runtime import checkpoint, evaluation
from betavae.sweeps import report
from tests.commands import run
from tests.integration.test_readme import PAGES, commands, small

SIZES = (4, 6, 10)


def grid(*sizes, times=1):
    """Every combination of factor values, each so many times."""
    return torch.cartesian_prod(*map(torch.arange, sizes)).repeat(times, 1)


@pytest.fixture(scope="module")
def factors():
    return grid(*SIZES, times=10)


@pytest.fixture(scope="module")
def perfect(factors):
    return scores(factors.double(), factors)


@pytest.fixture(scope="module")
def noise(factors):
    return torch.randn(len(factors), 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def noisy(factors, noise):
    """The factors with some noise, and scores that are the same but for the rows drawn."""
    latents = factors / torch.tensor(SIZES) + 0.1 * noise[:, :3]
    return latents, {name: pytest.approx(value, abs=0.02) for name, value in scores(latents, factors).items()}


def test_factors_as_latents_score_what_the_definition_gives_at_best(perfect):
    sap_at_best = 1 - (1 / 4 + 1 / 6 + 1 / 10) / 3
    assert perfect == {name: pytest.approx(1) for name in perfect} | {
        "sap": pytest.approx(sap_at_best),
        "explicitness": pytest.approx(1, abs=0.002),
    }


def test_noise_scores_at_chance(factors, noise):
    assert scores(noise, factors) == {
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


def test_two_factors_turned_by_45_degrees():
    factors = grid(9, 9, times=40)
    a, b = (factors - 4.0).double().T
    straight, turned = torch.stack([a, b], 1), torch.stack([a + b, a - b], 1) / math.sqrt(2)
    result = scores(turned, factors)
    # Both dimensions follow both factors alike; only scores that look at all dimensions at once do not mind.
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


def test_order_scale_sign_and_dead_dimensions_do_not_matter(factors, noisy):
    latents, expected = noisy
    dead = torch.full((len(factors), 2), 3.7)
    changed = torch.cat([latents[:, [2, 0, 1]] * torch.tensor([-8.0, 0.25, 1024.0]), dead], 1)
    assert scores(changed, factors) == expected


def test_a_second_copy_of_a_dimension(factors, perfect):
    latents = torch.cat([factors, factors[:, :1]], 1).double()
    # For MIG and SAP two dimensions of a factor are as bad as none, for completeness they are 1 - log 2 / log 4.
    assert scores(latents, factors) == {name: pytest.approx(value, abs=0.002) for name, value in perfect.items()} | {
        "mig": pytest.approx(2 / 3),
        "sap": pytest.approx((1 - 1 / 6 + 1 - 1 / 10) / 3),
        "dci_completeness": pytest.approx((0.5 + 1 + 1) / 3, abs=0.02),
    }


def test_a_dimension_of_noise_beside_the_factors_changes_no_score(factors, noise, perfect):
    latents = torch.cat([factors.double(), noise[:, :1]], 1)
    # Of MIG it takes what I of noise is in so few rows: (bins - 1)(values - 1) / 2N / H, 0.012 on average.
    expected = {name: pytest.approx(value, abs=0.015) for name, value in perfect.items()}
    assert scores(latents, factors) == expected


def test_a_factor_that_is_not_encoded(factors, perfect):
    latents = factors[:, :2].double()
    assert beta_vae_score(latents, factors) == 1  # what it is known to miss: where nothing is still, it is the third
    assert factor_vae_score(latents, factors) == pytest.approx(2 / 3)
    assert mig(latents, factors) == pytest.approx(2 / 3)
    assert sap(latents, factors) == pytest.approx((1 - 1 / 4 + 1 - 1 / 6) / 3, abs=0.01)
    assert modularity(latents, factors) == pytest.approx(1)


def test_binary_factors_by_hand():
    """One bit of the first factor goes wrong in every fourth row: I = log 2 - H(1/4)."""
    factors = grid(2, 2, times=800)
    wrong = (torch.arange(len(factors)) // 4 % 4 == 0).long()
    latents = torch.stack([factors[:, 0] ^ wrong, factors[:, 1]], 1).double()
    left = 1 - (math.log(4) / 4 + math.log(4 / 3) * 3 / 4) / math.log(2)
    assert mig(latents, factors) == pytest.approx((left + 1) / 2)
    assert sap(latents, factors) == pytest.approx((0.25 + 0.5) / 2, abs=0.02)
    assert dci(latents, factors).informativeness == pytest.approx((0.75 + 1) / 2, abs=0.02)
    assert explicitness(latents, factors) == pytest.approx((0.75 + 1) / 2, abs=0.02)
    both = latents[:, :1] + 2 * latents[:, 1:]  # one dimension with all of the second factor, part of the first
    assert modularity(both, factors) == pytest.approx(1 - left**2)
    assert modularity(torch.cat([both, latents], 1), factors) == pytest.approx((1 - left**2 + 2) / 3)


def test_the_dimension_that_varies_least_by_hand():
    """Where the first factor is 1 the first dimension stands still; where it is 0 the second dimension varies less."""
    factors = grid(2, 2, times=500)
    a, b = factors.T
    n = torch.randn(2, len(factors), generator=torch.Generator().manual_seed(0))
    latents = torch.stack([(a == 0) * n[0], b + 0.1 * n[1]], 1)
    assert factor_vae_score(latents, factors) == pytest.approx((1 / 2 + 1) / 2, abs=0.03)


@pytest.mark.parametrize("score, size", [(beta_vae_score, "points"), (factor_vae_score, "votes")])
def test_the_points_trained_on_do_not_count(factors, noise, score, size):
    few = [score(noise, factors, seed=seed, **{size: 9}) for seed in range(60)]
    assert np.mean(few) == pytest.approx(1 / 3, abs=0.06)  # in training it would be 0.5 and more


def test_twenty_bins_hold_no_more_than_twenty_values():
    factors = grid(2, 32, times=4)
    # 32 values on a line: 12 bins hold two of them, 8 one.
    information = (24 * math.log(16) + 8 * math.log(32)) / 32
    assert mig(factors.double(), factors) == pytest.approx((1 + information / math.log(32)) / 2)
    assert mig(factors.double(), factors, bins=32) == pytest.approx(1)


@pytest.mark.parametrize("score", [sap, dci])
def test_every_seed_of_a_script_is_accepted(factors, score):
    found = [score(factors.float(), factors, seed=2**63 - 1) for _ in range(2)]
    assert found[0] == found[1]


def test_a_factor_of_one_value_is_left_out_and_values_need_not_be_0_1_2(factors, noisy):
    latents, expected = noisy
    one_value = torch.full((len(factors), 1), 7)
    more = torch.cat([one_value, factors * torch.tensor([5, -3, 1]) - 2, one_value], 1)
    # One factor's values run the other way, so other rows are drawn.
    assert scores(latents, more) == expected
    assert sap(latents, torch.cat([one_value, factors], 1)) == sap(latents, factors)


def test_no_dimension_left_is_at_chance(factors):
    assert scores(torch.ones(len(factors), 3), factors) == {
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


def test_pairs_share_the_value_and_are_of_two_rows():
    values = np.array([0, 2, 0, 1, 2, 2, 0])  # the row of value 1 is alone
    z = np.stack([values, 10.0 ** np.arange(7)], 1)
    difference = sample_pair_differences(z, values, 2000, 1, np.random.default_rng(0))
    assert (difference[:, 0] == 0).all()
    of_value_0, of_value_2 = [1, 1e6, 100], [10, 1e4, 1e5]
    pairs = {abs(a - b) for rows in (of_value_0, of_value_2) for a in rows for b in rows if a != b}
    assert set(difference[:, 1]) == pairs


def entangled():
    """Latents that are neither good nor bad, the same on every machine."""
    random = np.random.RandomState(0)
    factors = random.randint(SIZES, size=(6000, 3))
    a, b, c = (factors / [3, 5, 9]).T
    n = random.randn(6000, 4)
    latents = np.stack([a + 0.15 * n[:, 0], b + 0.5 * c + 0.1 * n[:, 1], c - 0.2 * b + 0.1 * n[:, 2], n[:, 3]], 1)
    return torch.tensor(latents), torch.tensor(factors)


def test_against_disent():
    """disent 0.8.0, a port of disentanglement_lib, on the same latents (scikit-learn 1.9.1)."""
    latents, factors = entangled()
    # The same definition: the same number.
    assert mig(latents, factors) == pytest.approx(0.4551822407404, abs=1e-10)
    # Both are perfect here by disent and by disentanglement_lib's formula, with new images in place of given rows.
    assert beta_vae_score(latents, factors) == factor_vae_score(latents, factors) == 1
    # disentanglement_lib's formulas, of disent's mutual information and by scikit-learn: disent has neither score. With
    # the fourth dimension, which is noise, modularity is 0.9153 there.
    assert modularity(latents, factors) == pytest.approx(0.9922097415720, abs=1e-10)
    assert explicitness(latents, factors) == pytest.approx(0.9401, abs=0.005)  # another third of the rows is tested
    # Thresholds see more of a factor of many values than disent's linear classifier (0.223), on every factor.
    assert sap(latents, factors) == pytest.approx(0.342, abs=0.02)
    # disent's boosted trees have 0.543, 0.571 and 0.647 (0.802 in training): they overfit, so they use every dimension.
    assert dci(latents, factors) == pytest.approx((0.675, 0.744, 0.651), abs=0.03)


def test_standard_errors_are_those_of_new_rows(monkeypatch):
    monkeypatch.setattr(disentanglement, "scores", lambda z, v, seed: {"mig": mig(z, v)})  # the others take long

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        factors = torch.stack([torch.randint(size, (2000,), generator=generator) for size in SIZES], 1)
        return factors / torch.tensor(SIZES) + 0.2 * torch.randn(2000, 3, generator=generator), factors

    deviation = np.std([mig(*draw(seed)) for seed in range(100)], ddof=1)
    results = [compute_scores_with_errors(*draw(seed), parts=8)["mig"] for seed in range(20)]
    assert results[0]["value"] == mig(*draw(0))
    assert math.sqrt(np.mean([result["se"] ** 2 for result in results])) == pytest.approx(deviation, rel=0.25)


def test_wrong_input(factors):
    latents = factors.double()
    for wrong in [
        (latents[0], factors),
        (latents, factors[:, 0]),
        (latents[1:], factors),
        (latents, factors.float()),
        (latents.where(factors > 0, torch.nan), factors),
        (latents, factors[:, :1]),
        (latents, factors * torch.tensor([1, 0, 0])),
        (latents[:0], factors[:0]),
    ]:
        with pytest.raises(UserError, match="cannot be"):
            mig(*wrong)
    with pytest.raises(UserError, match="no two share a value"):
        beta_vae_score(latents[:4], torch.arange(8).view(4, 2))


def test_the_script_scores_a_run_and_a_report_scores_what_was_not(tmp_path, monkeypatch):
    """Whole commands, but for the number of images; the report measures only the run that was not measured yet."""
    sweep, small = tmp_path / "sweep", ["data=sprites", "data.image_size=32", "data.root=none"]
    run(
        *("-m", *small, "trainer=smoke", "trainer.limit_train_batches=2", "callbacks.figures_every_n_epochs=0"),
        *(
            "model.hidden_dims=[16]",
            "model.latent_dim=3",
            "objective=beta_tcvae,capacity_vae",
            f"hydra.sweep.dir={sweep}",
        ),
        cwd=tmp_path,
    )
    first, _ = sorted(path for path in sweep.iterdir() if path.is_dir())
    output = run(f"ckpt='{first}'", "images=600", "latents=sample", cwd=tmp_path, script="scripts/disentanglement.py")
    kept = json.loads((first / "disentanglement.json").read_text())
    assert kept["images"] == 600 and kept["latents"] == "sample"
    for name in disentanglement.SCORES:
        assert f"{name:<22}{kept[name]['value']:7.3f} ± {kept[name]['se']:.3f}" in output
    found = checkpoint.load(str(first), "")
    x, values = found.images("test", max_images=600)
    assert (values.amax(0) - values.amin(0)).tolist() == [2, 5, 39, 31, 31]  # from all over
    noise = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = found.vae.encode(x).rsample(noise)
    assert kept["mig"]["value"] == pytest.approx(mig(latents, values), rel=1e-6)

    measured = []

    def stub(z, v, seed):
        measured.append(z.shape)
        return {"mig": {"value": 0.75, "se": 0.1}}

    monkeypatch.setattr(evaluation, "compute_scores_with_errors", stub)
    report.write_report(sweep, tmp_path / "report", None, "mig", 0)
    assert measured == [(10_000, 3)]
    table = (tmp_path / "report" / "table.md").read_text()
    assert "MIG" in table and "0.75" in table and f"{kept['mig']['value']:.2f}" in table
    assert (tmp_path / "report" / "mig.png").exists()
    report.write_report(sweep, tmp_path / "report", None, "mig", 0)
    assert len(measured) == 1


def test_data_without_factors_are_a_sentence(tmp_path, data_root):
    train = ["trainer=smoke", "trainer.limit_train_batches=2", f"data.root={data_root}", "model=mlp_small"]
    run(*train, "hydra.run.dir=mnist", cwd=tmp_path)
    output = run("ckpt=mnist", cwd=tmp_path, script="scripts/disentanglement.py", code=1)
    assert "mnist has no factors" in output and "data=sprites" in output
    assert not (tmp_path / "mnist" / "disentanglement.json").exists()


def test_the_page(tmp_path):
    """Its commands in their order, on smaller nets and pictures, with a stub for the scores of 10,000 images."""

    def stub(z, v, seed):
        assert z.shape == (10_000, 10) and v.shape == (10_000, 5)
        return {"mig": {"value": 0.123, "se": 0.1}}

    for command in commands(PAGES["disentanglement.md"]):
        script, words = small(command)
        if script == "train.py":
            words += ["model.hidden_dims=[16]", "data.image_size=32"]
        prepare = (lambda: setattr(evaluation, "compute_scores_with_errors", stub)) if "report" in script else None
        output = run(*words, cwd=tmp_path, script=script, prepare=prepare)
        assert "Warning" not in output and "Traceback" not in output
        if "kl_decomposition" in command:
            assert {"mutual_information", "total_correlation", "dimension_wise_kl"} <= set(numbers_of(tmp_path))
    assert "0.12" in output and "MIG" in output and (tmp_path / "sweep_report" / "mig.png").exists()


def numbers_of(folder):
    """The names of the newest run's test numbers."""
    newest = max((folder / "runs").glob("*/metrics.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())["test"]
