"""What the explorer computes, and what its server answers and refuses."""

import base64
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import urllib.request
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from betavae.errors import UserError
from betavae.models.vae import VAE
from betavae.runtime import checkpoint
from tests.conftest import DATA, MODEL, MODULE, REPO

pytest.importorskip("starlette", reason='the explorer needs pip install -e ".[explore]"')

from starlette.testclient import TestClient

from betavae.applications.anomalies import report
from betavae.applications.anomalies.detector import Detector
from betavae.applications.explorer import queries, server, uploads
from betavae.data.fingerprint import fingerprint
from betavae.data.image_io import read_image
from betavae.storage.cache import load_or_compute


def a_run(latent_dim: int, beta: float, root: str, name: str = "mnist") -> checkpoint.TrainedRun:
    """A run of random weights, wide enough apart that pictures differ."""
    model = MODEL | {"latent_dim": latent_dim, "hidden_dims": [16]}
    vae = VAE(**model).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(latent_dim)
    for weight in vae.parameters():
        weight.normal_(0, 0.3, generator=generator)
    path = Path(f"runs/z{latent_dim}/checkpoints/last.ckpt")
    return checkpoint.TrainedRun(
        vae, path, MODULE | {"model": model, "beta": beta}, DATA | {"root": root, "name": name}
    )


@pytest.fixture(scope="module")
def explorer(data_root):
    return queries.load_models([a_run(3, 0.25, data_root), a_run(5, 4.0, data_root)])


@pytest.fixture(scope="module")
def client(explorer):
    with TestClient(server.app(explorer, {"localhost"}), base_url="http://127.0.0.1:8000") as client:
        yield client


def shown(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text))).view(28, 28)


def as_bytes(mean: torch.Tensor) -> torch.Tensor:
    return (255 * mean.squeeze()).round().long()


def test_runs_are_named_by_the_settings_in_which_they_differ(data_root):
    runs = [a_run(3, 0.25, data_root), a_run(3, 4.0, data_root)]
    assert queries.run_labels(runs) == ["beta=0.25", "beta=4.0"]
    assert queries.run_labels([runs[0], a_run(5, 0.25, data_root)]) == ["latent_dim=3", "latent_dim=5"]
    seeds = [runs[0], runs[0]._replace(path=Path("runs/again/checkpoints/last.ckpt"))]
    assert queries.run_labels(seeds) == ["z3", "again"]


def test_runs_of_different_data_or_too_many_are_refused(data_root):
    run = a_run(2, 1.0, data_root)
    with pytest.raises(UserError, match="different data"):
        queries.load_models([run, run._replace(data=run.data | {"binarize": "dynamic"})])
    with pytest.raises(UserError, match="9 runs are too many"):
        queries.load_models([run] * 9)


def test_runs_of_one_folder_of_pictures_are_of_the_same_data_wherever_it_is_kept(tmp_path):
    np.save(tmp_path / "ours.npy", np.random.default_rng(0).integers(0, 255, (40, 28, 28), np.uint8))
    run = a_run(2, 1.0, str(tmp_path / "ours.npy"), "arrays")
    run = run._replace(fingerprints={"test": fingerprint(run.data_source().load_split("test"))})
    other = run._replace(data=run.data | {"validation_size": 7, "batch_size": 3, "root": "moved.npy"})
    assert len(queries.load_models([run, other]).runs) == 2
    for runs in ([run, other._replace(fingerprints={"test": "0"})], [run._replace(fingerprints={}), other]):
        with pytest.raises(UserError, match=r"different data|have changed since"):
            queries.load_models(runs)


def test_principal_components_are_those_of_a_singular_value_decomposition(explorer):
    means = explorer.runs[1].means.double()
    points, centre, axes, share = queries.latent_map(explorer.runs[1], "pca")
    left, sizes, _ = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    wanted = (left * sizes)[:, :2]
    torch.testing.assert_close(points.double().abs(), wanted.abs(), atol=2e-3, rtol=1e-3)
    assert share == pytest.approx((sizes**2 / (sizes**2).sum())[:2].tolist(), rel=1e-4)
    torch.testing.assert_close((explorer.runs[1].means - centre) @ axes, points)


def test_the_other_map_is_of_the_two_dimensions_of_largest_kl(explorer):
    run = explorer.runs[1]
    posterior = run.vae.encode(explorer.images.pixels.float() / 255)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(posterior.mean, (0.5 * posterior.logvar).exp()), normal(0, 1)).mean(0)
    torch.testing.assert_close(run.kl, kl, rtol=1e-4, atol=1e-4)
    largest = kl.topk(2).indices
    torch.testing.assert_close(queries.latent_map(run, "largest").points, posterior.mean[:, largest])


def test_one_latent_dimension_has_a_map_too(data_root):
    points, *_, share = queries.latent_map(queries.load_models([a_run(1, 1.0, data_root)]).runs[0], "pca")
    assert points.shape == (10_000, 2) and points[:, 1].eq(0).all() and share == pytest.approx([1, 0])


def test_scores_of_a_posterior_that_is_a_point(data_root):
    """With almost no variance the distortion is the cross-entropy at the posterior mean."""
    run = a_run(3, 1.0, data_root)
    list(run.vae.encoder.modules())[-1].bias[3:] = -30.0
    list(run.vae.encoder.modules())[-1].weight[3:] = 0.0
    under = queries.load_models([run]).runs[0]
    x = run.images("test")[0][7]
    mean, scores = queries.encode(under, x)
    values = {score.name: score.value for score in scores}
    distortion = torch.nn.functional.binary_cross_entropy(run.vae.decode(mean[None])[0], x, reduction="sum").item()
    rate = 0.5 * (mean.double() ** 2 + torch.tensor(-30.0).double().exp() - 1 + 30).sum().item()
    assert values["distortion"] == pytest.approx(distortion, rel=1e-3)
    assert values["rate"] == pytest.approx(rate, rel=1e-5)
    assert values["neg. ELBO"] == pytest.approx(distortion + rate, rel=1e-3)
    everyone = torch.stack([queries.encode(under, other)[0] for other in run.images("test")[0][:3]])
    torch.testing.assert_close(everyone, under.means[:3])


def test_the_anomaly_detectors_p_value_is_there_once_it_was_fitted(data_root, tmp_path):
    run = a_run(3, 1.0, data_root)
    x = run.images("test")[0][7]
    assert "p-value" not in {score.name for score in queries.encode(queries.load_models([run]).runs[0], x)[1]}
    fresh = run._replace(path=tmp_path / "checkpoints" / "last.ckpt")
    fresh.path.parent.mkdir()
    fresh.path.write_bytes(b"weights")
    assert report.cached_detector(fresh) is None
    images = run.split("test").pixels
    detector = Detector.fit(run.vae, images[:600], images[600:800])
    load_or_compute(report.detector_path(fresh), report.ASKED, lambda: detector.state)
    found = report.cached_detector(fresh)
    under = queries.load_models([fresh], None, [found.p_values]).runs[0]
    (score,) = [score for score in queries.encode(under, x)[1] if score.name == "p-value"]
    assert score.value == pytest.approx(100 * detector.p_values(x[None]).item())


def test_the_percentile_counts_those_below_and_half_of_its_equals():
    under = SimpleNamespace(reference=torch.tensor([1.0, 2.0, 2.0, 3.0]))
    assert [queries.percentile(under, value) for value in (0.5, 1.5, 2.0, 9.0)] == [0, 25, 50, 100]


def test_a_test_image_is_at_its_own_place_among_the_test_images(explorer):
    run = explorer.runs[0]
    x = explorer.images.pixels[:300].float() / 255
    places = [queries.encode(run, image)[1][3].value for image in x[::30]]
    elbos = [queries.encode(run, image)[1][0].value for image in x[::30]]
    assert sorted(range(10), key=places.__getitem__) == sorted(range(10), key=elbos.__getitem__)
    assert min(places) > 0 and max(places) < 100 and max(places) - min(places) > 40


def test_the_images_compared_with_are_from_the_whole_test_set(explorer):
    """By the neg. ELBO that each of 500 evenly spaced images has, but for the samples' noise."""
    run = explorer.runs[0]
    numbers = torch.arange(500) * 9999 / 499
    x = explorer.images.pixels[numbers.round().long()].float() / 255
    elbos = sorted(queries.encode(run, image)[1][0].value for image in x)
    assert len(run.reference) == 500 and run.reference.tolist() == pytest.approx(elbos, rel=0.15)


def test_state_and_page(client, explorer):
    state = client.get("/api/state").json()
    assert state["shape"] == [1, 28, 28] and state["images"] == 10_000 and state["classes"][3] == "3"
    assert state["labels"] == [explorer.images.labels.tolist()]
    assert [run["name"] for run in state["runs"]] == [run.name for run in explorer.runs]
    assert "surrogate" in state["note"]
    for run, under in zip(state["runs"], explorer.runs, strict=True):
        assert sorted(run["order"]) == list(range(under.vae.latent_dim))
        assert [run["kl"][d] for d in run["order"]] == sorted(run["kl"], reverse=True)
    for url in server.STATIC_ROUTES:
        answer = client.get(url)
        assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
        assert not re.search(r"(https?:)?//[\w.-]+\.\w", answer.text), "the page asks nobody else"


def test_decode_is_the_models_own(client, explorer):
    z = [[0.5, -1.25, 2.0], [1.0, 0.0, -0.5, 0.25, 3.0]]
    pictures = client.post("/api/decode", json={"z": z}).json()["pictures"]
    for text, under, latent in zip(pictures, explorer.runs, z, strict=True):
        assert torch.equal(shown(text), as_bytes(under.vae.decode(torch.tensor([latent]))))
    assert shown(pictures[0]).float().std() > 1


def test_a_test_image_is_encoded_by_every_run(client, explorer):
    answer = client.post("/api/image", json={"index": 41}).json()
    assert torch.equal(shown(answer["image"]), explorer.images.pixels[41, 0].long())
    for run, under in zip(answer["runs"], explorer.runs, strict=True):
        mean = under.vae.encode(explorer.images.pixels[[41]].float() / 255).mean[0]
        assert run["mean"] == pytest.approx(mean.tolist(), rel=1e-5, abs=1e-6)
        numbers = {score["name"]: score["value"] for score in run["scores"]}
        assert numbers["neg. ELBO"] == pytest.approx(numbers["distortion"] + numbers["rate"])


def test_a_path_goes_straight_from_one_latent_to_the_other(client, explorer):
    start, end = [[0.0, 1.0, 2.0], [0.0] * 5], [[1.0, -1.0, 0.0], [2.0] * 5]
    rows = client.post("/api/path", json={"start": start, "end": end, "steps": 5}).json()["pictures"]
    assert [len(row) for row in rows] == [5, 5]
    for step, share in enumerate((0, 0.25, 0.5, 0.75, 1)):
        z = (1 - share) * torch.tensor([start[0]]) + share * torch.tensor([end[0]])
        assert (shown(rows[0][step]) - as_bytes(explorer.runs[0].vae.decode(z))).abs().max() <= 1


def test_the_map_is_answered(client, explorer):
    answer = client.get("/api/map?run=1&axes=largest").json()
    wanted = queries.latent_map(explorer.runs[1], "largest")
    assert np.abs(np.array(answer["points"]) - wanted.points.numpy()).max() < 1e-4
    assert answer["axes"] == wanted.axes.tolist() and answer["centre"] == [0.0] * 5


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
        ("image", '{"index": 10000}', "numbered 0 to 9999"),
        ("image", '{"index": 1.5}', "valid integer"),
        ("path", '{"start": [[0]], "end": [[0]], "steps": 5}', "latent dimensions"),
        ("path", '{"start": [[0]], "end": [[0]], "steps": 51}', "less than or equal to 50"),
    ],
)
def test_what_cannot_be_answered_is_said_in_a_sentence(client, url, content, words):
    answer = client.post(f"/api/{url}", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and words in answer.json()["error"]


def test_other_mistakes(client):
    assert client.get("/api/map?run=2").status_code == 400
    assert client.get("/api/map?axes=tsne").status_code == 400
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
        ({"host": "evil.example:8000"}, 403),  # a name that was made to point here
        ({"host": "192.168.1.5:8000"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9000"}, 403),  # another server of this machine
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_who_is_answered(client, headers, status):
    assert client.get("/api/state", headers=headers).status_code == status
    assert client.post("/api/image", json={"index": 0}, headers=headers).status_code == status


def test_a_link_to_the_page_may_be_followed(client):
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403


def test_a_page_for_others_goes_by_any_address_but_not_by_any_name(explorer):
    with TestClient(server.app(explorer, {"lab7"}, loopback=False), base_url="http://192.168.1.5:8000") as client:
        assert client.get("/api/state").status_code == 200
        assert client.get("/api/state", headers={"host": "lab7:8000"}).status_code == 200
        assert client.get("/api/state", headers={"host": "evil.example"}).status_code == 403


def png(pixels: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def post_picture(client, content, query=""):
    return client.post(f"/api/picture{query}", content=content, headers={"content-type": "application/octet-stream"})


def test_an_upload_of_the_models_size_is_taken_pixel_for_pixel(client, explorer):
    digit = explorer.images.pixels[5, 0]
    answer = post_picture(client, png(digit)).json()
    assert torch.equal(shown(answer["image"]), digit.long())
    assert answer["runs"] == client.post("/api/image", json={"index": 5}).json()["runs"]
    inverted = post_picture(client, png(255 - digit), "?invert=true").json()
    assert torch.equal(shown(inverted["image"]), digit.long())


def test_centred_as_mnist_is(explorer):
    """A large digit in a corner becomes what it is in MNIST, near enough; uncentred it does not."""
    for index in range(5):
        digit = explorer.images.pixels[index, 0]
        sheet = torch.zeros(400, 400, dtype=torch.uint8)
        sheet[250:390, 40:180] = digit.repeat_interleave(5, 0).repeat_interleave(5, 1)
        pairs = []
        for centre in (True, False):
            found = uploads.read_upload(png(sheet), (1, 28, 28), centre, False, "none")
            pairs.append(torch.stack((found.flatten(), digit.flatten())).float().corrcoef()[0, 1].item())
        assert pairs[0] > 0.93 and pairs[1] < 0.5


def test_binarised_coloured_transparent_turned_and_blank_pictures():
    grey = torch.tensor([[127, 128], [0, 255]], dtype=torch.uint8)
    assert uploads.read_upload(png(grey), (1, 2, 2), False, False, "dynamic").tolist() == [[[0, 255], [0, 255]]]
    colours = torch.tensor([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 8, 7]]], dtype=torch.uint8)
    assert (
        uploads.read_upload(png(colours), (3, 2, 2), False, False, "none").tolist() == colours.permute(2, 0, 1).tolist()
    )
    clear = torch.tensor([[[0, 0, 0, 0], [0, 0, 0, 255]]] * 2, dtype=torch.uint8)
    assert uploads.read_upload(png(clear), (1, 2, 2), False, False, "none").tolist() == [[[255, 0], [255, 0]]]
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(grey.numpy()).save(buffer, "PNG", exif=exif)
    turned = uploads.read_upload(buffer.getvalue(), (1, 2, 2), False, False, "none")
    assert turned.tolist() == grey.flip(0, 1)[None].tolist()
    blank = uploads.read_upload(png(torch.zeros(9, 5, dtype=torch.uint8)), (1, 28, 28), True, False, "none")
    assert blank.shape == (1, 28, 28) and not blank.any()


def test_an_upload_is_read_just_as_the_models_own_pictures_are(explorer, tmp_path):
    """A 16-bit ramp, one that is transparent, a wide one, and a photograph's JPEG; whatever fit and background say."""
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
                assert torch.equal(uploads.read_upload(content, (channels, 20, 16), **look), wanted), (
                    name,
                    channels,
                    look,
                )
    content = (tmp_path / "deep.png").read_bytes()
    figure = uploads.read_upload(content, (1, 28, 28), centre=True)
    assert 5 < figure[figure > 0].float().mean() < 200, "16 bits are no white"
    # By the server too: what the model's data say.
    run = explorer.runs[0].run
    padded = replace(explorer.runs[0], run=run._replace(data=run.data | {"fit": "pad", "background": "#204060"}))
    with TestClient(server.app(replace(explorer, runs=[padded]), set()), base_url="http://127.0.0.1") as client:
        found = shown(post_picture(client, content).json()["image"])
    wanted, _ = read_image(tmp_path / "deep.png", (1, 28, 28), "pad", "#204060")
    assert torch.equal(found, wanted[0].long())


def test_uploads_that_are_refused(client):
    whole = png(torch.randint(0, 255, (50, 50), dtype=torch.uint8))
    # The header alone of ten billion pixels, and a whole file of just too many.
    size = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    huge = whole[:8] + struct.pack(">I", 13) + size + struct.pack(">I", zlib.crc32(size)) + whole[33:]
    for content, words in {
        b"": "not a PNG",
        b"GIF89a but no more": "cannot be read",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>": "not a PNG",
        b"P5 1 1 255\n0": "not a PNG",  # Pillow knows more formats, some by programs that it starts
        whole[:-100]: "cannot be read",
    }.items():
        answer = post_picture(client, content)
        assert answer.status_code == 400 and words in answer.json()["error"], content
    wide = io.BytesIO()
    Image.new("1", (uploads.PIXELS // 1000 + 1, 1000)).save(wide, "PNG")
    for content, words in ((huge, "exceeds limit"), (wide.getvalue(), "above the limit of 25,000,000")):
        answer = post_picture(client, content)
        assert answer.status_code == 400 and words in answer.json()["error"]
    answer = post_picture(client, b"0" * (uploads.MAX_UPLOAD_BYTES + 1))
    assert answer.status_code == 413 and "10 MB" in answer.json()["error"]
    form = client.post("/api/picture", files={"file": whole})
    assert form.status_code == 415, "a form of another site could send that"
    assert post_picture(client, whole, "?centre=maybe").status_code == 400


def test_where_the_page_is_and_who_reaches_it():
    with server.open_socket("127.0.0.1", 0) as one:
        url, warning = server.page_url(one)
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url) and warning is None
        with pytest.raises(UserError, match=r"\(Address already in use\); port=0 takes any"):
            server.open_socket("127.0.0.1", one.getsockname()[1])
    with server.open_socket("0.0.0.0", 0) as everywhere:
        url, warning = server.page_url(everywhere)
        assert url.startswith("http://localhost:") and "without a password" in warning
        assert socket.gethostname() in warning
    with pytest.raises(UserError, match="cannot be had"):
        server.open_socket("no such host", 0)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A folder of two runs that were trained hardly at all."""
    folder = tmp_path_factory.mktemp("sweep")
    for beta in (10.0, 2.0):
        run = a_run(2, beta, str(folder / "data"))
        weights = {f"vae.{key}": value for key, value in run.vae.state_dict().items()}
        (folder / f"beta_{beta:g}" / "checkpoints").mkdir(parents=True)
        content = {
            "betavae_format": checkpoint.FORMAT,
            "hyper_parameters": run.settings,
            "datamodule_hyper_parameters": run.data,
        }
        checkpoint.save_checkpoint(
            content | {"state_dict": weights}, folder / f"beta_{beta:g}" / "checkpoints" / "last.ckpt"
        )
    return folder


def test_the_command_shows_a_sweep_until_it_is_interrupted(sweep):
    command = [sys.executable, REPO / "scripts" / "explore.py", f"ckpt={sweep}", "browser=false"]
    pipe, environment = subprocess.PIPE, os.environ | {"PYTHONPATH": str(REPO / "src")}
    process = subprocess.Popen(command, cwd=sweep, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    try:
        words = "".join(process.stdout.readline() for _ in range(3))
        url = re.search(r"beta_2/.*\n.*beta_10/.*\nthe page is at (http://127\.0\.0\.1:\d+)", words)[1]
        with urllib.request.urlopen(f"{url}/api/state", timeout=30) as answer:
            state = json.load(answer)
        assert [run["name"] for run in state["runs"]] == ["beta=2.0", "beta=10.0"]
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    assert process.returncode == 0 and rest == "the page is closed\n"
