"""Tests of files of latents."""

import numpy as np
import pytest
import torch

from betavae.applications.latents import encode_images, load_latents, save_latents
from betavae.errors import UserError
from betavae.models.vae import VAE

NAMES = ["a.png", "b/c.png", "d,e.png"]


@pytest.fixture
def vae():
    return VAE("mlp", [8], 2, "relu", "bernoulli", [1, 4, 4]).requires_grad_(False)


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)


def test_encoding_agrees_with_the_model(vae, pixels):
    latents = encode_images(vae, pixels)
    posterior = vae.encode(pixels.float() / 255)
    assert torch.equal(latents.mean, posterior.mean) and torch.equal(latents.logvar, posterior.logvar)
    torch.testing.assert_close(latents.kl, vae.kl(posterior, posterior.mean).sum(1))
    z = posterior.rsample(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    recon = -vae.likelihood.log_prob(pixels.float() / 255, vae.decode_params(z))
    torch.testing.assert_close(latents.neg_elbo, recon + latents.kl)


@pytest.mark.parametrize("labels", [None, ["cat", "007", "²"], [7, 0, 7]], ids=["unlabeled", "names", "numbers"])
@pytest.mark.parametrize("suffix", [".npz", ".csv", ".parquet"])
def test_saved_latents_are_loaded_unchanged(vae, pixels, tmp_path, suffix, labels):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    latents, path = encode_images(vae, pixels), tmp_path / f"latents{suffix}"
    for _ in range(2):  # A file of this project may be replaced.
        save_latents(latents, NAMES, labels, path)
    names, z, found = load_latents(path, 2)
    assert names == NAMES and torch.equal(z, latents.mean) and found == labels
    with pytest.raises(UserError, match=r"has shape \(3, 2\); expected \(N, 3\)"):
        load_latents(path, 3)


def test_a_saved_tsne_is_beside_the_latents(vae, pixels, tmp_path):
    latents = encode_images(vae, pixels)._replace(tsne=torch.tensor([[1.0, 2], [3, 4], [5, 6.5]]))
    save_latents(latents, NAMES, None, tmp_path / "a.npz")
    save_latents(latents, NAMES, None, tmp_path / "a.csv")
    assert np.load(tmp_path / "a.npz")["tsne"].tolist() == [[1, 2], [3, 4], [5, 6.5]]
    rows = [line.split(",") for line in (tmp_path / "a.csv").read_text().splitlines()]
    assert rows[0][-3:-1] == ["tsne_0", "tsne_1"] and rows[3][-3:-1] == ["5.0", "6.5"]
    assert all(torch.equal(load_latents(tmp_path / name, 2)[1], latents.mean) for name in ("a.npz", "a.csv"))


def test_npy_has_latents_named_by_number(tmp_path):
    np.save(tmp_path / "z.npy", np.eye(2))
    names, z, labels = load_latents(tmp_path / "z.npy", 2)
    assert names == ["0", "1"] and z.tolist() == [[1, 0], [0, 1]] and labels is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,mean_0,mean_1\na,1,x\n", "neither an intact file"),
        ("name,mean_0\na,1\n", "expected"),
        ("", "neither an intact file|expected"),
        ("name,mean_0,mean_1\na,1,nan\n", "not finite"),
        ("name,mean_0,mean_1\n../a,1,2\n", "outside the output folder"),
        ("name,mean_0,mean_1\n/a,1,2\n", "outside the output folder"),
    ],
)
def test_invalid_latents_are_rejected(tmp_path, content, message):
    (tmp_path / "z.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        load_latents(tmp_path / "z.csv", 2)


def test_other_endings_and_foreign_files_are_not_written(vae, pixels, tmp_path):
    latents = encode_images(vae, pixels)
    with pytest.raises(UserError, match=r"expected a name that ends in \.npz, \.csv or \.parquet"):
        save_latents(latents, NAMES, None, tmp_path / "z.txt")
    (tmp_path / "z.csv").write_text("mine")
    with pytest.raises(UserError, match="not made by betavae"):
        save_latents(latents, NAMES, None, tmp_path / "z.csv")
    assert (tmp_path / "z.csv").read_text() == "mine"
