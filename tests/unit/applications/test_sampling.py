"""Tests of the latent samplers and of scripts/sample.py."""

from types import SimpleNamespace

import pytest
import torch

from betavae.applications import sampling
from betavae.applications.sampling import SAMPLERS, Mixture, PriorSampler, load_or_fit_sampler, sample_posterior
from betavae.data.image_set import ImageSet
from betavae.data.scaling import Scaling
from betavae.errors import UserError
from betavae.models.priors import Mixture as MixturePrior
from betavae.models.priors import StandardNormal
from betavae.models.vae import VAE
from betavae.runtime import checkpoint
from betavae.storage.files import hash_file
from tests.commands import run as run_command
from tests.unit.applications.conftest import save_vae


@pytest.fixture
def vae():
    return VAE("mlp", [16], 2, "relu", "bernoulli", [1, 28, 28]).requires_grad_(False)


def draw(sampler, n=40_000):
    return sampler.sample(n, torch.Generator().manual_seed(1))


def test_mixture_draws_from_its_components():
    turn = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    mixture = Mixture(torch.tensor([0.2, 0.8]), torch.tensor([[-50.0, 0.0], [50.0, 3.0]]), torch.stack((turn, turn.T)))
    z = draw(mixture)
    left = z[:, 0] < 0
    assert left.float().mean() == pytest.approx(0.2, abs=0.01)
    torch.testing.assert_close(z[left].mean(0), mixture.means[0], atol=0.08, rtol=0)
    torch.testing.assert_close(z[left].T.cov(), turn @ turn.T, atol=0.15, rtol=0)
    torch.testing.assert_close(z[~left].T.cov(), turn.T @ turn, atol=0.15, rtol=0)
    assert torch.equal(z, draw(mixture)) and not torch.equal(z, mixture.sample(len(z)))


def test_standard_prior_draws_the_noise_of_a_normal_sampler():
    standard = Mixture(torch.ones(1), torch.zeros(1, 3), torch.eye(3)[None])
    assert torch.equal(draw(PriorSampler(StandardNormal(3))), draw(standard))


def test_mixture_prior_with_one_weight_gives_that_component():
    prior = MixturePrior(2, 3)
    with torch.no_grad():
        prior.mean.copy_(torch.tensor([[-50.0, 0.0], [1.0, 2.0], [50.0, 9.0]]))
        prior.log_scale.copy_(torch.tensor([0.5, 2.0]).log().expand(3, 2))
        prior.log_weights.copy_(torch.tensor([-1e4, 0.0, -1e4]))
        z = draw(PriorSampler(prior))
    torch.testing.assert_close(z.mean(0), torch.tensor([1.0, 2.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(z.T.cov(), torch.diag(torch.tensor([0.25, 4.0])), atol=0.06, rtol=0)
    prior.log_weights.data = torch.tensor([0.2, 0.5, 0.3]).log()
    z = prior.transform(torch.zeros(5, 2), torch.tensor([0.0, 0.19, 0.21, 0.69, 0.9999]))
    assert torch.equal(z, prior.mean[[0, 0, 1, 1, 2]])


def test_gaussian_matches_moments_and_mixture_matches_clusters():
    clusters = torch.tensor([[6.0, 0.0], [-6.0, 0.0], [0.0, 6.0]])
    z = (clusters[:, None] + torch.randn(3, 1000, 2) * torch.tensor([0.5, 0.1])).flatten(0, 1)
    draws = draw(SAMPLERS["gaussian"](z))
    torch.testing.assert_close(draws.mean(0), z.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(draws.T.cov(), z.T.cov(), atol=0.4, rtol=0)
    assert (torch.cdist(draws, clusters).min(1).values > 3).float().mean() > 0.3  # It fills the middle.
    draws = draw(SAMPLERS["mixture"](z))
    distance, cluster = torch.cdist(draws, clusters).min(1)
    assert (distance < 2.5).all()
    assert torch.bincount(cluster, minlength=3).div(len(draws)).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)
    torch.testing.assert_close((draws - clusters[cluster]).std(0), torch.tensor([0.5, 0.1]), atol=0.02, rtol=0)


def test_knn_is_uniform_between_neighbors(monkeypatch):
    monkeypatch.setattr(sampling, "NUM_NEIGHBORS", 1)
    pairs = torch.tensor([[0.0, 0.0], [1.0, 2.0], [100.0, 0.0], [100.0, 4.0]])
    z = draw(SAMPLERS["knn"](pairs), 4000)
    near, far = z[z[:, 0] < 50], z[z[:, 0] > 50]
    torch.testing.assert_close(near[:, 1], 2 * near[:, 0])
    assert far[:, 0].eq(100).all() and len(far) == pytest.approx(2000, abs=150)
    for along, top in ((near[:, 0], 1), (far[:, 1], 4)):
        assert 0 <= along.min() < 0.01 * top and 0.99 * top < along.max() <= top
        assert along.mean() == pytest.approx(top / 2, abs=0.05 * top)
        assert along.std() == pytest.approx(top / 12**0.5, abs=0.02 * top)


def test_posterior_samples_have_the_posterior_moments(vae):
    x = torch.rand(1, 1, 28, 28)
    z = sample_posterior(vae, x.expand(3000, -1, -1, -1))
    posterior = vae.encode(x)
    torch.testing.assert_close(z.mean(0), posterior.mean[0], atol=0.08, rtol=0)
    torch.testing.assert_close(z.std(0), (0.5 * posterior.logvar[0]).exp(), atol=0.08, rtol=0)


class FakeRun(SimpleNamespace):
    """A run with the given training images, which counts how often they are loaded."""

    loads = 0
    scaling = Scaling.unit("float32")

    def images(self, split, root, max_images):
        return self.subset(split, root, max_images).pixels, self.labels

    def subset(self, split, root, max_images):
        self.loads += 1
        return ImageSet(self.x, self.labels, self.classes)


@pytest.fixture
def run(vae, tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"weights")
    x, labels = torch.rand(60, 1, 28, 28), torch.arange(60) % 3
    x[labels == 1] *= 0.1
    return FakeRun(vae=vae, path=path, folder=tmp_path, x=x, labels=labels, classes=None)


def test_a_class_is_chosen_by_its_name(run):
    run.classes = ["3", "8", "cat"]
    named = load_or_fit_sampler("gaussian", run, label=8)
    torch.testing.assert_close(named.means[0], sample_posterior(run.vae, run.x[run.labels == 1]).mean(0))
    with pytest.raises(UserError, match="label=1 is invalid: expected one of 3, 8, cat"):
        load_or_fit_sampler("gaussian", run, label=1)


def test_sampler_is_fitted_once_per_checkpoint_and_label(run):
    first = load_or_fit_sampler("gaussian", run)
    assert all(map(torch.equal, first, load_or_fit_sampler("gaussian", run))) and run.loads == 1
    torch.testing.assert_close(first.means[0], sample_posterior(run.vae, run.x).mean(0))
    one = load_or_fit_sampler("gaussian", run, label=1)
    torch.testing.assert_close(one.means[0], sample_posterior(run.vae, run.x[run.labels == 1]).mean(0))
    assert len(list(run.folder.glob("sampler_*.pt"))) == 2
    run.path.write_bytes(b"other weights")
    loads = run.loads
    load_or_fit_sampler("gaussian", run)
    assert run.loads == loads + 1
    # The same images with other labels.
    run.labels = (run.labels + 1) % 3
    torch.testing.assert_close(load_or_fit_sampler("gaussian", run, label=2).means[0], one.means[0])


def test_conditional_model_has_a_sampler_per_class(run):
    run.vae = VAE("mlp", [16], 2, "relu", "bernoulli", [1, 28, 28], classes="abc").requires_grad_(False)
    labels = torch.tensor([2, 0, 2, 2, 0])
    z = load_or_fit_sampler("gaussian", run, labels=labels).sample(5, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    for label in (0, 2):
        own = load_or_fit_sampler("gaussian", run, label="abc"[label])
        assert torch.equal(z[labels == label], own.sample(int((labels == label).sum()), generator))
    assert run.loads == 3  # once for each call
    assert load_or_fit_sampler("gaussian", run, labels=torch.tensor([1])).sample(5).shape == (5, 2)


def test_samples_of_a_conditional_prior_have_their_labels(run):
    prior = {"name": "mixture", "components": 3}
    run.vae = VAE("mlp", [16], 2, "relu", "bernoulli", [1, 28, 28], prior, "abc").requires_grad_(False)
    run.vae.prior.mean.copy_(torch.tensor([[-50.0], [0.0], [50.0]]).expand(3, 2))
    run.vae.prior.log_weights.copy_(100 * torch.eye(3))
    labels = torch.tensor([2, 0, 1, 2])
    z = load_or_fit_sampler("prior", run, labels=labels).sample(4, torch.Generator().manual_seed(0))
    assert ((z - 50 * (labels[:, None] - 1)).abs() < 10).all()


@pytest.mark.parametrize("number", (0, 2))
def test_class_with_too_few_images_is_named(run, number):
    run.vae = VAE("mlp", [16], 2, "relu", "bernoulli", [1, 28, 28], classes=["a", "b", "cat"]).requires_grad_(False)
    run.labels = torch.where(torch.arange(60) < number, 2, torch.arange(60) % 2)
    message = f"needs at least 7 training images of class cat for 2 latent dimensions, and there are {number}"
    with pytest.raises(UserError, match=message):
        load_or_fit_sampler("gaussian", run, labels=torch.tensor([0, 2]))


def test_invalid_label_is_rejected(run):
    with pytest.raises(UserError, match="label=7 is invalid: expected one of 0, 1, 2, as the training images have"):
        load_or_fit_sampler("gaussian", run, label=7)
    with pytest.raises(UserError, match="expected null with sampler=prior"):
        load_or_fit_sampler("prior", run, label=1)
    run.labels = run.labels[:, None].expand(-1, 2)
    with pytest.raises(UserError, match="several factors"):
        load_or_fit_sampler("gaussian", run, label=2)


def test_too_few_images_are_rejected(run):
    run.x, run.labels = run.x[:6], run.labels[:6]
    with pytest.raises(UserError, match="needs at least 7 training images for 2 latent dimensions, and there are 6"):
        load_or_fit_sampler("gaussian", run)


@pytest.mark.parametrize("found", ["foreign", "damaged", "stale"])
def test_cached_sampler_is_used_only_if_own_and_intact(run, capsys, found):
    path = run.folder / f"sampler_gaussian_{hash_file(run.path)}.pt"
    wanted = load_or_fit_sampler("gaussian", run)
    whole = path.read_bytes()
    if found == "foreign":
        path.write_text("my thesis")
    elif found == "damaged":
        path.write_bytes(whole[:200] + b"\0" * 300 + whole[500:])
    else:
        load_or_fit_sampler("knn", run)
        path.write_bytes((run.folder / f"sampler_knn_{hash_file(run.path)}.pt").read_bytes())
    assert all(map(torch.equal, load_or_fit_sampler("gaussian", run), wanted))
    if found == "foreign":
        assert path.read_text() == "my thesis" and "not made by betavae" in capsys.readouterr().out
    else:
        assert path.read_bytes() == whole


def test_command_samples_a_label(vae, tmp_path, data_root):
    path = save_vae(tmp_path / "lone" / "lone.ckpt", vae, {"hidden_dims": [16], "latent_dim": 2}, {"root": data_root})
    before = path.read_bytes()
    words = ("ckpt=lone/lone.ckpt", "n=4", "out=a.png", "sampler=knn")
    run_command(*words, "label=7", "save_tensor=true", cwd=tmp_path, script="scripts/sample.py")
    text = run_command(*words, "temperature=2", cwd=tmp_path, script="scripts/sample.py", code=1)
    assert "temperature=2 is invalid: expected 1" in text
    loaded = checkpoint.load(path)
    x, labels = loaded.images("train")
    sampler = SAMPLERS["knn"](sample_posterior(loaded.vae, x[labels == 7]))
    wanted = loaded.vae.decode(sampler.sample(4, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(torch.load(tmp_path / "a.pt", weights_only=True), wanted)
    assert {item.name for item in path.parent.iterdir()} == {"lone.ckpt", f"sampler_knn_7_{hash_file(path)}.pt"}
    assert path.read_bytes() == before
