"""What a trained model is for, as the pages tell it: from a folder of pictures to a model and back to pictures."""

import csv
import re

import numpy as np
import pytest
from PIL import Image

from tests.commands import run
from tests.integration.test_readme import PAGES, commands, small

BYTES = ["model.hidden_dims=[32]", "model.latent_dim=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, data_root):
    """A folder with PICTURES: bright discs and dark squares, some with alpha, two that cannot be read."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "data").symlink_to(data_root)
    rng = np.random.default_rng(0)
    grid = np.mgrid[:24, :24]
    for number in range(1300):
        kind = ("discs", "squares")[number % 2]
        offset = np.abs(grid - rng.uniform(8, 16, (2, 1, 1)))
        shape = (offset**2).sum(0) < 30 if kind == "discs" else offset.max(0) < 5
        pixels = np.where(shape[..., None], rng.integers(150, 255, 3), rng.integers(0, 60, 3)).astype(np.uint8)
        alpha = np.full((24, 24, 1), 255 if number % 10 else 128, np.uint8)
        (folder / "PICTURES" / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate((pixels, alpha), 2)).save(folder / "PICTURES" / kind / f"{number}.png")
    for name in ("a", "b"):
        Image.new("RGB", (30, 20), (200, 30, 30) if name == "a" else (30, 30, 200)).save(
            folder / f"PICTURES/{name}.png"
        )
    (folder / "PICTURES" / "broken.jpg").write_bytes(b"not a picture")
    (folder / "PICTURES" / "cut.png").write_bytes((folder / "PICTURES/a.png").read_bytes()[:60])
    return folder


def told(page: str, place, *changes: str) -> dict[str, str]:
    """The page's commands, run in their order; what each printed."""
    printed = {}
    for command in commands(PAGES[page]):
        if any(word in command for word in ("FILE.npy", "anomaly_benchmark")):
            continue
        script, words = small(command)
        words = [re.sub("^images=test$", "images=PICTURES", word) for word in words]
        if script == "train.py":
            words += [*changes, *BYTES]
        printed[command] = run(*words, cwd=place, script=script)
        assert "Traceback" not in printed[command] and "Warning" not in printed[command]
    return printed


@pytest.fixture(scope="module")
def pictures(place):
    return told("pictures.md", place, "trainer.limit_train_batches=20", "trainer.max_epochs=2", "data.image_size=16")


def test_from_pictures_to_a_model_and_back(place, pictures):
    benchmark, train, reconstruct, interpolate, encode, decode = pictures.values()
    assert re.search(
        r"6,000 pictures, 0.1 GB; 1 batches of 256\nmapped .*\nmemory .*\nmapped over memory: \d", benchmark
    )
    assert "2 could not be read: " in train and "neg. ELBO" in train
    assert all(f"{name} (" in train for name in ("cut.png", "broken.jpg"))
    assert "transparent parts filled with white" in reconstruct and "reconstructions.png" in reconstruct
    assert "1 interpolations" in interpolate and "1,302 images" in encode and "1,302 images" in decode
    held = np.load(place / "latents.npz")
    assert held["mean"].shape == held["logvar"].shape == (1302, 4) and set(held["labels"]) == {".", "discs", "squares"}
    assert (held["kl"] > 0).all() and held["names"][0] == "a.png"
    decoded = Image.open(place / "decoded" / "discs" / "0.png")
    assert decoded.size == (16, 16) and decoded.mode == "RGB"
    # Again: what is ours is written over; what is not, never.
    (place / "decoded" / "a.png").write_bytes(b"mine")
    again = run("latents=latents.npz", "out=decoded", cwd=place, script="scripts/decode.py", code=1)
    assert "a.png already exists" in again and (place / "decoded" / "a.png").read_bytes() == b"mine"


def test_encoding_agrees_with_the_model(place, pictures):
    import torch

    import betavae
    from betavae.data.image_io import read_images

    run("images=PICTURES/discs", "out=discs.csv", cwd=place, script="scripts/encode.py")
    rows = list(csv.DictReader((place / "discs.csv").read_text().splitlines()))
    loaded = betavae.load(runs=str(place / "runs"))
    found = read_images(place / "PICTURES" / "discs", loaded.vae.image_shape)
    mean, logvar = loaded.vae.encode(found.pixels.float() / 255)
    assert [row["name"] for row in rows] == found.names
    ours = torch.tensor([[float(row[f"mean_{d}"]) for d in range(4)] for row in rows])
    torch.testing.assert_close(ours, mean, rtol=1e-4, atol=1e-5)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1)
    torch.testing.assert_close(torch.tensor([float(row["kl"]) for row in rows]), kl, rtol=1e-4, atol=1e-4)

    run("images=PICTURES/discs", "out=discs.parquet", cwd=place, script="scripts/encode.py")
    table = pytest.importorskip("pyarrow.parquet").read_table(place / "discs.parquet").to_pylist()
    assert [{key: str(value) for key, value in row.items()} for row in table] == [
        {key: value for key, value in row.items() if key in table[0]} for row in rows
    ]
    for ending in ("csv", "parquet"):
        words = (f"latents=~/discs.{ending}", f"out=~/from_{ending}")
        run(*words, cwd=place, script="scripts/decode.py", environment={"HOME": str(place)})
    decoded = [sorted((place / f"from_{ending}").rglob("*.png")) for ending in ("csv", "parquet")]
    assert len(decoded[0]) == len(rows)
    assert [path.read_bytes() for path in decoded[0]] == [path.read_bytes() for path in decoded[1]]
    run("images=PICTURES/discs", "out=discs.parquet", cwd=place, script="scripts/encode.py")  # ours: may be replaced
    (place / "foreign.parquet").write_bytes(b"PAR1 of somebody else")
    for script, *words in (
        ("encode", "images=PICTURES/discs", "out=foreign.parquet"),
        ("decode", "latents=foreign.parquet"),
    ):
        refused = run(*words, cwd=place, script=f"scripts/{script}.py", code=1)
        assert "foreign.parquet" in refused
    assert (place / "foreign.parquet").read_bytes() == b"PAR1 of somebody else"


def test_the_models_own_pictures_have_their_names(place, pictures):
    run("images=test", "out=own.npz", cwd=place, script="scripts/encode.py")
    run("images=PICTURES", "out=all.npz", cwd=place, script="scripts/encode.py")
    own, all_ = np.load(place / "own.npz"), np.load(place / "all.npz")
    rows = [all_["names"].tolist().index(name) for name in own["names"]]
    assert 80 < len(rows) < 190 and own["labels"].tolist() == all_["labels"][rows].tolist()
    np.testing.assert_allclose(own["mean"], all_["mean"][rows], rtol=1e-4, atol=1e-5)


def test_pictures_that_were_moved_are_asked_for(place, pictures):
    (place / "PICTURES").rename(place / "MOVED")
    try:
        said = run("k=1", "probes=false", cwd=place, script="scripts/evaluate.py", code=1)
        assert said.startswith("error: ") and said.count("\n") == 1 and "/dev/null" not in said
        assert "was trained on data=folder in PICTURES, and there is nothing there now" in said
        assert "data_root=PATH" in said
        found = run("data_root=MOVED", "k=1", "probes=false", cwd=place, script="scripts/evaluate.py")
        assert "test images" in found
    finally:
        (place / "MOVED").rename(place / "PICTURES")


def test_what_is_strange(place, pictures):
    (text,) = told("anomalies.md", place).values()
    assert re.search(r"flagged \d+ of 1,302 images at alpha=0.01", text) and "calibration images" in text
    rows = list(csv.DictReader((place / "anomalies" / "scores.csv").read_text().splitlines()))
    unread = {row["name"]: row for row in rows if row["flagged"].startswith("not read: ")}
    assert set(unread) == {"broken.jpg", "cut.png"} and all(row["p_value"] == "" for row in unread.values())
    rows = [row for row in rows if row["name"] not in unread]
    assert len(rows) == 1302 and {"name", "label", "neg_elbo", "combined", "p_value", "flagged"} <= set(rows[0])
    assert [row["flagged"] == "True" for row in rows] == [float(row["p_value"]) <= 0.01 for row in rows]
    assert {path.name for path in (place / "anomalies").glob("*.png")} == {"histogram.png", "extremes.png", "where.png"}
    assert "fitting" in text
    again = run("images=PICTURES", "alpha=0.001", cwd=place, script="scripts/detect.py", code=1)
    assert "fitting" not in again and "alpha=0.001 needs at least 999 validation images" in again


def test_compressed_and_back(place, pictures, tmp_path):
    printed = told("compression.md", place, "trainer.limit_train_batches=3")
    train, compress, decompress, train_binary, compress_binary = printed.values()
    assert "bits per dimension" in train
    assert "decompressed and compared" in compress and "PNG" in compress and (place / "images.png").exists()
    assert "1,302 images decompressed" in decompress and "checksum correct" in decompress
    assert "nats per image" in train_binary and "binarized: above 127 is 1" in compress_binary
    from betavae.data.image_io import read_images

    found = read_images(place / "PICTURES", (1, 28, 28))
    for name, pixels in list(zip(found.names, found.pixels, strict=True))[::100]:
        assert np.array_equal(np.asarray(Image.open(place / "decompressed" / name)), pixels[0].numpy())
    wrong = run(
        "file=images.bvae", "out=x", f"ckpt={first_run(place)}", cwd=place, script="scripts/decompress.py", code=1
    )
    assert "compressed by another model" in wrong and not (place / "x").exists()
    (model,) = re.findall("ckpt=(.*)", compress)
    (place / "decompressed" / "a.png").write_bytes(b"a photograph")
    refused = run("out=decompressed", f"ckpt={model}", cwd=place, script="scripts/decompress.py", code=1)
    assert "a.png already exists and was not made by betavae" in refused and "decompressing" not in refused
    what_a_compressed_file_would_replace_stays_until_it_is_verified(place, model, tmp_path)


def what_a_compressed_file_would_replace_stays_until_it_is_verified(place, model, tmp_path):
    def compress(*args, **how):
        words = ("images=PICTURES/a.png", "report=false", f"ckpt={model}")
        return run(*words, *args, cwd=place, script="scripts/compress.py", **how)

    def break_decompress():
        import betavae.applications.compression.codec as compression

        decompress = compression.decompress
        compression.decompress = lambda *args: 255 - decompress(*args)

    ours, foreign = tmp_path / "ours.bvae", tmp_path / "foreign.bvae"
    compress(f"out={ours}")
    before = ours.read_bytes()
    wrong = compress("images=PICTURES/b.png", f"out={ours}", prepare=break_decompress, code=1)
    assert "decompression did not return the same images" in wrong
    assert ours.read_bytes() == before and list(tmp_path.iterdir()) == [ours]
    compress("images=PICTURES/b.png", f"out={ours}")
    assert ours.read_bytes() != before
    foreign.write_bytes(b"a thesis")
    ours.with_suffix(".png").write_bytes(b"a photograph")
    for out, message in (
        ("foreign.bvae", "foreign.bvae already exists and was not made by betavae"),
        ("ours.bvae", "ours.png already exists and was not made by betavae"),
        ("foreign.bvae/images.bvae", "cannot write"),
        ("new.png", "expected FILE.bvae"),
    ):  # before anything else: there is no such model
        assert message in compress(f"out={tmp_path / out}", "ckpt=nothing", "report=true", code=1)
    assert ". already exists" in compress("out=.", "ckpt=nothing", "report=true", code=1)
    # Else the picture of the table would be compressed the next time, or replace what was.
    assert "among the images" in compress("images=PICTURES", "out=PICTURES/of_all.bvae", "report=true", code=1)
    assert not (place / "PICTURES" / "of_all.bvae").exists()
    assert foreign.read_bytes() == b"a thesis" and ours.with_suffix(".png").read_bytes() == b"a photograph"


def first_run(place):
    return min(path for path in (place / "runs").iterdir() if path.is_dir())
