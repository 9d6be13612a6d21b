"""Tests of the explorer's computations, its server and scripts/explore.py."""

import base64
import io
import json
import math
import re
import signal
import socket
import struct
import urllib.request
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from betavae.errors import UserError
from betavae.metrics.embedding import compute_tsne
from betavae.models.vae import VAE
from betavae.runtime import checkpoint
from tests.commands import Child
from tests.conftest import DATA, MODEL, MODULE
from tests.unit.applications.conftest import save_vae

pytest.importorskip("starlette", reason='the explorer needs pip install -e ".[explore]"')

from starlette.testclient import TestClient

from betavae.applications.anomalies import report
from betavae.applications.anomalies.detector import Detector
from betavae.applications.explorer import queries, server, uploads
from betavae.data.fingerprint import fingerprint
from betavae.data.image_io import read_image
from betavae.storage.cache import load_or_compute


def make_run(latent_dim: int, beta: float, root: str, name: str = "mnist", **settings) -> checkpoint.TrainedRun:
    """Make a run with random weights, large enough that its images differ."""
    model = MODEL | {"latent_dim": latent_dim, "hidden_dims": [16]} | settings
    vae = VAE(**model).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(latent_dim)
    for weight in vae.parameters():
        weight.normal_(0, 0.3, generator=generator)
    path = Path(f"runs/z{latent_dim}/checkpoints/last.ckpt")
    data = DATA | {"root": root, "name": name}
    return checkpoint.TrainedRun(vae, path, MODULE | {"model": model, "beta": beta}, data)


@pytest.fixture(scope="module")
def explorer(data_root):
    return queries.load_models([make_run(3, 0.25, data_root), make_run(5, 4.0, data_root)])


@pytest.fixture(scope="module")
def client(explorer):
    with TestClient(server.build_app(explorer, {"localhost"}), base_url="http://127.0.0.1:8000") as client:
        yield client


def to_pixels(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text))).view(28, 28)


def to_bytes(mean: torch.Tensor) -> torch.Tensor:
    return (255 * mean.squeeze()).round().long()


def test_runs_are_labeled_by_the_settings_that_differ(data_root):
    runs = [make_run(3, 0.25, data_root), make_run(3, 4.0, data_root)]
    assert queries.label_runs(runs) == ["beta=0.25", "beta=4.0"]
    assert queries.label_runs([runs[0], make_run(5, 0.25, data_root)]) == ["latent_dim=3", "latent_dim=5"]
    seeds = [runs[0], runs[0]._replace(path=Path("runs/again/checkpoints/last.ckpt"))]
    assert queries.label_runs(seeds) == ["z3", "again"]


def test_runs_of_different_data_or_too_many_are_rejected(data_root):
    run = make_run(2, 1.0, data_root)
    with pytest.raises(UserError, match="different data"):
        queries.load_models([run, run._replace(data=run.data | {"binarize": "dynamic"})])
    with pytest.raises(UserError, match="9 runs are too many"):
        queries.load_models([run] * 9)


def test_runs_of_moved_data_are_compared_by_fingerprint(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 255, (40, 28, 28), np.uint8))
    run = make_run(2, 1.0, str(tmp_path / "x.npy"), "arrays")
    run = run._replace(fingerprints={"test": fingerprint(run.data_source().load_split("test"))})
    other = run._replace(data=run.data | {"validation_size": 7, "batch_size": 3, "root": "moved.npy"})
    assert len(queries.load_models([run, other]).models) == 2
    for runs in ([run, other._replace(fingerprints={"test": "0"})], [run._replace(fingerprints={}), other]):
        with pytest.raises(UserError, match=r"different data|have changed since"):
            queries.load_models(runs)


def test_labels_of_conditional_runs_are_compared(tmp_path):
    pixels, labels = np.random.default_rng(0).integers(0, 255, (40, 28, 28), np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "x.npz", images=pixels, labels=labels)
    plain = make_run(2, 1.0, str(tmp_path / "x.npz"), "arrays")
    found = plain.data_source().fingerprints("test", plain.data_source().load_split("test"), True)
    plain = plain._replace(fingerprints={"test": found["test"]})
    conditional = make_run(2, 1.0, str(tmp_path / "x.npz"), "arrays", classes=["0", "1"])._replace(fingerprints=found)
    assert len(queries.load_models([plain, conditional]).models) == 2
    other = conditional._replace(fingerprints=found | {"test labels": "0"})
    with pytest.raises(UserError, match="were trained on different labels"):
        queries.load_models([plain, conditional, other])
    np.savez(tmp_path / "x.npz", images=pixels, labels=1 - labels)
    assert len(queries.load_models([plain]).models) == 1
    for runs in ([plain, conditional], [conditional, plain]):
        with pytest.raises(UserError, match="the test labels have changed since"):
            queries.load_models(runs)


def test_pca_map_equals_singular_value_decomposition(explorer):
    means = explorer.models[1].means.double()
    points, center, axes, share = queries.compute_map(explorer.models[1], "pca")
    left, sizes, _ = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    wanted = (left * sizes)[:, :2]
    torch.testing.assert_close(points.double().abs(), wanted.abs(), atol=2e-3, rtol=1e-3)
    assert share == pytest.approx((sizes**2 / (sizes**2).sum())[:2].tolist(), rel=1e-4)
    torch.testing.assert_close((explorer.models[1].means - center) @ axes, points)


def test_largest_map_has_the_dimensions_of_largest_kl(explorer):
    run = explorer.models[1]
    posterior = run.vae.encode(explorer.images.pixels.float() / 255)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(posterior.mean, (0.5 * posterior.logvar).exp()), normal(0, 1)).mean(0)
    torch.testing.assert_close(run.kl, kl, rtol=1e-4, atol=1e-4)
    largest = kl.topk(2).indices
    torch.testing.assert_close(queries.compute_map(run, "largest").points, posterior.mean[:, largest])


def test_tsne_map_has_the_first_images_and_no_plane(explorer, client, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(queries, "MAX_TSNE_IMAGES", 50)
    response = client.get("/api/map?run=1&axes=tsne").json()
    wanted = compute_tsne(explorer.models[1].means[:50])
    assert response.keys() == {"points"} and wanted.shape == (50, 2)
    assert response["points"] == [pytest.approx(point, abs=1e-3) for point in wanted.tolist()]


@pytest.mark.parametrize("axes", ["pca", "largest"])
def test_one_image_has_a_map(explorer, axes):
    model = replace(explorer.models[1], means=explorer.models[1].means[:1])
    points, *_, share = queries.compute_map(model, axes)
    assert points.shape == (1, 2) and points.isfinite().all() and share == [0, 0]


def test_one_latent_dimension_has_a_map(data_root):
    points, *_, share = queries.compute_map(queries.load_models([make_run(1, 1.0, data_root)]).models[0], "pca")
    assert points.shape == (10_000, 2) and points[:, 1].eq(0).all() and share == pytest.approx([1, 0])


def test_scores_of_a_posterior_without_variance(data_root):
    """Without variance, recon is the cross-entropy at the posterior mean."""
    run = make_run(3, 1.0, data_root)
    list(run.vae.encoder.modules())[-1].bias[3:] = -30.0
    list(run.vae.encoder.modules())[-1].weight[3:] = 0.0
    model = queries.load_models([run]).models[0]
    x = run.images("test")[0][7]
    mean, scores = queries.encode_image(model, x)
    values = {score.name: score.value for score in scores}
    recon = torch.nn.functional.binary_cross_entropy(run.vae.decode(mean[None])[0], x, reduction="sum").item()
    kl = 0.5 * (mean.double() ** 2 + torch.tensor(-30.0).double().exp() - 1 + 30).sum().item()
    assert values["recon"] == pytest.approx(recon, rel=1e-3)
    assert values["KL"] == pytest.approx(kl, rel=1e-5)
    assert values["neg. ELBO"] == pytest.approx(recon + kl, rel=1e-3)
    everyone = torch.stack([queries.encode_image(model, other)[0] for other in run.images("test")[0][:3]])
    torch.testing.assert_close(everyone, model.means[:3])


def test_p_value_is_shown_if_a_detector_is_cached(data_root, tmp_path):
    run = make_run(3, 1.0, data_root)
    x = run.images("test")[0][7]
    assert "p-value" not in {score.name for score in queries.encode_image(queries.load_models([run]).models[0], x)[1]}
    fresh = run._replace(path=tmp_path / "checkpoints" / "last.ckpt")
    fresh.path.parent.mkdir()
    fresh.path.write_bytes(b"weights")
    assert report.load_cached_detector(fresh) is None
    images = run.split("test").pixels
    detector = Detector.fit(run.vae, images[:600], images[600:800])
    load_or_compute(report.detector_path(fresh), report.CACHE_KEY, lambda: dict(detector.state))
    found = report.load_cached_detector(fresh)
    model = queries.load_models([fresh], None, [found.compute_p_values]).models[0]
    (score,) = [score for score in queries.encode_image(model, x)[1] if score.name == "p-value"]
    assert score.value == pytest.approx(100 * detector.compute_p_values(x[None]).item())


def test_percentile_counts_half_of_equal_values():
    reference = torch.tensor([1.0, 2.0, 2.0, 3.0])
    assert [queries.compute_percentile(reference, value) for value in (0.5, 1.5, 2.0, 9.0)] == [0, 25, 50, 100]
    assert math.isnan(queries.compute_percentile(reference, math.nan))


def test_percentiles_of_test_images_are_in_order_of_elbo(explorer):
    run = explorer.models[0]
    x = explorer.images.pixels[:300].float() / 255
    places = [queries.encode_image(run, image)[1][3].value for image in x[::30]]
    elbos = [queries.encode_image(run, image)[1][0].value for image in x[::30]]
    assert sorted(range(10), key=places.__getitem__) == sorted(range(10), key=elbos.__getitem__)
    assert min(places) > 0 and max(places) < 100 and max(places) - min(places) > 40


def test_reference_images_are_evenly_spaced(explorer):
    """Up to the sampling error, their neg. ELBO is that of 500 evenly spaced images."""
    run = explorer.models[0]
    numbers = torch.arange(500) * 9999 / 499
    x = explorer.images.pixels[numbers.round().long()].float() / 255
    elbos = sorted(queries.encode_image(run, image)[1][0].value for image in x)
    assert len(run.reference) == 500 and run.reference.tolist() == pytest.approx(elbos, rel=0.15)


def test_state_and_page_files_are_served(client, explorer):
    state = client.get("/api/state").json()
    assert state["shape"] == [1, 28, 28] and state["images"] == 10_000 and state["classes"][3] == "3"
    assert state["labels"] == [explorer.images.labels.tolist()]
    assert [run["name"] for run in state["runs"]] == [run.name for run in explorer.models]
    assert "surrogate" in state["note"]
    for run, model in zip(state["runs"], explorer.models, strict=True):
        assert sorted(run["order"]) == list(range(model.vae.latent_dim))
        assert [run["kl"][d] for d in run["order"]] == sorted(run["kl"], reverse=True)
    for url in server.STATIC_ROUTES:
        answer = client.get(url)
        assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
        assert not re.search(r"(https?:)?//[\w.-]+\.\w", answer.text), "the page loads nothing from other sites"


def test_decode_equals_the_models(client, explorer):
    z = [[0.5, -1.25, 2.0], [1.0, 0.0, -0.5, 0.25, 3.0]]
    images = client.post("/api/decode", json={"z": z}).json()["images"]
    for text, model, latent in zip(images, explorer.models, z, strict=True):
        assert torch.equal(to_pixels(text), to_bytes(model.vae.decode(torch.tensor([latent]))))
    assert to_pixels(images[0]).float().std() > 1


def test_image_is_encoded_by_every_run(client, explorer):
    response = client.post("/api/image", json={"index": 41}).json()
    assert torch.equal(to_pixels(response["image"]), explorer.images.pixels[41, 0].long())
    for run, model in zip(response["runs"], explorer.models, strict=True):
        mean = model.vae.encode(explorer.images.pixels[[41]].float() / 255).mean[0]
        assert run["mean"] == pytest.approx(mean.tolist(), rel=1e-5, abs=1e-6)
        numbers = {score["name"]: score["value"] for score in run["scores"]}
        assert numbers["neg. ELBO"] == pytest.approx(numbers["recon"] + numbers["KL"])


def test_conditional_model_is_shown_with_the_chosen_label(data_root):
    """Test images have their own label; latents and uploads need a choice."""
    prior = {"name": "mixture", "components": 3}
    run = make_run(2, 1.0, data_root, classes=[str(digit) for digit in range(10)], prior=prior)
    with torch.no_grad():
        run.vae.prior.mean.copy_(torch.tensor([[-9.0], [0.0], [9.0]]).expand(3, 2))
        run.vae.prior.log_weights.zero_()[[3, 8], [0, 2]] = 100.0
    model = queries.load_models([run]).models[0]
    images = run.split("test")
    own = [run.vae.given(images.labels[[i]]).encode(images.pixels[[i]].float() / 255).mean[0] for i in range(3)]
    torch.testing.assert_close(model.means[:3], torch.stack(own))
    app = server.build_app(queries.Explorer([model], images), {"localhost"})
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        assert client.get("/api/state").json()["conditions"][3] == "3"
        assert client.post("/api/image", json={"index": 2}).json()["runs"][0]["mean"] == pytest.approx(
            own[2].tolist(), rel=1e-4, abs=1e-5
        )
        for label in (3, 8):
            (text,) = client.post("/api/decode", json={"z": [[1.0, 0.5]], "label": label}).json()["images"]
            wanted = run.vae.given(torch.tensor([label])).decode(torch.tensor([[1.0, 0.5]]))
            assert torch.equal(to_pixels(text), to_bytes(wanted))
        for words in ({}, {"label": None}, {"label": 10}):
            answer = client.post("/api/decode", json={"z": [[0.0, 0.0]]} | words)
            assert answer.status_code == 400 and "expected 0 to 9" in answer.json()["error"]
        (z,) = client.get("/api/sample", params={"label": 3}).json()["z"]
        assert len(z) == 2 and z != client.get("/api/sample", params={"label": 3}).json()["z"][0]
        (means,) = [run["centers"] for run in client.get("/api/state").json()["runs"]]
        for label in (3, 8):
            wanted = run.vae.given(torch.tensor([label])).prior.moments()[0]
            assert means[label] == pytest.approx(wanted.tolist(), abs=1e-5)
            z = torch.tensor([client.get("/api/sample", params={"label": label}).json()["z"][0] for _ in range(40)])
            assert (z.mean(0) - wanted).abs().max() < 1
        assert means[3] == pytest.approx([-9, -9], abs=0.2) and means[8] == pytest.approx([9, 9], abs=0.2)
        for query in ({}, {"label": 10}):
            assert "expected 0 to 9" in client.get("/api/sample", params=query).json()["error"]


def test_prior_sample_uses_equal_noise_for_dimensions_of_equal_rank(explorer):
    samples = queries.sample_prior(explorer)
    ranked = [z[queries.sort_by_kl(model)] for z, model in zip(samples, explorer.models, strict=True)]
    assert torch.equal(ranked[0], ranked[1][:3]) and len(ranked[1]) == 5


def test_path_is_a_straight_line(client, explorer):
    start, end = [[0.0, 1.0, 2.0], [0.0] * 5], [[1.0, -1.0, 0.0], [2.0] * 5]
    rows = client.post("/api/path", json={"start": start, "end": end, "steps": 5}).json()["images"]
    assert [len(row) for row in rows] == [5, 5]
    for step, share in enumerate((0, 0.25, 0.5, 0.75, 1)):
        z = (1 - share) * torch.tensor([start[0]]) + share * torch.tensor([end[0]])
        assert (to_pixels(rows[0][step]) - to_bytes(explorer.models[0].vae.decode(z))).abs().max() <= 1


def test_map_equals_the_computed_one(client, explorer):
    response = client.get("/api/map?run=1&axes=largest").json()
    wanted = queries.compute_map(explorer.models[1], "largest")
    assert np.abs(np.array(response["points"]) - wanted.points.numpy()).max() < 1e-4
    assert response["axes"] == wanted.axes.tolist() and response["center"] == [0.0] * 5


Z = '{"z": [[0, 0, 0], [0, 0, 0, 0, %s]]}'


@pytest.mark.parametrize(
    ("url", "content", "words"),
    [
        ("decode", "{", "Invalid JSON"),
        ("decode", '{"z": [[0, 0, 0]]}', "latent dimensions"),
        ("decode", '{"z": [[0, 0], [0, 0, 0, 0, 0]]}', "latent dimensions"),
        ("decode", Z % "NaN", "finite"),
        ("decode", Z % "1e999", "z.1.4"),
        ("decode", Z % "1001", "less than or equal to 1000"),
        ("decode", Z % '"1"', "valid number"),
        ("decode", Z[:-1] % "0" + ', "file": "/etc/passwd"}', "file: Extra inputs"),
        ("decode", "[" * 100_000, "recursion"),
        ("image", '{"index": -1}', "greater than or equal to 0"),
        ("image", '{"index": 10000}', "index=10000 is invalid: expected 0 to 9999"),
        ("image", '{"index": 1.5}', "valid integer"),
        ("path", '{"start": [[0]], "end": [[0]], "steps": 5}', "latent dimensions"),
        ("path", '{"start": [[0]], "end": [[0]], "steps": 51}', "less than or equal to 50"),
    ],
)
def test_invalid_bodies_are_rejected(client, url, content, words):
    answer = client.post(f"/api/{url}", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and words in answer.json()["error"]


def test_invalid_requests_are_rejected(client):
    assert client.get("/api/map?run=2").status_code == 400
    assert client.get("/api/map?axes=umap").status_code == 400
    assert client.get("/api/decode").status_code == 405
    assert client.post("/api/decode", content=Z % 0, headers={"content-type": "text/plain"}).status_code == 415
    large = b" " * (server.MAX_JSON_BYTES + 1)
    assert client.post("/api/decode", content=large, headers={"content-type": "application/json"}).status_code == 413
    for url in ("/etc/passwd", "/..%2fserver.py", "/page/../server.py", "/docs"):
        assert client.get(url).status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example:8000"}, 403),  # DNS rebinding
        ({"host": "192.168.1.5:8000"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9000"}, 403),  # another server on this machine
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_only_the_own_page_gets_responses(client, headers, status):
    assert client.get("/api/state", headers=headers).status_code == status
    assert client.post("/api/image", json={"index": 0}, headers=headers).status_code == status


def test_link_to_the_page_is_served(client):
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403


def test_public_page_has_any_address_but_only_known_names(explorer):
    with TestClient(server.build_app(explorer, {"lab7"}, loopback=False), base_url="http://192.168.1.5:8000") as client:
        assert client.get("/api/state").status_code == 200
        assert client.get("/api/state", headers={"host": "lab7:8000"}).status_code == 200
        assert client.get("/api/state", headers={"host": "evil.example"}).status_code == 403


def png(pixels: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def upload(client, content, query=""):
    return client.post(f"/api/upload{query}", content=content, headers={"content-type": "application/octet-stream"})


def test_upload_of_the_models_size_keeps_its_pixels(client, explorer):
    digit = explorer.images.pixels[5, 0]
    answer = upload(client, png(digit)).json()
    assert torch.equal(to_pixels(answer["image"]), digit.long())
    assert answer["runs"] == client.post("/api/image", json={"index": 5}).json()["runs"]
    inverted = upload(client, png(255 - digit), "?invert=true").json()
    assert torch.equal(to_pixels(inverted["image"]), digit.long())


def test_centering_matches_mnist(explorer):
    """A large digit in a corner becomes nearly the MNIST digit, but only with `center`."""
    for index in range(5):
        digit = explorer.images.pixels[index, 0]
        sheet = torch.zeros(400, 400, dtype=torch.uint8)
        sheet[250:390, 40:180] = digit.repeat_interleave(5, 0).repeat_interleave(5, 1)
        pairs = []
        for center in (True, False):
            found = uploads.read_upload(png(sheet), (1, 28, 28), center)
            pairs.append(torch.stack((found.flatten(), digit.flatten())).float().corrcoef()[0, 1].item())
        assert pairs[0] > 0.93 and pairs[1] < 0.5


def test_ink_that_is_finer_than_the_model_is_centered():
    sheet = torch.zeros(1000, 1000, dtype=torch.uint8)
    sheet[100, 100] = sheet[900, 900] = 255
    assert not uploads.read_upload(png(sheet), (1, 28, 28), True).any()


def test_upload_of_special_pictures():
    gray = torch.tensor([[127, 128], [0, 255]], dtype=torch.uint8)
    binarized = uploads.read_upload(png(gray), (1, 2, 2), binarize="dynamic")
    assert binarized.tolist() == [[[0, 255], [0, 255]]]
    colors = torch.tensor([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 8, 7]]], dtype=torch.uint8)
    assert torch.equal(uploads.read_upload(png(colors), (3, 2, 2)), colors.permute(2, 0, 1))
    transparent = torch.tensor([[[0, 0, 0, 0], [0, 0, 0, 255]]] * 2, dtype=torch.uint8)
    assert uploads.read_upload(png(transparent), (1, 2, 2)).tolist() == [[[255, 0], [255, 0]]]
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(gray.numpy()).save(buffer, "PNG", exif=exif)
    assert torch.equal(uploads.read_upload(buffer.getvalue(), (1, 2, 2)), gray.flip(0, 1)[None])
    blank = uploads.read_upload(png(torch.zeros(9, 5, dtype=torch.uint8)), (1, 28, 28), center=True)
    assert blank.shape == (1, 28, 28) and not blank.any()


def test_upload_is_read_like_training_pictures(explorer, tmp_path):
    ramp = torch.arange(40 * 60).view(40, 60)
    pictures = {
        "deep.png": Image.fromarray((ramp * 27).numpy().astype(np.uint16)),
        "clear.png": Image.fromarray(torch.stack([ramp % 256] * 4, 2).byte().numpy(), "RGBA"),
        "wide.jpg": Image.fromarray((torch.rand(64, 300, 3) * 255).byte().numpy()),
    }
    for name, image in pictures.items():
        image.save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        for channels in (1, 3):
            for look in ({}, {"fit": "pad", "background": "#204060"}):
                wanted, _ = read_image(tmp_path / name, (channels, 20, 16), **look)
                found = uploads.read_upload(content, (channels, 20, 16), **look)
                assert torch.equal(found, wanted), (name, channels, look)
    content = (tmp_path / "deep.png").read_bytes()
    figure = uploads.read_upload(content, (1, 28, 28), center=True)
    assert 5 < figure[figure > 0].float().mean() < 200, "16-bit pixels are not all white"
    # The server takes fit and background from the model's data settings.
    run = explorer.models[0].run
    padded = replace(explorer.models[0], run=run._replace(data=run.data | {"fit": "pad", "background": "#204060"}))
    with TestClient(server.build_app(replace(explorer, models=[padded]), set()), base_url="http://127.0.0.1") as client:
        found = to_pixels(upload(client, content).json()["image"])
    wanted, _ = read_image(tmp_path / "deep.png", (1, 28, 28), "pad", "#204060")
    assert torch.equal(found, wanted[0].long())


def test_invalid_uploads_are_rejected(client):
    whole = png(torch.randint(0, 255, (50, 50), dtype=torch.uint8))
    # A header that claims ten billion pixels.
    size = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    huge = whole[:8] + struct.pack(">I", 13) + size + struct.pack(">I", zlib.crc32(size)) + whole[33:]
    for content, words in {
        b"": "not a PNG",
        b"GIF89a but no more": "is not readable",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>": "not a PNG",
        b"%!PS-Adobe-3.0 EPSF-3.0\n": "not a PNG",  # Pillow reads more formats, some by other programs.
        whole[:-100]: "is not readable",
    }.items():
        answer = upload(client, content)
        assert answer.status_code == 400 and words in answer.json()["error"], content
    wide = io.BytesIO()
    Image.new("1", (uploads.MAX_PIXELS // 1000 + 1, 1000)).save(wide, "PNG")
    for content, words in ((huge, "exceeds limit"), (wide.getvalue(), "above the limit of 25,000,000")):
        answer = upload(client, content)
        assert answer.status_code == 400 and words in answer.json()["error"]
    answer = upload(client, b"0" * (uploads.MAX_UPLOAD_BYTES + 1))
    assert answer.status_code == 413 and "10 MB" in answer.json()["error"]
    form = client.post("/api/upload", files={"file": whole})
    assert form.status_code == 415, "a form of another site could send that"
    assert upload(client, whole, "?center=maybe").status_code == 400


def test_page_url_warns_of_public_access():
    with server.open_socket("127.0.0.1", 0) as one:
        url, warning = server.get_page_url(one)
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url) and warning is None
        with pytest.raises(UserError, match=r"\(Address already in use\); port=0 takes any"):
            server.open_socket("127.0.0.1", one.getsockname()[1])
    with server.open_socket("0.0.0.0", 0) as everywhere:
        url, warning = server.get_page_url(everywhere)
        assert url.startswith("http://localhost:") and "without a password" in warning
        assert socket.gethostname() in warning
    with pytest.raises(UserError, match="is not available"):
        server.open_socket("no such host", 0)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A folder of two untrained runs."""
    folder = tmp_path_factory.mktemp("sweep")
    for beta in (10.0, 2.0):
        run = make_run(2, beta, str(folder / "data"))
        path = folder / f"beta_{beta:g}" / "checkpoints" / "last.ckpt"
        save_vae(path, run.vae, run.settings["model"], run.data, beta=beta)
    return folder


def test_command_serves_a_sweep_until_interrupted(sweep):
    child = Child(f"ckpt={sweep}", "browser=false", cwd=sweep, script="scripts/explore.py")
    while "serving the page" not in child.text:
        assert child.poll() is None, child.text
    try:
        url = re.search(r"beta_2/.*\n.*beta_10/.*\nserving the page at (http://127\.0\.0\.1:\d+);", child.text)[1]
        with urllib.request.urlopen(f"{url}/api/state", timeout=30) as response:
            state = json.load(response)
        assert [run["name"] for run in state["runs"]] == ["beta=2.0", "beta=10.0"]
    finally:
        child.send(signal.SIGINT)
    assert child.wait() == 0 and re.search(r";.*\nthe server has stopped\n$", child.text), child.text
