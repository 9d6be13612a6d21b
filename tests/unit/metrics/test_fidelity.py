"""Every score against a closed form, another's implementation, or sets made to defeat it."""

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from betavae.data.datamodule import ImageDataModule
from betavae.data.datasets.mnist import load_mnist
from betavae.data.fingerprint import fingerprint
from betavae.data.image_set import ImageSet
from betavae.errors import UserError
from betavae.metrics import features, fidelity
from betavae.metrics.fidelity import (
    Moments,
    frechet_distance,
    kid,
    label_tv_distance,
    mean_and_se,
    moments,
    nearest,
    prdc,
)
from betavae.models.vae import VAE
from betavae.runtime import checkpoint
from betavae.sweeps import report
from betavae.sweeps.jobs import Job
from tests.conftest import DATA, MODEL, MODULE, REPO


def test_the_frechet_distance_of_two_normal_distributions():
    # Where covariances commute: |m_1 - m_2|^2 + the sum of (s_1 - s_2)^2, and it does not care about the axes.
    one, two = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.0, 0.5]).double()
    mean = torch.tensor([0.0, 1.0, -2.0]).double()
    turn = torch.linalg.qr(torch.randn(3, 3).double()).Q
    for axes in (torch.eye(3).double(), turn):
        a = Moments(axes @ mean, axes @ one.square().diag() @ axes.T)
        b = Moments(torch.zeros(3).double(), axes @ two.square().diag() @ axes.T)
        assert frechet_distance(a, b) == pytest.approx(5 + 4 + 4 + 0, rel=1e-9) == frechet_distance(b, a)
    # Where they do not commute: tr (AB)^(1/2) in two dimensions is (tr AB + 2 (det AB)^(1/2))^(1/2).
    a, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(), torch.tensor([[1.0, -0.5], [-0.5, 4.0]]).double()
    root = (torch.trace(a @ b) + 2 * torch.det(a @ b).sqrt()).sqrt()
    zero = torch.zeros(2).double()
    wanted = (a.trace() + b.trace() - 2 * root).item()
    assert frechet_distance(Moments(zero, a), Moments(zero, b)) == pytest.approx(wanted, rel=1e-9)


def test_moments_are_those_of_the_rows():
    x = torch.randn(50, 4) * 3 + 1
    found = moments(x)
    torch.testing.assert_close(found.mean, x.double().mean(0))
    centred = x.double() - x.double().mean(0)
    torch.testing.assert_close(found.covariance, centred.T @ centred / 49)
    assert frechet_distance(found, found) == pytest.approx(0, abs=1e-9)
    shifted = moments(x + 2)
    assert frechet_distance(found, shifted) == pytest.approx(16, rel=1e-5)


def test_a_matrix_root_says_the_same():
    from scipy.linalg import sqrtm

    a, b = moments(torch.randn(60, 5)), moments(torch.randn(80, 5) @ torch.randn(5, 5) + 0.3)
    root = torch.from_numpy(sqrtm((a.covariance @ b.covariance).numpy()).real)
    wanted = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(wanted.item(), rel=1e-6)


def test_the_kernel_distance_is_the_mean_over_all_pairs_of_different_images_and_unbiased():
    one, two = torch.randn(4, 3), torch.randn(5, 3)

    def kernel(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    wanted = sum(kernel(one[i], one[j]) for i in range(4) for j in range(4) if i != j) / 12
    wanted += sum(kernel(two[i], two[j]) for i in range(5) for j in range(5) if i != j) / 20
    wanted -= 2 * sum(kernel(a, b) for a in one for b in two) / 20
    assert kid(one, two) == pytest.approx(wanted, rel=1e-5)
    same = torch.tensor([kid(torch.randn(20, 3), torch.randn(20, 3)) for _ in range(400)])
    assert abs(same.mean()) < 4 * same.std() / 20 and same.min() < 0


def test_shares_of_identical_and_of_distant_sets():
    real = torch.randn(100, 4)
    # Of each point's own copy, and of its five nearest neighbours, each ball holds k + 1.
    assert prdc(real, real) == (1, 1, pytest.approx(6 / 5), 1)
    assert prdc(real, real + 100) == (0, 0, 0, 0)


def test_what_precision_and_recall_were_made_to_tell_apart():
    clumps = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    real = (clumps[:, None] + torch.rand(2, 50, 2)).flatten(0, 1)
    one_clump = torch.rand(100, 2)
    found = prdc(real, one_clump)  # a mode dropped
    assert found.precision > 0.8 and found.recall <= 0.5 and found.coverage <= 0.5
    found = prdc(one_clump, real)  # a mode invented
    assert found.precision <= 0.5 and found.recall > 0.8


def test_one_outlier_lifts_precision_and_not_density():
    """Naeem et al. 2020, figure 1: the ball of a lone real image holds fakes that are like none."""
    torch.manual_seed(3)
    real = torch.cat((torch.randn(200, 2) * 0.1, torch.tensor([[10.0, 0.0]])))
    fake = torch.randn(200, 2) * 0.3 + torch.tensor([6.0, 3.0])
    found = prdc(real, fake)
    assert found.precision == 1 and found.density == pytest.approx(1 / 5) and found.coverage < 0.01


def test_nearest_imbalance_and_summary():
    among = torch.tensor([[0.0], [1.0], [5.0]])
    distance, place = nearest(torch.tensor([[0.9], [4.0]]), among, 2)
    assert place.tolist() == [[1, 0], [2, 1]] and distance.flatten().tolist() == pytest.approx(
        [0.1, 0.9, 1, 3], abs=1e-5
    )
    assert label_tv_distance(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 2])) == pytest.approx(0.5)
    assert label_tv_distance(torch.tensor([2, 0]), torch.tensor([0, 2, 0, 2])) == 0
    assert label_tv_distance(torch.tensor([-1, -1]), torch.tensor([-1, 10**9])) == 0.5
    found = mean_and_se([{"a": 1.0}, {"a": 2.0}, {"a": 6.0}])["a"]
    assert found == {"mean": pytest.approx(3), "se": pytest.approx(math.sqrt(7) / math.sqrt(3))}


def test_distances_hold_far_from_zero():
    """Features of a common offset have the shares and the neighbors of the same features without it."""
    real, fake = torch.randn(2, 300, 8).mul(2**10).round() / 2**10  # so that the offset rounds none of them
    fake = torch.cat((fake, real[:20]))
    assert prdc(real + 512, fake + 512) == prdc(real, fake)
    assert prdc(real, fake).precision < 0.99
    for one, two in zip(nearest(fake + 512, real + 512, 3), nearest(fake, real, 3), strict=True):
        assert torch.equal(one, two)
    distance, place = nearest(fake + 512, real + 512)
    assert place[-20:, 0].tolist() == list(range(20)) and not distance[-20:].any()


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 28, 28), 784), ((1, 1, 2000), 1000), ((3, 2000, 1), 750), ((1, 3, 1001), 1002)]
)
def test_pixels_of_any_shape_are_averaged_down(shape, size):
    found = fidelity.pixel_features(torch.full((2, *shape), 0.25))
    assert found.shape == (2, size) and (found == 0.25).all()


def bars(n):
    """Bars across or down, at any place: two classes."""
    labels = torch.arange(n) % 2
    pixels = torch.zeros(n, 1, 12, 12, dtype=torch.uint8)
    for i in range(n):
        place = torch.randint(12, ()).item()
        pixels[i, 0, place] = 255
        if labels[i]:
            pixels[i, 0] = pixels[i, 0].T.clone()
    return ImageSet(pixels, labels)


def test_the_classifier_learns_is_kept_and_is_made_anew_for_other_data(tmp_path, capsys):
    train, test, path = bars(2000), bars(300), tmp_path / "new" / "bars.pt"
    model, accuracy = features.load_or_train(path, train, test)
    assert accuracy > 0.97 and "once" in capsys.readouterr().out
    assert not model.training and not any(weights.requires_grad for weights in model.parameters())
    x = test.pixels.float() / 255
    found = model.features(x)
    assert found.shape == (300, features.FEATURE_DIM)
    assert (model.classify(found) == test.labels).float().mean().item() == pytest.approx(accuracy)
    again, said = features.load_or_train(path, train, test)
    assert said == accuracy and torch.equal(again.features(x), found) and not capsys.readouterr().out
    features.load_or_train(path, bars(200), test)
    assert "once" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 48), (3, 5, 9), (1, 1, 2000), (3, 1, 1)])
def test_a_classifier_takes_any_shape(shape):
    assert features.Classifier(shape, torch.arange(7))(torch.rand(2, *shape)).shape == (2, 7)


def test_too_few_images_teach_no_classifier():
    with pytest.raises(UserError, match="150 images are too few to learn from: 200"):
        features.train(bars(150))


def test_the_command(tmp_path, data_root, capsys, monkeypatch):
    model = MODEL | {"hidden_dims": [16], "latent_dim": 3}
    state = {f"vae.{key}": value for key, value in VAE(**model).state_dict().items()}
    content = {"betavae_format": checkpoint.FORMAT, "hyper_parameters": MODULE | {"model": model}, "state_dict": state}
    content |= {"datamodule_hyper_parameters": DATA | {"root": data_root}}
    checkpoint.save_checkpoint(content, tmp_path / "lone.ckpt")
    # A classifier that knows nothing saves the minute.
    classifier = features.Classifier((1, 28, 28), torch.arange(10))
    kept = tmp_path / "runs" / "features" / "mnist.pt"
    made = {"state": classifier.state_dict(), "accuracy": 0.1}
    data = [fingerprint(load_mnist(Path(data_root), split), labels=True) for split in ("train", "test")]
    held = {"data": data, "shape": [1, 28, 28], "version": 2}
    features.load_or_compute(kept, held, lambda: made)
    command = runpy.run_path(str(REPO / "scripts" / "fidelity.py"))["main"].task
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = {"ckpt": "~/lone.ckpt", "runs": "~/runs", "n": 60, "repeats": 2, "reference": 500}
    command(asked | {"sampler": "gaussian"})
    output = capsys.readouterr().out
    result = json.loads((tmp_path / "fidelity.json").read_text())
    assert result["best"] == "gaussian" and result["fid"] == result["gaussian"]["fid"] and result["images"] == 60
    rows = {name: result[name] for name in ("gaussian", "reconstructions", "test images")}
    assert all(row["fid"]["se"] > 0 and 0 <= row["recall"]["mean"] <= 1 for row in rows.values())
    # Untrained, it draws nothing like a digit.
    assert rows["test images"]["pixel_fid"]["mean"] < rows["gaussian"]["pixel_fid"]["mean"]
    assert rows["test images"]["precision"]["mean"] > 0.5 > rows["gaussian"]["recall"]["mean"]
    assert f"{result['fid']['mean']:.4g} ± {result['fid']['se']:.1g}" in output
    assert (tmp_path / "figures" / "fidelity.png").stat().st_size > 1000
    assert len(list(tmp_path.glob("sampler_gaussian_*.pt"))) == 1


@pytest.fixture
def few(tmp_path):
    """A command that scores an untrained model of 120 bars."""
    images = bars(160)
    np.savez(tmp_path / "bars.npz", images=images.pixels.numpy(), labels=images.labels.numpy())
    model = MODEL | {"hidden_dims": [16], "latent_dim": 2, "image_shape": [1, 12, 12]}
    data = DATA | {"name": "arrays", "root": str(tmp_path / "bars.npz"), "batch_size": 10}
    content = {"betavae_format": checkpoint.FORMAT, "hyper_parameters": MODULE | {"model": model}}
    content["state_dict"] = {f"vae.{key}": value for key, value in VAE(**model).state_dict().items()}
    content["datamodule_hyper_parameters"] = data | {"validation_size": 0.1, "test_size": 40}
    datamodule = ImageDataModule(**content["datamodule_hyper_parameters"])
    datamodule.setup()
    content["fingerprints"] = datamodule.fingerprints
    checkpoint.save_checkpoint(content, tmp_path / "lone.ckpt")
    command = runpy.run_path(str(REPO / "scripts" / "fidelity.py"))["main"].task

    def score(**settings):
        command({"ckpt": f"{tmp_path}/lone.ckpt", "runs": str(tmp_path), "repeats": 2} | settings)
        return json.loads((tmp_path / "fidelity.json").read_text())

    return score


def test_few_images_are_scored_by_their_pixels(few, tmp_path, capsys):
    result = few(sampler="knn")
    assert "120 training images are too few to learn features from" in capsys.readouterr().out
    assert result["images"] == 20 and "features" not in result and "imbalance" not in result["knn"]
    assert all(math.isfinite(cell["mean"]) for cell in result["knn"].values())
    assert not (tmp_path / "features").exists()
    for wrong in ({"reference": 5}, {"repeats": 5}):
        with pytest.raises(UserError, match="10 are the least"):
            few(**wrong)


def test_another_samplers_numbers_come_beside_those_made_in_the_same_way(few, tmp_path, capsys):
    first = few(sampler="gaussian")
    both = few(sampler="prior")
    assert both["gaussian"] == first["gaussian"] and both["test images"] == first["test images"]
    assert both["best"] == min("prior", "gaussian", key=lambda name: both[name]["fid"]["mean"])
    assert both["fid"] == both[both["best"]]["fid"]
    assert few(sampler="gaussian") == both and "dropped" not in capsys.readouterr().out
    alone = few(sampler="prior", n=15)
    assert "numbers of gaussian are dropped: made with another images" in capsys.readouterr().out
    assert "gaussian" not in alone and alone["best"] == "prior" and alone["fid"] == alone["prior"]["fid"]
    # A checkpoint of the same name that is another.
    content = checkpoint.read_checkpoint(tmp_path / "lone.ckpt")
    content["state_dict"] = {key: value + 0.01 for key, value in content["state_dict"].items()}
    checkpoint.save_checkpoint(content, tmp_path / "lone.ckpt")
    assert "prior" not in few(sampler="gaussian", n=15)


def test_a_sweep_report_knows_what_was_measured_in_its_jobs(tmp_path):
    measured = {"made_by": "betavae", "seed": 0, "best": "mixture", "fid": {"mean": 1.5, "se": 0.1}}
    (tmp_path / "fidelity.json").write_text(json.dumps(measured | {"mixture": {"fid": {"mean": 1.5, "se": 0.1}}}))
    (tmp_path / "evaluation.json").write_text(json.dumps({"neg_elbo": {"mean": 7.0}, "nll_10": {"mean": 6.5}}))
    job = Job(tmp_path, "finished", {}, {"test": {"neg_elbo": 7.25}, "seconds": 3})
    wanted = {"neg_elbo": 7.25, "nll_10": 6.5, "fid": 1.5, "mixture.fid": 1.5, "seconds": 3}
    assert report.job_metrics(job) == wanted
    setting = report.SettingGroup({"beta": "1"}, [job])
    assert setting.mean_sd("fid")[0] == 1.5
    assert report.table_metrics([setting]) == ["neg_elbo", "fid", "nll_10", "seconds"]
    assert "mixture.fid" in report.available_metrics([setting])
