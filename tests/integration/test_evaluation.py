import json
import math
import re
import signal

import numpy as np
import pytest
import torch
from torch import distributions as D

from betavae.metrics import likelihood
from betavae.metrics.aggregate_posterior import decompose_kl, encode_means, probe_accuracy
from betavae.metrics.likelihood import RNG_GROUP, PerImageBounds, count_decode_floats, standard_error, summary
from betavae.models.vae import VAE, Posterior
from betavae.objectives import elbo, iwae
from tests.commands import TINY, Child, run, wait_for
from tests.conftest import MODEL

KS = [1, 10, 100, 1000]


def importance_sample(*args, **kwargs) -> PerImageBounds:
    return PerImageBounds.concat(list(likelihood.importance_bounds(*args, **kwargs)))


@pytest.fixture
def linear():
    """Probabilistic PCA (Tipping & Bishop 1999) as a VAE: x = W z + b + scale * noise, x ~ N(b, W W^T + scale^2 I).

    The columns of W are orthogonal, so that the exact posterior has independent dimensions, as the encoder's has.
    """
    model = {"hidden_dims": [], "latent_dim": 3, "likelihood": "gaussian", "image_shape": [1, 3, 4]}
    vae = VAE(**MODEL | model).double().requires_grad_(False)
    w = torch.linalg.qr(torch.randn(12, 3).double()).Q * torch.tensor([3.0, 2.0, 0.7])
    scale, decoder, encoder = 0.5, vae.decoder[0], vae.encoder[1]
    decoder.weight.copy_(w)
    vae.likelihood.log_scale.fill_(math.log(scale))
    variance = 1 / (1 + (w**2).sum(0) / scale**2)
    encoder.weight.copy_(torch.cat(((w * variance / scale**2).T, torch.zeros(3, 12))))
    encoder.bias.copy_(torch.cat((-encoder.weight[:3] @ decoder.bias, variance.log())))
    covariance = w @ w.T + scale**2 * torch.eye(12)
    x = D.MultivariateNormal(decoder.bias, covariance).sample((300,))
    log_px = D.MultivariateNormal(decoder.bias, covariance).log_prob(x)
    return vae, x.view(-1, 1, 3, 4), log_px


def test_with_the_exact_posterior_every_bound_is_the_exact_likelihood(linear):
    vae, x, log_px = linear
    nll = importance_sample(vae, x, [1, 7, 20]).nll
    torch.testing.assert_close(nll, -log_px.unsqueeze(1).expand(-1, 3), rtol=1e-5, atol=1e-5)


def test_with_another_posterior_the_bounds_tighten_to_the_exact_likelihood(linear):
    vae, x, log_px = linear
    vae.encoder[1].bias[:3] += 0.3 * torch.tensor([0.2, -0.3, 0.5])
    vae.encoder[1].bias[3:] += torch.tensor([0.3, -0.2, 0.4])
    result = importance_sample(vae, x, KS)
    gap = result.nll + log_px.unsqueeze(1)
    # K = 1 is the ELBO: -log p(x) + KL(q || exact posterior), here known in closed form.
    exact_mean, exact_variance = result.mean - torch.tensor([0.06, -0.09, 0.15]), result.logvar.exp()
    exact_variance = exact_variance / torch.tensor([0.3, -0.2, 0.4]).exp()
    posterior = D.Normal(exact_mean, exact_variance.sqrt())
    kl = D.kl_divergence(D.Normal(result.mean, (0.5 * result.logvar).exp()), posterior).sum(1)
    neg_elbo = result.recon + result.kl.sum(1)
    assert kl.mean() > 0.05
    for estimate in (gap[:, 0], neg_elbo + log_px):
        error = estimate - kl
        assert error.mean().abs() < 5 * standard_error(error)
    assert (gap.diff(dim=1) <= 1e-9).all()  # tighter for every image
    assert gap[:, 1].mean() < 0.5 * gap[:, 0].mean()
    assert gap[:, -1].mean().abs() < 1e-3 < gap[:, 0].mean()
    # Standard errors tell how far the mean over these images is from that over all images.
    expected = 0.5 * torch.logdet(
        2 * math.pi * math.e * D.MultivariateNormal(torch.zeros(12).double(), covariance(vae)).covariance_matrix
    )
    nll = summary(result, KS)["nll_1000"]
    assert abs(nll["mean"] - expected) < 4 * nll["se"] and 0.05 < nll["se"] < 0.3


def covariance(vae):
    w = vae.decoder[0].weight
    return w @ w.T + (2 * vae.likelihood.log_scale).exp() * torch.eye(len(w))


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous_bernoulli", "gaussian"])
def test_an_independent_slow_formula_agrees(likelihood):
    vae = VAE(**MODEL | {"hidden_dims": [9], "latent_dim": 5, "likelihood": likelihood, "image_shape": [1, 4, 5]})
    vae = vae.double().requires_grad_(False)
    x, samples = torch.rand(RNG_GROUP + 3, 1, 4, 5).double(), 12
    result = importance_sample(vae, x, [1, 5, 12], seed=3)
    posterior = D.Normal(vae.encode(x).mean, (0.5 * vae.encode(x).logvar).exp())
    for image in (0, 1, RNG_GROUP - 1, RNG_GROUP, RNG_GROUP + 2):
        group, row = divmod(image, RNG_GROUP)
        noise = torch.randn(samples, RNG_GROUP, 5, generator=torch.Generator().manual_seed(3 + 1_000_003 * group))[
            :, row
        ]
        q = D.Normal(posterior.mean[image], posterior.stddev[image])
        log_px, weights = [], []
        for draw in noise.double():
            z = q.mean + q.stddev * draw
            params = vae.decoder(z.unsqueeze(0))[0]
            p = {
                "bernoulli": lambda params: D.Bernoulli(logits=params, validate_args=False),
                "continuous_bernoulli": lambda params: D.ContinuousBernoulli(logits=params),
                "gaussian": lambda params: D.Normal(params, 1.0),
            }[likelihood](params)
            log_px.append(p.log_prob(x[image]).sum())
            weights.append((log_px[-1] + D.Normal(0.0, 1.0).log_prob(z).sum() - q.log_prob(z).sum()).exp())
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(result.recon[image], -sum(log_px) / samples, **close)
        torch.testing.assert_close(result.nll[image, 0], -sum(w.log() for w in weights) / samples, **close)
        torch.testing.assert_close(result.nll[image, 2], -(sum(weights) / samples).log(), **close)
        fives = [sum(weights[i : i + 5]) / 5 for i in (0, 5)]  # the last two samples make no whole group
        torch.testing.assert_close(result.nll[image, 1], -(fives[0].log() + fives[1].log()) / 2, **close)
        kl = D.kl_divergence(q, D.Normal(0.0, 1.0))
        torch.testing.assert_close(result.kl[image], kl, **close)


def test_the_numbers_do_not_depend_on_chunks_or_on_how_many_images_there_are():
    vae, x = VAE(**MODEL).requires_grad_(False), torch.rand(75, 1, 28, 28).round()
    results = [importance_sample(vae, x, [1, 50, 130], memory_mb=size) for size in (1, 3, 500)]
    results.append(importance_sample(vae, x[:40], [1, 50, 130]))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one[: len(two)], two, rtol=1e-6, atol=1e-4)
    assert not torch.equal(results[0].nll, importance_sample(vae, x, [1, 50, 130], seed=1).nll)
    # What is asked for from a later image on is the rest of the whole.
    rest = importance_sample(vae, x, [1, 50, 130], start=2 * RNG_GROUP)
    for one, two in zip(results[0], rest, strict=True):
        torch.testing.assert_close(one[2 * RNG_GROUP :], two, rtol=1e-6, atol=1e-4)
    # And they are the objectives' for the same noise.
    noise = torch.randn(130, RNG_GROUP, 20, generator=torch.Generator().manual_seed(0))
    first = [part[:RNG_GROUP] for part in results[0]]
    torch.testing.assert_close(first[2][:, 2].mean().float(), iwae(vae, x[:RNG_GROUP], noise, 1.0).loss)
    terms = elbo(vae, x[:RNG_GROUP], noise, 1.0)
    torch.testing.assert_close((first[0].mean() + first[1].sum(1).mean()).float(), terms.loss)


def test_how_much_is_decoded_at_once():
    """784-400-20 on the way back: 400 before and after the activation, and the logits, unflattened, plus four more."""
    assert count_decode_floats(VAE(**MODEL)) == 4 * 784 + 400 + 400 + 784 + 784


def test_the_probes_on_points_whose_labels_are_known():
    means, labels = torch.randn(300, 3), torch.arange(300) % 3
    apart = means + 20 * torch.nn.functional.one_hot(labels, 3)
    assert probe_accuracy(apart[:200], labels[:200], apart[200:], labels[200:]) == {
        "knn_accuracy": 1,
        "linear_accuracy": 1,
    }
    chance = probe_accuracy(means[:200], labels[:200], means[200:], labels[200:])
    assert all(0.1 < accuracy < 0.6 for accuracy in chance.values())
    vae, x = VAE(**MODEL), torch.rand(1003, 1, 28, 28)
    torch.testing.assert_close(encode_means(vae, x), vae.encode(x).mean)


def test_the_aggregate_posterior_against_its_exact_kl():
    n, d = 4000, 2
    torch.manual_seed(1)  # the draws of z in `aggregate` are those of seed 0
    mean = torch.randn(n, d).double() * torch.tensor([1.2, 0.3]) + torch.tensor([0.5, 0.0])
    logvar = torch.tensor([0.2, 0.5]).double().log().expand(n, d)
    result = decompose_kl(Posterior(mean, logvar))
    # The aggregate is close to normal, with these variances.
    variance = torch.tensor([1.2**2 + 0.2, 0.3**2 + 0.5])
    wanted = 0.5 * (variance - 1 - variance.log()).sum() + 0.5 * 0.5**2
    assert result["moments_kl"] == pytest.approx(wanted.item(), abs=0.06)
    covariance = mean.T.cov(correction=0) + torch.diag(logvar.exp()[0])
    normal = D.MultivariateNormal(mean.mean(0), covariance)
    standard = D.MultivariateNormal(torch.zeros(d).double(), torch.eye(d).double())
    assert result["moments_kl"] == pytest.approx(D.kl_divergence(normal, standard).item())
    assert result["marginal_kl"] == pytest.approx(wanted.item(), abs=0.06)
    information = 0.5 * (1 + torch.tensor([1.2**2 / 0.2, 0.3**2 / 0.5])).log().sum()
    assert result["mutual_information"] == pytest.approx(information.item(), abs=0.06)
    # Posteriors that do not overlap: all that can be known is which image it was.
    apart = decompose_kl(Posterior(1000 * torch.randn(50, d).double(), torch.zeros(50, d).double()))
    assert apart["mutual_information"] == pytest.approx(math.log(50), abs=1e-6)


def test_the_commands(tmp_path, data_root):
    """Train two seeds, evaluate both, and print the table: what the README says."""

    def evaluate(*args, **how):
        return run(*args, cwd=tmp_path, script="scripts/evaluate.py", **how)

    def train(*args):
        # A tenth of an epoch: ten steps of 1,024 images, and without the minute that compiling takes.
        short = ["trainer=smoke", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.compile=false"]
        short += ["trainer.limit_test_batches=1", "model.latent_dim=10"]
        return run(*args, *short, f"data.root={data_root}", cwd=tmp_path)

    for experiment, seed in (("burda_vae", 0), ("burda_iwae5", 0), ("burda_iwae5", 1)):
        train(f"experiment={experiment}", f"seed={seed}", "runs=burda")
    runs = sorted((tmp_path / "burda").glob("*_burda_iwae5"))
    for folder, labels in zip(runs, ("probes=false", "probes=true"), strict=True):
        output = evaluate(f"ckpt={folder.relative_to(tmp_path)}", "k=20", "first=70", "memory_mb=1", labels)
    result = json.loads((runs[1] / "evaluation.json").read_text())
    assert result["k"] == [1, 10, 20] and result["images"] == 70 and result["checkpoint"] == "checkpoints/last.ckpt"
    assert (runs[1] / "figures" / "evaluation.png").stat().st_size > 5000
    assert f"{result['nll_20']['mean']:.3f} ± {result['nll_20']['se']:.3f}" in output
    assert result["nll_1"]["mean"] > result["nll_10"]["mean"] > result["nll_20"]["mean"] > 50
    assert result["neg_elbo"]["mean"] == pytest.approx(result["nll_1"]["mean"], abs=1)
    assert result["neg_elbo"]["mean"] == pytest.approx(result["rate"]["mean"] + result["distortion"]["mean"])
    assert sum(result["kl_per_dimension"]) == pytest.approx(result["rate"]["mean"])
    a = result["aggregate"]
    # One z of each image, 70 times: it strays by about half a nat.
    assert a["mutual_information"] + a["marginal_kl"] == pytest.approx(result["rate"]["mean"], abs=2)
    assert 0.5 < result["knn_accuracy"] <= 1 and 0.5 < result["linear_accuracy"] <= 1
    assert "log-likelihood of binarised images" in output and "Warning" not in output

    again = evaluate(f"ckpt={runs[1]}", "k=20", "first=70", "probes=false", "folder=other")
    other = json.loads((tmp_path / "other" / "evaluation.json").read_text())
    assert other["nll_20"]["mean"] == pytest.approx(result["nll_20"]["mean"], abs=1e-4) and "nearest" not in again

    table = run("runs=burda", cwd=tmp_path, script="scripts/results.py")
    values = [json.loads((folder / "evaluation.json").read_text())["nll_20"]["mean"] for folder in runs]
    mean, sd = sum(values) / 2, abs(values[0] - values[1]) / math.sqrt(2)
    row = next(line for line in table.splitlines() if "burda_iwae5" in line)
    assert f"{mean:.2f} ± {sd:.2f}" in row and "| 2 |" in row and len(re.findall("burda_iwae5", table)) == 1
    assert "not a whole run" in run("runs=other", cwd=tmp_path, script="scripts/results.py", code=1)
    assert "no evaluated run" in run("runs=nothing", cwd=tmp_path, script="scripts/results.py", code=1)


def test_killed_it_goes_on_and_ends_with_the_same_numbers(tmp_path, data_root):
    run(*TINY, "trainer.max_epochs=1", f"data.root={data_root}", "hydra.run.dir=run", cwd=tmp_path)
    asked = ["ckpt=run", "first=640", "probes=false", "k=300"]
    how = {"cwd": tmp_path, "script": "scripts/evaluate.py"}
    assert "going on" not in run(*asked, "folder=whole", **how)
    killed = Child(*asked, "folder=killed", **how)
    wait_for(tmp_path, "killed/evaluation.part", killed)
    killed.send(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "evaluation.json").exists()
    assert "going on after the 32 images" in run(*asked, "folder=killed", **how)
    assert not (tmp_path / "killed" / "evaluation.part").exists()
    whole, resumed = (json.loads((tmp_path / f / "evaluation.json").read_text()) for f in ("whole", "killed"))
    del whole["sampling_seconds"], resumed["sampling_seconds"]
    assert whole == resumed


def test_one_test_image_has_no_standard_error(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(10 * 4 * 4, dtype=np.uint8).reshape(10, 4, 4))
    words = ["data=arrays", "data.root=x.npy", "data.test_size=1", "data.batch_size=2", "hydra.run.dir=run"]
    run(*TINY, *words, "callbacks.figures_every_n_epochs=0", cwd=tmp_path)
    said = run("ckpt=run", "k=2", cwd=tmp_path, script="scripts/evaluate.py", code=1)
    assert said.startswith("error: run/checkpoints/best.ckpt: its data have 1 test image; expected at least 2")
    assert said.count("\n") == 1 and not (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.parametrize(("n", "classes", "left_out"), [(20, 1, True), (4, 2, True), (30, 25, False)])
def test_labels_that_cannot_be_learned_are_left_out(tmp_path, n, classes, left_out):
    x = np.random.default_rng(0).integers(0, 256, (n, 4, 4), np.uint8)
    labels = np.arange(n) % classes
    np.savez(tmp_path / "x.npz", x_train=x, y_train=labels, x_test=x, y_test=np.arange(n))
    words = ["data=arrays", "data.root=x.npz", "data.validation_size=0", "data.batch_size=2", "hydra.run.dir=run"]
    run(*TINY, *words, "callbacks.figures_every_n_epochs=0", cwd=tmp_path)
    said = run("ckpt=run", "k=2", cwd=tmp_path, script="scripts/evaluate.py")
    assert ("left out: it needs 5 training images of two classes" in said) == left_out
    assert ("5 nearest neighbours" in said) != left_out and "Warning" not in said
