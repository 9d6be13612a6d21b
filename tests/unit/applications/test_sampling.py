import runpy

import pytest
import torch

from betavae.applications import sampling
from betavae.applications.sampling import SAMPLERS, Mixture, load_or_fit_sampler, posterior_samples
from betavae.errors import UserError
from betavae.models.vae import VAE
from betavae.runtime import checkpoint
from betavae.storage.cache import hash_file
from tests.conftest import DATA, MODEL, MODULE, REPO


@pytest.fixture
def vae():
    return VAE(**MODEL | {"hidden_dims": [16], "latent_dim": 2}).requires_grad_(False)


def drawn(latents, n=40_000):
    return latents.sample(n, torch.Generator().manual_seed(1))


def test_a_mixture_draws_from_its_components():
    turn = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    mixture = Mixture(torch.tensor([0.2, 0.8]), torch.tensor([[-50.0, 0.0], [50.0, 3.0]]), torch.stack((turn, turn.T)))
    z = drawn(mixture)
    left = z[:, 0] < 0
    assert left.float().mean() == pytest.approx(0.2, abs=0.01)
    torch.testing.assert_close(z[left].mean(0), mixture.means[0], atol=0.08, rtol=0)
    torch.testing.assert_close(z[left].T.cov(), turn @ turn.T, atol=0.15, rtol=0)
    torch.testing.assert_close(z[~left].T.cov(), turn.T @ turn, atol=0.15, rtol=0)
    assert torch.equal(z, drawn(mixture)) and not torch.equal(z, mixture.sample(len(z)))


def test_the_prior_is_the_prior():
    z = drawn(SAMPLERS["prior"](torch.rand(7, 3) + 5))
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(z.T.cov(), torch.eye(3), atol=0.03, rtol=0)


def test_a_gaussian_has_the_moments_and_a_mixture_the_clumps_of_what_it_is_fitted_to():
    clumps = torch.tensor([[6.0, 0.0], [-6.0, 0.0], [0.0, 6.0]])
    z = (clumps[:, None] + torch.randn(3, 1000, 2) * torch.tensor([0.5, 0.1])).flatten(0, 1)
    draws = drawn(SAMPLERS["gaussian"](z))
    torch.testing.assert_close(draws.mean(0), z.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(draws.T.cov(), z.T.cov(), atol=0.4, rtol=0)
    assert (torch.cdist(draws, clumps).min(1).values > 3).float().mean() > 0.3  # it fills the middle
    draws = drawn(SAMPLERS["mixture"](z))
    distance, clump = torch.cdist(draws, clumps).min(1)
    assert (distance < 2.5).all()
    assert torch.bincount(clump, minlength=3).div(len(draws)).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)
    torch.testing.assert_close((draws - clumps[clump]).std(0), torch.tensor([0.5, 0.1]), atol=0.02, rtol=0)


def test_knn_lies_between_neighbours(monkeypatch):
    monkeypatch.setattr(sampling, "NEIGHBOURS", 1)
    pairs = torch.tensor([[0.0, 0.0], [1.0, 2.0], [100.0, 0.0], [100.0, 4.0]])
    z = drawn(SAMPLERS["knn"](pairs), 4000)
    near, far = z[z[:, 0] < 50], z[z[:, 0] > 50]
    torch.testing.assert_close(near[:, 1], 2 * near[:, 0])
    assert far[:, 0].eq(100).all() and len(far) == pytest.approx(2000, abs=150)
    for along, top in ((near[:, 0], 1), (far[:, 1], 4)):  # uniform from end to end
        assert 0 <= along.min() < 0.01 * top and 0.99 * top < along.max() <= top
        assert along.mean() == pytest.approx(top / 2, abs=0.05 * top)
        assert along.std() == pytest.approx(top / 12**0.5, abs=0.02 * top)


def test_posterior_samples_have_the_posteriors_mean_and_spread(vae):
    x = torch.rand(1, 1, 28, 28)
    z = posterior_samples(vae, x.expand(3000, -1, -1, -1))
    posterior = vae.encode(x)
    torch.testing.assert_close(z.mean(0), posterior.mean[0], atol=0.08, rtol=0)
    torch.testing.assert_close(z.std(0), (0.5 * posterior.logvar[0]).exp(), atol=0.08, rtol=0)


@pytest.fixture
def lone(vae, tmp_path, data_root):
    """A checkpoint alone in somebody's folder."""
    path = tmp_path / "theirs" / "lone.ckpt"
    model = MODEL | {"hidden_dims": [16], "latent_dim": 2}
    content = {"betavae_format": checkpoint.FORMAT, "hyper_parameters": MODULE | {"model": model}}
    content["state_dict"] = {f"vae.{key}": value for key, value in vae.state_dict().items()}
    checkpoint.save_checkpoint(content | {"datamodule_hyper_parameters": DATA | {"root": data_root}}, path)
    return path


def test_it_is_fitted_once_and_to_the_images_of_the_digit(vae, lone):
    x, labels = torch.rand(60, 1, 28, 28), torch.arange(60) % 3
    x[labels == 1] *= 0.1
    asked = []

    def training():
        asked.append(1)
        return x, labels

    def fit(sampler="gaussian", digit=None):
        return load_or_fit_sampler(sampler, vae, training, lone, lone.parent, digit)

    first = fit()
    assert all(torch.equal(*pair) for pair in zip(first, fit(), strict=True)) and len(asked) == 1
    torch.testing.assert_close(first.means[0], posterior_samples(vae, x).mean(0))
    one = fit(digit=1)
    torch.testing.assert_close(one.means[0], posterior_samples(vae, x[labels == 1]).mean(0))
    assert len(asked) == 2 and len(list(lone.parent.glob("sampler_*.pt"))) == 2
    # Another model under the same name: what is kept is not its own.
    lone.write_bytes(lone.read_bytes() + b" ")
    fit()
    assert len(asked) == 3
    # The same model and images, and other labels.
    labels = (labels + 1) % 3
    torch.testing.assert_close(fit(digit=2).means[0], one.means[0])
    with pytest.raises(UserError, match="labels are 0 to 2"):
        fit(digit=7)
    with pytest.raises(UserError, match="the prior knows no labels"):
        fit("prior", 1)
    labels = labels[:, None].expand(-1, 2)
    with pytest.raises(UserError, match="several factors"):
        fit(digit=2)


@pytest.mark.parametrize("found", ["foreign", "harmed", "stale"])
def test_what_lies_there_is_used_only_if_it_is_ours_and_whole(vae, lone, capsys, found):
    path = lone.parent / f"sampler_gaussian_{hash_file(lone)}.pt"
    x, labels = torch.rand(20, 1, 28, 28), torch.zeros(20)
    wanted = load_or_fit_sampler("gaussian", vae, lambda: (x, labels), lone, lone.parent)
    whole = path.read_bytes()
    if found == "foreign":
        path.write_text("my thesis")
    elif found == "harmed":
        path.write_bytes(whole[:200] + b"\0" * 300 + whole[500:])
    else:  # ours, of another question
        load_or_fit_sampler("knn", vae, lambda: (x, labels), lone, lone.parent)
        path.write_bytes((lone.parent / f"sampler_knn_{hash_file(lone)}.pt").read_bytes())
    again = load_or_fit_sampler("gaussian", vae, lambda: (x, labels), lone, lone.parent)
    assert all(torch.equal(*pair) for pair in zip(again, wanted, strict=True))
    if found == "foreign":
        assert path.read_text() == "my thesis" and "not made by betavae" in capsys.readouterr().out
    else:
        assert len(torch.load(path, weights_only=True)["made"]["parts"]) == 3


def test_the_command(lone, tmp_path):
    theirs = {path.name: path.read_bytes() for path in lone.parent.iterdir()}
    command = runpy.run_path(str(REPO / "scripts" / "sample.py"))["main"].task
    out = {"ckpt": str(lone), "n": 4, "out": f"{tmp_path}/a.png"}
    command(out | {"sampler": "knn", "digit": 7, "save_tensor": True})
    with pytest.raises(UserError, match="temperature=2 goes with sampler=prior"):
        command(out | {"sampler": "knn", "temperature": 2.0})
    run = checkpoint.load(lone)
    x, labels = run.images("train")
    latents = load_or_fit_sampler("knn", run.vae, lambda: (x[labels == 7], labels[labels == 7]), lone, tmp_path, 7)
    wanted = run.vae.decode(latents.sample(4, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(torch.load(tmp_path / "a.pt", weights_only=True), wanted)
    assert {path.name for path in lone.parent.iterdir()} - set(theirs) == {f"sampler_knn_7_{hash_file(lone)}.pt"}
    assert all((lone.parent / name).read_bytes() == content for name, content in theirs.items())
