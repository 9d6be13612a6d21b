"""Tests of anomaly scores, detectors, their reports and scripts/detect.py."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.mixture import GaussianMixture
from sklearn.svm import OneClassSVM
from torch import distributions as D
from torchvision import datasets

from betavae.applications.anomalies import detector, report
from betavae.applications.anomalies import scores as scoring
from betavae.applications.anomalies.detector import (
    FAST_SCORES,
    SLOW_SCORES,
    Detector,
    compute_p_values,
    false_alarm_rate,
)
from betavae.data.datasets.mnist import load_mnist
from betavae.errors import UserError
from betavae.models.likelihoods import LIKELIHOODS
from betavae.models.vae import VAE
from betavae.objectives import elbo
from betavae.plotting import make_grid
from betavae.runtime import checkpoint
from tests.commands import run, run_in_child
from tests.conftest import DATA, MODEL, MODULE
from tests.unit.applications.conftest import save_vae

FASHION = Path("/tmp/fashion")


def make_vae(likelihood="bernoulli", shape=(1, 6, 6), hidden=(16,)):
    torch.manual_seed(0)
    return VAE("mlp", list(hidden), 3, "relu", likelihood, shape).requires_grad_(False)


@pytest.fixture
def linear():
    """A linear-Gaussian model whose encoder is the exact posterior, with p(x) in closed form."""
    vae = make_vae("gaussian", (1, 2, 3), ()).double()
    q, _ = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64))
    weight, bias = (
        q * torch.tensor([0.5, 1.0, 2.0]),
        torch.rand(6).double(),
    )  # Orthogonal, so the posterior is diagonal.
    vae.likelihood.log_scale.fill_(math.log(0.3))
    vae.decoder[0].weight.copy_(weight)
    vae.decoder[0].bias.copy_(bias)
    variance = 1 / (1 + weight.square().sum(0) / 0.3**2)
    to_mean = variance[:, None] * weight.T / 0.3**2
    vae.encoder[-1].weight.zero_()
    vae.encoder[-1].weight[:3] = to_mean
    vae.encoder[-1].bias.copy_(torch.cat((-to_mean @ bias, variance.log())))
    return vae, D.MultivariateNormal(bias, weight @ weight.T + 0.3**2 * torch.eye(6).double())


@pytest.mark.forked
def test_exact_posterior_has_tight_bounds_and_no_regret(linear):
    vae, marginal = linear
    x = torch.rand(5, 1, 2, 3).double()
    exact = -marginal.log_prob(x.flatten(1))
    torch.testing.assert_close(scoring.neg_elbo(vae, x), exact)
    torch.testing.assert_close(scoring.nll(vae, x), exact)
    assert scoring.likelihood_regret(vae, x).min() >= 0
    assert scoring.likelihood_regret(vae, x).max() < 1e-9


@pytest.mark.forked
def test_regret_is_the_gap_of_a_wrong_encoder(linear):
    vae, marginal = linear
    vae.encoder[-1].bias.add_(torch.tensor([0.3, -0.2, 0.1, 0.5, 0.0, -0.5]))
    x = torch.rand(5, 1, 2, 3).double()
    gap = scoring.neg_elbo(vae, x) + marginal.log_prob(x.flatten(1))
    assert gap.min() > 0.3
    torch.testing.assert_close(scoring.likelihood_regret(vae, x, steps=300, lr=0.03), gap, rtol=1e-3, atol=1e-3)
    assert torch.equal(scoring.likelihood_regret(vae, x, steps=0), torch.zeros(5).double())


@pytest.mark.forked
def test_score_of_an_image_does_not_depend_on_the_others(linear):
    vae, x = linear[0], torch.rand(5, 1, 2, 3).double()
    for score in (scoring.neg_elbo, scoring.nll, scoring.likelihood_regret, scoring.statistics):
        torch.testing.assert_close(score(vae, x)[3:4], score(vae, x[3:4]))


def test_statistics_match_their_definitions():
    vae, x = make_vae(), torch.rand(4, 1, 6, 6)
    mean, logvar = vae.encode(x)
    noise = scoring.antithetic_noise(vae, 4)
    torch.testing.assert_close(noise.square().mean(0), torch.ones(1, 3))
    torch.testing.assert_close(noise.sum(0), torch.zeros(1, 3))
    logits = vae.decode_params(mean + (logvar / 2).exp() * noise)
    recon = -D.Bernoulli(logits=logits, validate_args=False).log_prob(x).sum((2, 3, 4)).mean(0)
    kl = D.kl_divergence(D.Normal(mean, (logvar / 2).exp()), D.Normal(torch.zeros(3), torch.ones(3))).sum(1)
    picture = vae.reconstruct(x)
    divergence = D.kl_divergence(D.Bernoulli(x.clamp(1e-3, 0.999)), D.Bernoulli(picture)).sum((1, 2, 3))
    by_hand = [recon + kl, recon, kl, (mean**2).sum(1), logvar.exp().sum(1), logvar.sum(1)]
    by_hand += [((x - picture) ** 2).sum((1, 2, 3)), divergence]
    torch.testing.assert_close(scoring.statistics(vae, x), torch.stack(by_hand, 1).double(), rtol=1e-4, atol=1e-4)
    terms = elbo(vae, x, noise.expand(-1, 4, -1), 1.0)
    torch.testing.assert_close(scoring.neg_elbo(vae, x), terms.recon + terms.kl.sum(1))


def test_perfect_reconstruction_has_no_unexplained_nats():
    x = torch.linspace(0, 1, 50).view(2, 1, 5, 5)
    torch.testing.assert_close(scoring.unexplained_nats(x, x), torch.zeros(2), atol=1e-5, rtol=0)
    assert (scoring.unexplained_nats(x, (x + 0.1).clamp(max=1)) > 0.3).all()
    assert scoring.unexplained_nats(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).isfinite().all()


def test_kernel_density_equals_scipy():
    values, at = torch.randn(200, 2).double() * torch.tensor([1.0, 50.0]), torch.randn(30, 2).double() * 3
    ours = scoring.kernel_density(values, at)
    for column in range(2):
        theirs = stats.gaussian_kde(values[:, column].numpy()).logpdf(at[:, column].numpy())
        np.testing.assert_allclose(ours[:, column], theirs, rtol=1e-9)
    assert scoring.kernel_density(values, torch.full((1, 2), 1e6).double()).isfinite().all()


def test_svm_decision_equals_scikit_learn():
    rows, at = torch.randn(300, 4).double(), 3 * torch.randn(50, 4).double()
    svm = OneClassSVM(nu=0.1, gamma=0.2).fit(rows.numpy())
    arrays = {"vectors": torch.from_numpy(svm.support_vectors_), "weights": torch.from_numpy(svm.dual_coef_[0])}
    ours = scoring.svm_decision({**arrays, "gamma": 0.2, "offset": svm.intercept_[0]}, at)
    np.testing.assert_allclose(ours, svm.decision_function(at.numpy()), rtol=1e-7, atol=1e-9)


def test_mixture_log_density_equals_scipy():
    rows, at = torch.randn(500, 3).double(), 2 * torch.randn(20, 3).double()
    found = GaussianMixture(4, random_state=0).fit(rows.numpy())
    names = {"weights": found.weights_, "means": found.means_, "roots": found.precisions_cholesky_}
    ours = scoring.mixture_log_density({name: torch.from_numpy(part) for name, part in names.items()}, at)
    parts = zip(found.weights_, found.means_, found.covariances_, strict=True)
    np.testing.assert_allclose(ours, np.log(sum(w * stats.multivariate_normal(m, c).pdf(at) for w, m, c in parts)))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_pixel_surprise_sums_to_recon_and_stays_in_its_pixel(likelihood):
    vae, x = make_vae(likelihood, (3, 4, 5)), torch.rand(2, 3, 4, 5)
    params = vae.decode_params(vae.encode(x).mean)
    surprise = scoring.pixel_surprise(vae, x)
    assert surprise.shape == (2, 4, 5)
    torch.testing.assert_close(surprise.sum((1, 2)), -vae.likelihood.log_prob(x, params))
    one = [-vae.likelihood.log_prob(x[..., 1:2, 3:4], params[..., 1:2, 3:4])]
    torch.testing.assert_close(surprise[:, 1, 3], one[0])


def test_p_values_match_their_definition():
    calibration, scores = torch.randint(0, 20, (50,)).double(), torch.randint(-1, 22, (30,)).double()
    by_hand = [(1 + sum(c >= s for c in calibration.tolist())) / 51 for s in scores.tolist()]
    assert compute_p_values(scores, calibration.sort().values).tolist() == by_hand
    assert (
        compute_p_values(torch.tensor([torch.nan, torch.inf]).double(), calibration.sort().values).tolist()
        == [1 / 51] * 2
    )


def test_p_values_of_exchangeable_scores_are_uniform():
    draws = torch.randn(20_000, 20, generator=torch.Generator().manual_seed(0)).double()
    found = torch.cat([compute_p_values(row[:1], row[1:].sort().values) for row in draws])
    counts = (20 * found).round().long().bincount(minlength=21)[1:]
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3  # 1/20, 2/20, ..., 1: alike


@pytest.mark.parametrize(("alpha", "n", "new_images"), [(0.01, 99, None), (0.05, 250, None), (0.1, 30, 40)])
def test_false_alarm_rate_is_as_predicted(alpha, n, new_images):
    predicted = false_alarm_rate(alpha, n, new_images)
    assert predicted.mean <= alpha
    rank = math.floor(round(alpha * (n + 1), 6))
    exact = stats.beta(rank, n + 1 - rank) if new_images is None else stats.betabinom(new_images, rank, n + 1 - rank)
    bounds = [exact.ppf(share) / (new_images or 1) for share in (0.025, 0.975)]
    assert [predicted.low, predicted.high] == pytest.approx(bounds)
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(1000):
        calibration = torch.rand(n, generator=generator).double().sort().values
        # Scores are uniform: the rate is exactly what is above the lowest score that is flagged.
        unseen = torch.linspace(0, 1, 20_001) if new_images is None else torch.rand(new_images, generator=generator)
        rates.append((compute_p_values(unseen.double(), calibration) <= alpha).double().mean().item())
    assert np.mean(rates) == pytest.approx(predicted.mean, rel=0.08)
    inside = np.mean([predicted.low - 1e-4 <= rate <= predicted.high + 1e-4 for rate in rates])
    assert 0.93 < inside < (0.97 if new_images is None else 1)


def test_invalid_alpha_is_rejected():
    assert false_alarm_rate(0.01, 99).mean == 0.01
    with pytest.raises(UserError, match=r"alpha=0.01 needs at least 99 validation images, and there are 98"):
        false_alarm_rate(0.01, 98)
    for alpha in (0.0, 1.0, -1.0):
        with pytest.raises(UserError, match=f"alpha={alpha} is invalid: expected a number above 0 and below 1"):
            false_alarm_rate(alpha, 100)


def blobs(n, seed):
    """Draw images of one bright blob near the middle, `(n, 1, 28, 28)` uint8."""
    generator = torch.Generator().manual_seed(seed)
    center = 14 + 3 * torch.randn(n, 2, 1, 1, generator=generator)
    grid = torch.arange(28.0)
    squares = (grid[:, None] - center[:, 0]) ** 2 + (grid - center[:, 1]) ** 2
    return (255 * torch.exp(-squares / 20)).byte().unsqueeze(1)


def load_fashion(train):
    return datasets.FashionMNIST(str(FASHION), train=train).data.unsqueeze(1)


IMAGES = {
    "mnist": lambda root: (load_mnist(root, "train").pixels[::20], load_mnist(root, "test").pixels[::10]),
    "fashion": lambda root: (load_fashion(True)[::20], load_fashion(False)[::10]),
    "blobs": lambda root: (blobs(3000, 0), blobs(1000, 1)),
}


def fit_detector(x):
    torch.manual_seed(0)
    vae = VAE("mlp", [64], 8, "relu", "bernoulli", (1, 28, 28))
    optimizer = torch.optim.Adam(vae.parameters(), 3e-3)
    for batch in [x[:2000].float() / 255] * 4:
        for part in batch.split(100):
            optimizer.zero_grad()
            elbo(vae, part, torch.randn(1, 100, 8), 1.0).loss.backward()
            optimizer.step()
    return Detector.fit(vae, x[:2000], x[2000:])


@pytest.fixture(scope="module")
def blob_detector(tmp_path_factory):
    file = tmp_path_factory.mktemp("detector") / "detector.pt"
    run_in_child(lambda: torch.save(fit_detector(blobs(3000, 0)), file))
    return torch.load(file, weights_only=False)


has_fashion = pytest.mark.skipif(not (FASHION / "FashionMNIST").is_dir(), reason=f"no FashionMNIST in {FASHION}")


@pytest.mark.forked
@pytest.mark.parametrize("name", [pytest.param(n, marks=has_fashion if n == "fashion" else ()) for n in IMAGES])
def test_new_images_have_the_predicted_false_alarm_rate(name, data_root):
    # Shuffled, since the official test images have other writers and are not quite exchangeable with training images.
    pool = torch.cat(IMAGES[name](Path(data_root)))
    pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))]
    detector, new_images = fit_detector(pool[:3000]), pool[3000:]
    for score in FAST_SCORES:
        found = detector.compute_p_values(new_images, score)
        for alpha in (0.01, 0.1):
            # The interval holds all of these 24 counts with a probability of 199 in 200.
            rank = int(alpha * 1001)
            low, high = stats.betabinom(len(new_images), rank, 1001 - rank).interval(1 - 0.005 / 24)
            assert low <= int((found <= alpha).sum()) <= high, (score, alpha)
    assert (detector.compute_p_values(255 - new_images[:100]) <= 0.1).double().mean() > 0.7


@pytest.mark.forked
def test_saved_detector_computes_the_same_numbers(blob_detector, tmp_path):
    torch.save(blob_detector.state, tmp_path / "detector.pt")
    again = Detector(blob_detector.vae, torch.load(tmp_path / "detector.pt", weights_only=True))
    x = blobs(40, 2)
    names = (*FAST_SCORES, *SLOW_SCORES)
    before, after = blob_detector.compute_scores(x, names), again.compute_scores(x.float() / 255, names)
    assert list(before) == list(names)
    for name in names:
        assert before[name].shape == (40,)
        torch.testing.assert_close(before[name], after[name])
    assert torch.equal(blob_detector.compute_p_values(x), again.compute_p_values(x))
    torch.testing.assert_close(blob_detector.compute_heat_maps(x), again.compute_heat_maps(x))


def test_fit_takes_evenly_spaced_images_of_many(blob_detector, monkeypatch):
    x = blobs(1000, 4)
    monkeypatch.setattr(detector, "MAX_FIT_IMAGES", 400)
    found = Detector.fit(blob_detector.vae, x, blobs(100, 5)).state
    every_third = scoring.statistics(blob_detector.vae, x[::3].float() / 255)
    torch.testing.assert_close(found["kernels"], every_third)
    torch.testing.assert_close(found["center"], every_third.mean(0))


def test_low_statistic_is_as_anomalous_as_high(blob_detector, monkeypatch):
    kernels = torch.linspace(-1, 1, 501)[:, None].repeat(1, 8).double()
    detector = Detector(blob_detector.vae, blob_detector.state | {"kernels": kernels})
    rows = torch.zeros(3, 8).double()
    rows[0, 4], rows[1, 4] = -5, 5
    monkeypatch.setattr(scoring, "statistics", lambda vae, x, is_unit: rows)
    below, above, typical = detector.compute_scores(blobs(3, 2), ("dose",))["dose"].tolist()
    assert below == pytest.approx(above)
    assert below > typical + 100


def test_combined_score_equals_scipy(blob_detector):
    state, x = blob_detector.state, torch.cat((blobs(20, 2), 255 - blobs(20, 3)))
    means, unexplained = scoring.latent_and_unexplained(blob_detector.vae, x.float() / 255, state["background"])
    assert state["background"] == 0
    reconstruction = blob_detector.vae.reconstruct(x.float() / 255)
    by_hand = scoring.unexplained_nats(x.float() / 255, reconstruction) / (x.float() / 255).sum((1, 2, 3)).clamp(min=1)
    torch.testing.assert_close(unexplained, by_hand.double(), rtol=1e-4, atol=1e-4)
    latent = -scoring.mixture_log_density(state["mixture"], means / state["spread"])
    tails = [
        -stats.norm.logsf(part.detach().numpy(), *moments)
        for part, moments in zip((latent, unexplained), state["surprises"].tolist(), strict=True)
    ]
    found = blob_detector.compute_scores(x, ("combined",))["combined"]
    np.testing.assert_allclose(found, 1.5 * tails[0] + tails[1], rtol=1e-3)


def test_heat_map_is_standardized_and_localizes(blob_detector):
    maps = blob_detector.compute_heat_maps(blobs(3000, 0)[:2000])
    sd = blob_detector.state["pixel_sd"]
    wide = sd > 0.1 * sd.square().mean().sqrt()
    assert wide.sum() > 100
    torch.testing.assert_close(maps.mean(0), torch.zeros(28, 28).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(maps.std(0)[wide], torch.ones(int(wide.sum())).double(), atol=1e-3, rtol=0)
    assert (maps.std(0) < 1 + 1e-3).all()
    marked = blobs(1, 5)
    marked[0, 0, 2:4, 3:5] = 255
    assert blob_detector.compute_heat_maps(marked)[0, 2:4, 3:5].min() > 10


def test_flagged_images_are_above_reconstruction_and_heat_map(blob_detector):
    from matplotlib import colormaps

    x = torch.cat((blobs(30, 2), 255 - blobs(9, 3)))
    result = report.score_images(blob_detector, x, "combined", 0.001)
    assert result.flagged.tolist() == [False] * 30 + [True] * 9
    strangest_first = 30 + result.scores["combined"][30:].argsort(descending=True)
    grid = report.draw_flagged_images(blob_detector, x, result)
    assert grid.row_labels == ["image", "reconstruction", "heat map"] * 2
    picture = make_grid(grid.images, grid.columns).permute(1, 2, 0).numpy()
    assert picture.shape == (6 * 30 + 2, 8 * 30 + 2, 3)
    for place, index in enumerate(strangest_first.tolist()):
        image = x[index : index + 1].float() / 255
        heat = colormaps["coolwarm"]((blob_detector.compute_heat_maps(x[index : index + 1])[0].numpy() + 5) / 10)[
            ..., :3
        ]
        expected = [image.expand(-1, 3, -1, -1), blob_detector.vae.reconstruct(image).expand(-1, 3, -1, -1)]
        for row, tile in enumerate([*(part[0].permute(1, 2, 0).numpy() for part in expected), heat]):
            top, left = (place // 8 * 3 + row) * 30 + 2, place % 8 * 30 + 2
            np.testing.assert_allclose(picture[top : top + 28, left : left + 28], tile, atol=1e-4)
    none = result._replace(flagged=torch.zeros(39, dtype=torch.bool))
    shown = make_grid(report.draw_flagged_images(blob_detector, x, none).images, 8).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(shown, picture[:92])


def test_invalid_scores_and_no_images_are_rejected(blob_detector):
    with pytest.raises(UserError, match="score=dosis is invalid: expected one of neg_elbo, dose"):
        blob_detector.compute_scores(blobs(2, 0), ("dosis",))
    with pytest.raises(
        UserError, match=r"score=regret is invalid: expected one of neg_elbo, dose, dose_svm, combined$"
    ):
        blob_detector.compute_p_values(blobs(2, 0), "regret")
    with pytest.raises(UserError, match="no images"):
        blob_detector.compute_scores(blobs(2, 0)[:0])


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
def test_detector_is_fitted_to_images_as_the_model_saw_them(tmp_path, data_root, binarize, monkeypatch):
    seen = {}

    def stub(vae, train, validation, names, train_labels, validation_labels):
        assert len(train_labels) == len(train) and len(validation_labels) == len(validation)
        seen.update(train=train, validation=validation)
        return Detector(vae, {"calibration": {}})

    monkeypatch.setattr(report.Detector, "fit", stub)
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    run = checkpoint.TrainedRun(VAE(**MODEL), path, MODULE, DATA | {"root": data_root, "binarize": binarize})
    report.load_or_fit_detector(run)
    levels = {name: len(part[:300].unique()) for name, part in seen.items()}
    assert len(seen["train"]) == 20_000 and (set(levels.values()) == {2}) == (binarize == "dynamic")


@pytest.fixture
def ckpt(tmp_path, data_root):
    vae = VAE("mlp", [16], 3, "relu", "bernoulli", [1, 28, 28])
    return save_vae(tmp_path / "run.ckpt", vae, {"hidden_dims": [16], "latent_dim": 3}, {"root": data_root})


def detect(tmp_path, *args, code=0):
    def fit_fewer_images():
        report.MAX_FIT_IMAGES = 1000

    words = ("ckpt=run.ckpt", *args)
    return run(*words, cwd=tmp_path, script="scripts/detect.py", prepare=fit_fewer_images, code=code)


def test_command_checks_its_settings_before_it_writes(ckpt, tmp_path):
    np.savez(tmp_path / "labeled.npz", images=blobs(60, 0).numpy(), labels=np.arange(60) % 2)
    np.save(tmp_path / "x.npy", blobs(60, 0).numpy())
    text = detect(tmp_path, "images=x.npy", "out=.", code=1)
    assert "is not empty and not a report of betavae" in text
    text = detect(tmp_path, "images=x.npy", "inliers=[0]", code=1)
    assert "inliers=[0] is invalid: expected labels of some of the images, not of all (labels found: none)" in text
    text = detect(tmp_path, "images=labeled.npz", "inliers=[0,zero]", code=1)
    assert "inliers=[0, 'zero'] is invalid: no image has the label zero (labels found: 0, 1)" in text
    assert not list(tmp_path.glob("*.pt"))
    text = detect(tmp_path, "images=x.npy", "alpha=0.0001", code=1)
    assert "alpha=0.0001 needs at least 9999 validation images, and there are 5000" in text
    assert not (tmp_path / "anomalies").exists()
    text = detect(tmp_path, "images=labeled.npz", "inliers=[0]")
    assert "AUROC" in text and "fitting" not in text and (tmp_path / "anomalies" / "roc.png").exists()
    assert "fitted to some of these images" not in detect(tmp_path, "images=x.npy")
    assert "fitted to some of these images" in detect(tmp_path, "images=validation", "out=fitted")
    assert {path.stem for path in (tmp_path / "anomalies").glob("*.png")} == {"histogram", "extremes", "where"}


def test_root_of_another_data_set_is_not_the_models_root(ckpt, tmp_path):
    """Otherwise MNIST would be unpacked beside FashionMNIST, and the detector fitted again each time."""
    if not (FASHION / "FashionMNIST").is_dir():
        pytest.skip(f"{FASHION} has no FashionMNIST")
    (tmp_path / "fashion").mkdir()
    (tmp_path / "fashion" / "FashionMNIST").symlink_to(FASHION / "FashionMNIST")
    text = detect(tmp_path, "images=fashion_mnist", "data_root=fashion")
    assert "of 10,000 images" in text and "fitting" in text
    assert [path.name for path in (tmp_path / "fashion").iterdir()] == ["FashionMNIST"]
    assert "fitting" not in detect(tmp_path, "images=test")


def test_histogram_shows_all_images_despite_an_extreme_one(blob_detector):
    x = blobs(40, 2)
    result = report.score_images(blob_detector, x, "combined", 0.01)
    for strange in (1e6, torch.nan, -1e6):
        result.scores["combined"][0] = strange
        axes = report.draw_histogram(blob_detector, result).axes[0]
        ordinary = blob_detector.state["calibration"]["combined"]
        low, high = axes.get_xlim()
        assert low < ordinary.min() and ordinary.max() < high < low + 2.5 * (ordinary.max() - ordinary.min())
        for polygon in axes.patches:  # of density: every image counts
            x_, y = polygon.get_xy().T
            assert (np.diff(x_) * (y[1:] + y[:-1]) / 2).sum() == pytest.approx(1)


def test_table_escapes_names_that_are_not_utf8(blob_detector, tmp_path):
    result = report.score_images(blob_detector, blobs(2, 2), "combined", 0.01)
    report.write_table(result, ["a.png", "b\udcff.png"], None, [("c.png", "empty")], tmp_path / "scores.csv")
    rows = (tmp_path / "scores.csv").read_text().splitlines()
    assert rows[2].startswith("b\\udcff.png,,") and rows[3] == "c.png,,,,,,,not read: empty,"


def test_fit_rejects_too_few_and_too_similar_images(blob_detector, monkeypatch):
    vae = blob_detector.vae
    with pytest.raises(UserError, match=r"19 training images are too few .* at least 20"):
        Detector.fit(vae, blobs(19, 0), blobs(30, 1))
    with pytest.raises(UserError, match="the training images are too similar"):
        Detector.fit(vae, blobs(1, 0).expand(50, -1, -1, -1), blobs(30, 1))
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r'needs scikit-learn: pip install -e "\.\[evaluation\]"'):
        Detector.fit(vae, blobs(50, 0), blobs(30, 1))
