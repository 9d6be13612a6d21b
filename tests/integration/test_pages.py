"""The pages images.md, anomalies.md and compression.md run as written, from a folder of images to a model and back."""

import csv
import re

import numpy as np
import pytest
from PIL import Image

from tests.commands import run
from tests.integration.test_readme import PAGES, commands, small

pytestmark = pytest.mark.slow

SMALL_MODEL = ["model.hidden_dims=[32]", "model.latent_dim=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data_root):
    """A working folder whose IMAGE_FOLDER has bright discs and dark squares, some with alpha, and two damaged files."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "data").symlink_to(data_root)
    rng = np.random.default_rng(0)
    grid = np.mgrid[:24, :24]
    for number in range(1300):
        kind = ("discs", "squares")[number % 2]
        offset = np.abs(grid - rng.uniform(8, 16, (2, 1, 1)))
        shape = (offset**2).sum(0) < 30 if kind == "discs" else offset.max(0) < 5
        pixels = np.where(shape[..., None], rng.integers(150, 255, 3), rng.integers(0, 60, 3)).astype(np.uint8)
        alpha = np.full((24, 24, 1), 255 if number % 10 else 128, np.uint8)
        (folder / "IMAGE_FOLDER" / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate((pixels, alpha), 2)).save(folder / "IMAGE_FOLDER" / kind / f"{number}.png")
    for name, color in (("a", (200, 30, 30)), ("b", (30, 30, 200))):
        Image.new("RGB", (30, 20), color).save(folder / f"IMAGE_FOLDER/{name}.png")
    (folder / "IMAGE_FOLDER" / "broken.jpg").write_bytes(b"not an image")
    (folder / "IMAGE_FOLDER" / "cut.png").write_bytes((folder / "IMAGE_FOLDER/a.png").read_bytes()[:60])
    return folder


def run_page(page: str, folder, *overrides: str) -> dict[str, str]:
    """Run the commands of a page in their order; return the output of each."""
    outputs = {}
    for command in commands(PAGES[page]):
        if any(word in command for word in ("FILE.npy", "benchmarks/anomalies")):
            continue
        script, words = small(command)
        words = [re.sub("^images=test$", "images=IMAGE_FOLDER", word) for word in words]
        if script == "train.py":
            words += [*overrides, *SMALL_MODEL]
        outputs[command] = run(*words, cwd=folder, script=script)
        assert "Traceback" not in outputs[command] and "Warning" not in outputs[command]
    return outputs


@pytest.fixture(scope="module")
def outputs(folder):
    """The output of each command of images.md."""
    overrides = ("trainer.limit_train_batches=20", "trainer.max_epochs=2", "data.image_size=16")
    return run_page("images.md", folder, *overrides)


def test_images_page_from_a_folder_to_decoded_images(folder, outputs):
    train, benchmark, reconstruct, interpolate, encode, decode = (
        next(output for command, output in outputs.items() if name in command)
        for name in ("train.py", "benchmarks/data", "reconstruct", "interpolate", "encode", "decode")
    )
    assert re.search(r"6,000 images, 0.1 GB; 1 batches of 256\nmapped .*\nmemory .*\nmapped over memory: \d", benchmark)
    assert "2 could not be read: " in train and "neg. ELBO" in train
    assert all(f"{name} (" in train for name in ("cut.png", "broken.jpg"))
    assert "transparent parts filled with white" in reconstruct and "reconstructions.png" in reconstruct
    assert "1 interpolation by" in interpolate and "1,302 images" in encode and "1,302 images" in decode
    latents = np.load(folder / "latents.npz")
    assert latents["mean"].shape == latents["logvar"].shape == (1302, 4)
    assert set(latents["labels"]) == {".", "discs", "squares"}
    assert (latents["kl"] > 0).all() and latents["names"][0] == "a.png"
    decoded = Image.open(folder / "decoded" / "discs" / "0.png")
    assert decoded.size == (16, 16) and decoded.mode == "RGB"


def test_decode_keeps_a_file_that_it_did_not_write(folder, outputs):
    (folder / "decoded" / "a.png").write_bytes(b"mine")
    again = run("latents=latents.npz", "out=decoded", cwd=folder, script="scripts/decode.py", code=1)
    assert "a.png already exists" in again and (folder / "decoded" / "a.png").read_bytes() == b"mine"


def test_encode_agrees_with_the_model_in_each_format(folder, outputs):
    import torch

    import betavae
    from betavae.data.image_io import read_images

    run("images=IMAGE_FOLDER/discs", "out=discs.csv", cwd=folder, script="scripts/encode.py")
    rows = list(csv.DictReader((folder / "discs.csv").read_text().splitlines()))
    loaded = betavae.load(runs=str(folder / "runs"))
    found = read_images(folder / "IMAGE_FOLDER" / "discs", loaded.vae.image_shape)
    mean, logvar = loaded.vae.encode(found.pixels.float() / 255)
    assert [row["name"] for row in rows] == found.names
    encoded = torch.tensor([[float(row[f"mean_{d}"]) for d in range(4)] for row in rows])
    torch.testing.assert_close(encoded, mean, rtol=1e-4, atol=1e-5)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1)
    torch.testing.assert_close(torch.tensor([float(row["kl"]) for row in rows]), kl, rtol=1e-4, atol=1e-4)

    run("images=IMAGE_FOLDER/discs", "out=discs.parquet", cwd=folder, script="scripts/encode.py")
    table = pytest.importorskip("pyarrow.parquet").read_table(folder / "discs.parquet").to_pylist()
    assert [{key: str(value) for key, value in row.items()} for row in table] == [
        {key: value for key, value in row.items() if key in table[0]} for row in rows
    ]
    for suffix in ("csv", "parquet"):
        words = (f"latents=~/discs.{suffix}", f"out=~/from_{suffix}")
        run(*words, cwd=folder, script="scripts/decode.py", environment={"HOME": str(folder)})
    decoded = [sorted((folder / f"from_{suffix}").rglob("*.png")) for suffix in ("csv", "parquet")]
    assert len(decoded[0]) == len(rows)
    assert [path.read_bytes() for path in decoded[0]] == [path.read_bytes() for path in decoded[1]]
    run("images=IMAGE_FOLDER/discs", "out=discs.parquet", cwd=folder, script="scripts/encode.py")  # replaces its own
    (folder / "foreign.parquet").write_bytes(b"PAR1 of another program")
    for script, *words in (
        ("encode", "images=IMAGE_FOLDER/discs", "out=foreign.parquet"),
        ("decode", "latents=foreign.parquet"),
    ):
        rejected = run(*words, cwd=folder, script=f"scripts/{script}.py", code=1)
        assert "foreign.parquet" in rejected
    assert (folder / "foreign.parquet").read_bytes() == b"PAR1 of another program"


def test_own_test_images_keep_their_names(folder, outputs):
    run("images=test", "out=own.npz", cwd=folder, script="scripts/encode.py")
    run("images=IMAGE_FOLDER", "out=all.npz", cwd=folder, script="scripts/encode.py")
    own, all_ = np.load(folder / "own.npz"), np.load(folder / "all.npz")
    rows = [all_["names"].tolist().index(name) for name in own["names"]]
    assert 80 < len(rows) < 190 and own["labels"].tolist() == all_["labels"][rows].tolist()
    np.testing.assert_allclose(own["mean"], all_["mean"][rows], rtol=1e-4, atol=1e-5)


def test_moved_images_need_data_root(folder, outputs):
    (folder / "IMAGE_FOLDER").rename(folder / "MOVED")
    try:
        error = run("k=1", "probes=false", cwd=folder, script="scripts/evaluate.py", code=1)
        assert error.startswith("error: ") and error.count("\n") == 1 and "/dev/null" not in error
        assert "data=folder in IMAGE_FOLDER" in error and "data_root=PATH" in error
        output = run("data_root=MOVED", "k=1", "probes=false", cwd=folder, script="scripts/evaluate.py")
        assert "test images" in output
    finally:
        (folder / "MOVED").rename(folder / "IMAGE_FOLDER")


def test_anomalies_page_flags_images(folder, outputs):
    (text,) = run_page("anomalies.md", folder).values()
    assert re.search(r"flagged \d+ of 1,302 images at alpha=0.01", text) and "calibration images" in text
    rows = list(csv.DictReader((folder / "anomalies" / "scores.csv").read_text().splitlines()))
    unread = {row["name"]: row for row in rows if row["flagged"].startswith("not read: ")}
    assert set(unread) == {"broken.jpg", "cut.png"} and all(row["p_value"] == "" for row in unread.values())
    rows = [row for row in rows if row["name"] not in unread]
    assert len(rows) == 1302 and {"name", "label", "neg_elbo", "combined", "p_value", "flagged"} <= set(rows[0])
    assert [row["flagged"] == "True" for row in rows] == [float(row["p_value"]) <= 0.01 for row in rows]
    figures = {path.name for path in (folder / "anomalies").glob("*.png")}
    assert figures == {"histogram.png", "extremes.png", "where.png"}
    assert "fitting" in text and "fitted to some of these images" in text
    again = run("images=IMAGE_FOLDER", "alpha=0.001", cwd=folder, script="scripts/detect.py", code=1)
    assert "fitting" not in again and "alpha=0.001 needs at least 999 validation images" in again


@pytest.fixture(scope="module")
def compression(folder, outputs):
    """The output of each command of compression.md, and the path of the model of bytes."""
    found = run_page("compression.md", folder, "trainer.limit_train_batches=3")
    compress = next(output for command, output in found.items() if "images.bvae" in command)
    (model,) = re.findall("ckpt=(.*)", compress)
    return found, model


def test_compression_page_returns_the_same_images(folder, compression):
    from betavae.data.image_io import read_images

    train, compress, decompress, train_binary, compress_binary = compression[0].values()
    assert "bits per dimension" in train
    assert "decompressed and compared" in compress and "PNG" in compress and (folder / "images.png").exists()
    assert "1,302 images decompressed" in decompress and "checksum correct" in decompress
    assert "nats per image" in train_binary and "binarized: above 127 is 1" in compress_binary
    found = read_images(folder / "IMAGE_FOLDER", (1, 28, 28))
    for name, pixels in list(zip(found.names, found.pixels, strict=True))[::100]:
        assert np.array_equal(np.asarray(Image.open(folder / "decompressed" / name)), pixels[0].numpy())


def test_decompress_needs_its_model_and_its_own_files(folder, compression):
    other_model = min(path for path in (folder / "runs").iterdir() if path.is_dir())
    words = ("file=images.bvae", "out=x", f"ckpt={other_model}")
    wrong = run(*words, cwd=folder, script="scripts/decompress.py", code=1)
    assert "compressed by another model" in wrong and not (folder / "x").exists()
    (folder / "decompressed" / "a.png").write_bytes(b"a photograph")
    words = ("out=decompressed", f"ckpt={compression[1]}")
    rejected = run(*words, cwd=folder, script="scripts/decompress.py", code=1)
    assert "a.png already exists and was not made by betavae" in rejected and "decompressing" not in rejected


def test_compress_replaces_only_its_own_files_after_verification(folder, compression, tmp_path):
    def compress(*words, **how):
        words = ("images=IMAGE_FOLDER/a.png", "report=false", f"ckpt={compression[1]}", *words)
        return run(*words, cwd=folder, script="scripts/compress.py", **how)

    def break_decompress():
        import betavae.applications.compression.codec as codec

        decompress = codec.decompress
        codec.decompress = lambda *args: 255 - decompress(*args)

    own, foreign = tmp_path / "own.bvae", tmp_path / "foreign.bvae"
    compress(f"out={own}")
    before = own.read_bytes()
    wrong = compress("images=IMAGE_FOLDER/b.png", f"out={own}", prepare=break_decompress, code=1)
    assert "decompression did not return the same images" in wrong
    assert own.read_bytes() == before and list(tmp_path.iterdir()) == [own]
    compress("images=IMAGE_FOLDER/b.png", f"out={own}")
    assert own.read_bytes() != before
    foreign.write_bytes(b"a thesis")
    own.with_suffix(".png").write_bytes(b"a photograph")
    for out, message in (
        ("foreign.bvae", "foreign.bvae already exists and was not made by betavae"),
        ("own.bvae", "own.png already exists and was not made by betavae"),
        ("foreign.bvae/images.bvae", "cannot write"),
        ("new.png", "expected FILE.bvae"),
    ):  # checked before the checkpoint, which does not exist
        assert message in compress(f"out={tmp_path / out}", "ckpt=nothing", "report=true", code=1)
    assert ". already exists" in compress("out=.", "ckpt=nothing", "report=true", code=1)
    # A figure among the images would replace one of them, or be compressed the next time.
    among = compress("images=IMAGE_FOLDER", "out=IMAGE_FOLDER/of_all.bvae", "report=true", code=1)
    assert "among the images" in among and not (folder / "IMAGE_FOLDER" / "of_all.bvae").exists()
    assert foreign.read_bytes() == b"a thesis" and own.with_suffix(".png").read_bytes() == b"a photograph"
