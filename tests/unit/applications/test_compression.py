"""Tests of lossless compression and its files."""

import gzip
import hashlib
import json
import lzma
import math
import os
import signal
import struct

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from betavae.applications.compression import file_format, report, reproducible
from betavae.applications.compression.ans import Stack, quantize_cdf
from betavae.applications.compression.codec import GRID, MARGIN, Codec, compress, decompress, deterministic_cpu
from betavae.applications.compression.file_format import (
    COMPRESSED_MAGIC,
    output_paths,
    read_file,
    write_file,
    write_images,
)
from betavae.errors import UserError
from betavae.models.vae import VAE, Posterior
from betavae.objectives import elbo
from tests.commands import REPO, fresh


def make_vae(likelihood="logistic_mixture", shape=(1, 4, 3), latent_dim=2, seed=0, network="mlp"):
    """Make an untrained VAE whose posteriors differ from the prior."""
    torch.manual_seed(seed)
    vae = VAE(network, [6], latent_dim, "silu", likelihood, shape)
    vae.requires_grad_(False)
    for parameter in vae.parameters():
        parameter.mul_(3)
    return vae


def draw_images(count, shape=(1, 4, 3), seed=0):
    return torch.randint(256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def modify(compressed, **changes):
    """Change fields without validation."""
    return compressed.model_copy(update=changes)


@given(
    count=st.integers(1, 30),
    lanes=st.integers(1, 9),
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(1, 4), st.integers(1, 4)),
    likelihood=st.sampled_from(["logistic_mixture", "bernoulli"]),
    kind=st.sampled_from(["noise", "black", "white", "flat"]),
    seed=st.integers(0, 5),
)
@example(1, 1, (1, 1, 1), "logistic_mixture", "white", 3)  # costs -32 bits
@settings(max_examples=40, deadline=None)
def test_decompressed_images_are_equal(count, lanes, shape, likelihood, kind, seed):
    images = draw_images(count, shape, seed)
    if kind != "noise":
        images = torch.full_like(images, {"black": 0, "white": 255, "flat": 255 * (seed % 2)}[kind])
    if likelihood == "bernoulli":
        images = (images > 127).to(torch.uint8) * 255
    vae = make_vae(likelihood, shape, latent_dim=1 + seed, seed=seed)
    compressed = compress(vae, images, lanes)
    assert torch.equal(decompress(vae, compressed), images)
    assert compressed.count == count and compressed.heads <= lanes


def test_conv_network_with_hundreds_of_images():
    vae, images = make_vae(shape=(3, 8, 8), network="conv"), draw_images(700, (3, 8, 8))
    assert torch.equal(decompress(vae, compress(vae, images)), images)


@pytest.mark.parametrize("bits", [1, 8])
def test_coder_reaches_the_entropy_within_a_thousandth(bits):
    size, lanes, count = 2**bits, 16, 2048
    p = np.array([0.98, 0.02]) if bits == 1 else np.random.default_rng(0).dirichlet(np.full(size, 0.2))
    table = np.concatenate(([0], p.cumsum()))
    # Each symbol occurs as often as expected, so that the size to measure is the entropy itself.
    symbols = np.searchsorted(table, (np.arange(lanes * count) + 0.5) / (lanes * count), "right") - 1.0
    symbols = np.random.default_rng(1).permutation(symbols).reshape(count, lanes)
    stack = Stack()
    stack.grow(lanes)
    before = np.log2(stack.heads.astype(float)).sum()

    def cumulative(symbols):
        return quantize_cdf(table[symbols.astype(int)], symbols, size)

    for row in symbols:
        stack.push(cumulative, row, bits)
    heads, words = stack.get_content()
    used = 32 * len(words) + np.log2(heads.astype(float)).sum() - before
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum()
    assert used / symbols.size == pytest.approx(entropy, rel=1e-3)
    again = Stack(heads, words)
    for row in symbols[::-1]:
        assert np.array_equal(again.pop(cumulative, lanes, bits), row)
    with pytest.raises(EOFError):
        again.pop_words(1)


def test_popping_random_bits_draws_from_the_distribution():
    p = np.array([0.5, 0.25, 0.2, 0.05])
    table = np.concatenate(([0], p.cumsum()))
    stack = Stack()
    stack.grow(2000)
    counts = np.zeros(4)
    for _ in range(50):
        drawn = stack.pop(lambda symbols: quantize_cdf(table[symbols.astype(int)], symbols, 4), 2000, 2)
        counts += np.bincount(drawn.astype(int), minlength=4)
    assert counts / counts.sum() == pytest.approx(p, abs=0.006)  # four standard errors
    assert stack.borrowed >= 2000


def test_shares_are_probabilities_of_likelihood_and_posterior():
    vae = make_vae()
    codec = Codec(vae)
    bins = np.full((2, 1), 5000.0)
    z = torch.special.ndtri(torch.tensor(5000.5 / 2**14)).float().repeat(1, 2)
    expected = vae.likelihood.probabilities(vae.decode_params(z).double()).view(12, 256).numpy()
    symbols = np.arange(257.0)[:, None]
    for i, row in enumerate(expected):
        below = codec.build_pixels(bins, 0)(i)(symbols).ravel()
        assert np.diff(np.concatenate(([0], below[1:256] / 2**24, [1]))) == pytest.approx(row, abs=2e-3)
    image = draw_images(1)
    posterior = vae.encode(image.float() / 255)
    below = codec.build_posterior(image.view(1, -1).numpy().astype(float), 0)(1)(
        np.array([[4096.0]])
    )  # the prior's quartile
    normal = torch.distributions.Normal(posterior.mean[0, 1], (0.5 * posterior.logvar[0, 1]).exp())
    assert below.item() / 2**24 == pytest.approx(normal.cdf(torch.tensor(-0.6744898)).item(), abs=1e-3)


@pytest.mark.parametrize("likelihood", ["logistic_mixture", "bernoulli"])
def test_size_is_the_negative_elbo_within_a_hundredth(likelihood):
    shape = (1, 3, 3)
    vae, images = make_vae(likelihood, shape, latent_dim=4, seed=3), draw_images(2000, shape) // 3
    if likelihood == "bernoulli":
        images = (images > 40).to(torch.uint8) * 255
    with torch.no_grad():
        terms = elbo(vae, images.float() / 255, torch.randn(100, len(images), 4), 1.0)
    # A coder that returned no bits would be far off. So would one that drew latents from unflipped bits, since the
    # aggregate posterior is far from the prior.
    assert terms.kl.sum(1).mean() > 1
    compressed = compress(vae, images, lanes=8)
    bits = 8 * len(compressed.payload) - compressed.initial_bits
    expected = (terms.recon + terms.kl.sum(1)).sum().item() / math.log(2)
    assert bits == pytest.approx(expected, rel=0.01)
    assert compressed.initial_bits <= 4 * 32  # one image: 4 latents and a head
    assert compressed.bits_per_dimension() == pytest.approx((bits + compressed.initial_bits) / (2000 * 9))


def test_threads_autocast_and_precision_have_no_effect():
    vae, images = make_vae(), draw_images(20)
    expected = compress(vae, images)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert compress(vae, images) == expected
            assert torch.equal(decompress(vae, expected), images)
        assert torch.get_num_threads() == threads + 1  # unchanged for the caller
    finally:
        torch.set_num_threads(threads)


def make_saturated_vae():
    """Make a model that is nearly certain of some bytes, as a trained one is of a black background."""
    vae = make_vae()
    _, means, log_scales = vae.decoder[-2].bias.view(3, 3, -1)  # of three components
    means[:, ::2] = 0
    log_scales[:, ::2] = -8
    return vae


@pytest.mark.parametrize("faults", [False, True], ids=["instructions", "faults"])
def test_other_machines_decompress_the_same_images(tmp_path, faults):
    """Decompress with other vector instructions, or with simulated faults of the last bits (other_machine.py)."""
    models = {
        "saturated": make_saturated_vae(),
        "bernoulli": make_vae("bernoulli"),
        "conv": make_vae(shape=(3, 8, 8), network="conv"),
    }
    for name, vae in models.items():
        images = draw_images(300, vae.image_shape)
        images = images // 128 * 255 if name == "bernoulli" else images // 64
        write_file(tmp_path / f"{name}.bvae", compress(vae, images))
        torch.save((vae, images), tmp_path / f"{name}.pt")
    if faults:
        fresh("-m", "tests.unit.applications.other_machine", str(tmp_path), "faults", cwd=REPO)
    else:
        other = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "3"}
        fresh("-m", "tests.unit.applications.other_machine", str(tmp_path), cwd=REPO, **other)


def test_outputs_near_the_rounding_threshold_are_listed(monkeypatch):
    vae, images = make_vae(), draw_images(40)
    for parameter in (vae.encoder[-1].weight, vae.decoder[-2].weight):
        parameter.zero_()
    for bias in (vae.encoder[-1].bias, vae.decoder[-2].bias):
        bias.fill_(GRID / 3)
    compressed = compress(vae, images)
    assert [len(listed) for listed in compressed.near] == [40 * 4, 40 * 108]
    decode, encode = VAE.decode_params, VAE.encode
    for sign in (-1, 1):
        off = sign * MARGIN / 2
        monkeypatch.setattr(VAE, "decode_params", lambda self, z, off=off: decode(self, z) + off)
        monkeypatch.setattr(VAE, "encode", lambda self, x, off=off: Posterior(*(y + off for y in encode(self, x))))
        wrong = modify(compressed, near=[[], []], probabilities=compute_fingerprint(vae))
        assert torch.equal(decompress(vae, modify(compressed, probabilities=compute_fingerprint(vae))), images)
        if sign < 0:
            with rejected("other probabilities"):
                decompress(vae, wrong)


def compute_fingerprint(vae):
    with deterministic_cpu():
        return Codec(vae).compute_fingerprint()


def test_rounded_functions_are_far_from_ties():
    """The distance is hundreds of units in the last place, while libraries differ by a few."""

    def distance(scaled):
        scaled = scaled[np.isfinite(scaled) & (scaled != 0)]
        return (np.abs(scaled - np.floor(scaled) - 0.5) / np.spacing(np.abs(scaled))).min()

    exponents = np.arange(-30 / (GRID / 2), 30 / (GRID / 2) + 1) * (GRID / 2)
    quantiles = torch.special.ndtri(torch.arange(2**15 + 1).double() / 2**15).numpy()
    assert distance(np.frexp(np.exp(exponents))[0] * 2**reproducible.EXP_BITS) > 300
    assert distance(quantiles / reproducible.QUANTILE_UNIT) > 300
    for distribution, function in (
        (reproducible.LOGISTIC, lambda x: 1 / (1 + np.exp(-x))),
        (reproducible.NORMAL, lambda x: torch.special.ndtr(torch.from_numpy(x)).numpy()),
    ):
        knots = np.arange(-distribution.end, distribution.end + reproducible.STEP, reproducible.STEP)
        assert distance(function(knots) / reproducible.CDF_UNIT) > 300
        assert distribution(knots[[0, -1]]).tolist() == [0, 1]
        assert np.array_equal(distribution(knots), distribution.values)
        between = np.random.default_rng(0).uniform(-9, 9, 10_000)
        assert np.abs(distribution(between) - function(between)).max() < 1e-6
        assert (np.diff(distribution(np.sort(between))) >= 0).all()


def rejected(message):
    return pytest.raises(UserError, match=message)


def test_unsuitable_models_and_images_are_rejected():
    vae = make_vae()
    with rejected("logistic_mixture"):
        compress(make_vae("gaussian"), draw_images(2))
    with rejected("logistic_mixture"):
        compress(make_vae("continuous_bernoulli"), draw_images(2))
    with rejected("binarized"):
        compress(make_vae("bernoulli"), draw_images(2))
    for images in (draw_images(2).float(), draw_images(2, (1, 3, 4)), draw_images(2)[0], draw_images(0)):
        with rejected("uint8 of shape"):
            compress(vae, images)
    with rejected("lanes=0"):
        compress(vae, draw_images(2), lanes=0)
    with rejected("names"):
        compress(vae, draw_images(2), names=["one"])
    vae.decoder[-2].bias[0] = math.nan
    with rejected("not finite"):
        compress(vae, draw_images(2))


def test_other_model_is_rejected():
    vae = make_vae()
    compressed = compress(vae, draw_images(3))
    other = make_vae()
    next(other.parameters()).view(-1)[0].add_(1e-6)
    with rejected("another model"):
        decompress(other, compressed)
    with rejected("another model"):
        decompress(vae, modify(compressed, image_shape=[1, 1, 1]))
    relu = VAE("mlp", [6], 2, "relu", "logistic_mixture", (1, 4, 3))
    relu.load_state_dict(vae.state_dict())
    with rejected("another model"):
        decompress(relu, compressed)


def test_other_probabilities_raise_an_error(monkeypatch):
    vae, images = make_vae(), draw_images(50)
    compressed = compress(vae, images)
    decode = VAE.decode_params
    monkeypatch.setattr(VAE, "decode_params", lambda self, z: decode(self, z) + 0.001)
    with rejected("other probabilities"):  # found by the fingerprint
        decompress(vae, compressed)
    with deterministic_cpu():
        other = Codec(vae).compute_fingerprint()
    reached = []
    build = Codec.build_posterior
    monkeypatch.setattr(Codec, "build_posterior", lambda *args: reached.append(1) or build(*args))
    with rejected("other probabilities"):  # found by the checksum of the images
        decompress(vae, modify(compressed, probabilities=other))
    assert len(reached) > 1


def test_modified_payload_raises_an_error():
    vae = make_vae()
    compressed = compress(vae, draw_images(30))
    first = compressed.initial_bits // 8  # No image depends on the borrowed bits before it.
    for at in range(first, len(compressed.payload), 97):
        payload = bytearray(compressed.payload)
        payload[at] ^= 1
        with rejected("other probabilities"):
            decompress(vae, modify(compressed, payload=bytes(payload)))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "images.bv"
    write_file(path, compress(make_vae(), draw_images(12), names=[f"{i}.png" for i in range(12)]))
    return path


def test_file_round_trip(file):
    compressed = read_file(file)
    assert compressed == compress(make_vae(), draw_images(12), names=[f"{i}.png" for i in range(12)])
    assert torch.equal(decompress(make_vae(), compressed), draw_images(12))
    assert [path.name for path in file.parent.iterdir()] == ["images.bv"]


def test_damaged_file_is_rejected_wherever_the_damage_is(file):
    whole, random = file.read_bytes(), np.random.default_rng(0)
    for at in random.integers(len(whole), size=300):
        faulty = bytearray(whole)
        faulty[at] ^= 1 << random.integers(8)
        file.write_bytes(faulty)
        with rejected("is damaged|is not a file of compressed images"):
            read_file(file)
    for at in random.integers(len(whole), size=50):
        for faulty in (whole[:at], whole[:at] + whole[at + 1 :], whole + whole[:1]):
            file.write_bytes(faulty)
            with rejected("is damaged|is not a file of compressed images"):
                read_file(file)
    with rejected("is not readable"):
        read_file(file.with_name("nothing"))
    with rejected("is not readable"):
        read_file(file.parent)


def replace_header(whole, change):
    """Replace the header of a file, with a correct checksum."""
    start = len(COMPRESSED_MAGIC) + 8
    version, size = struct.unpack_from("<II", whole, len(COMPRESSED_MAGIC))
    header = change(whole[start : start + size])
    body = COMPRESSED_MAGIC + struct.pack("<II", version, len(header)) + header + whole[start + size : -32]
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"batches": "12"},
        {"batches": []},
        {"batches": [10**30]},
        {"batches": [2.0]},
        {"batches": [True]},
        {"batches": [0, 12]},
        {"batches": [4096]},  # more heads than bytes
        {"batches": None},
        {"image_shape": [1, 10**12, 3]},
        {"image_shape": [12]},
        {"image_shape": {"C": 1}},
        {"near": [[], [-1]]},
        {"near": [[]]},
        {"initial_bits": -1},
        {"initial_bits": 10**400},
        {"model": 5},
        {"images": "0" * 63},
        {"batches": [12] * 10_000},  # more images than bytes
        {"image_shape": [3, 2**16, 2**16]},
        {"names": ["one"]},
        {"another": 1},
    ],
    ids=str,
)
def test_invalid_header_fields_are_rejected(file, changes):
    def change(header):
        fields = lzma.decompress(header).partition(b"\n")[0]  # without names, whose number may not fit
        return pack(json.dumps(json.loads(fields) | changes).encode())

    file.write_bytes(replace_header(file.read_bytes(), change))
    with rejected("its header is invalid"):
        read_file(file)


def test_malformed_header_is_rejected(file):
    whole = file.read_bytes()
    fields, _, names = lzma.decompress(read_packed_header(whole)).partition(b"\n")
    lacking = b'{"batches": [12]}'
    for header in (b"", b"[", b"[1]", b"null", b"\xff", b"[" * 10**5, b"9" * 5000, lacking):
        file.write_bytes(replace_header(whole, lambda _, header=header: pack(header)))
        with rejected("its header is invalid"):
            read_file(file)
    for raw in (b"", b"not LZMA", b"\x5d\xff\xff\xff\xff" + b"\xff" * 8 + b"\0" * 9):  # dictionary of 4 GB
        file.write_bytes(replace_header(whole, lambda _, raw=raw: raw))
        with rejected("its header is invalid"):
            read_file(file)
    # Too few and too many names, and a valid header behind a million spaces.
    for header in (fields + b"\n", fields + b"\n" + names + b"\0", b" " * 2**21 + fields + b"\n" + names):
        file.write_bytes(replace_header(whole, lambda _, header=header: pack(header)))
        with rejected("its header is invalid"):
            read_file(file)
    file.write_bytes(replace_header(whole, lambda _: pack(fields + b"\n" + names)))
    assert read_file(file).count == 12


def pack(header):
    return lzma.compress(header, lzma.FORMAT_ALONE)


def read_packed_header(whole):
    found = []
    replace_header(whole, lambda header: found.append(header) or header)
    return found[0]


def test_numbered_names_take_less_than_a_byte_each(file):
    one = compress(make_vae(), draw_images(1))
    sizes = []
    for names in (None, [f"picture_{i:05d}.png" for i in range(4096)]):
        many = modify(one, payload=bytes(8 * 4096), batches=[4096], names=names)
        write_file(file, many)
        assert read_file(file) == many
        sizes.append(file.stat().st_size)
    assert sizes[1] - sizes[0] < 4096  # less than a byte each


def test_images_without_information_take_a_byte_each(tmp_path):
    """Otherwise a small file could claim any number of images."""
    vae, images = make_vae("bernoulli"), torch.zeros(20_000, 1, 4, 3, dtype=torch.uint8)
    vae.decoder[-2].bias.fill_(-30)
    for parameter in (vae.encoder[-1].weight, vae.encoder[-1].bias, vae.decoder[-2].weight):
        parameter.zero_()
    compressed = compress(vae, images)
    assert len(compressed.payload) == 20_060
    names = [f"ü/{i}\udcff.png" for i in range(len(images))]
    write_file(tmp_path / "a", modify(compressed, names=names))
    assert torch.equal(decompress(vae, read_file(tmp_path / "a")), images) and read_file(tmp_path / "a").names == names
    with rejected("names of the images are too long"):
        write_file(tmp_path / "a", modify(compressed, names=[f"{i:0200}" for i in range(len(images))]))


def test_other_format_version_is_rejected(file, monkeypatch):
    monkeypatch.setattr(file_format, "FORMAT", 4)
    write_file(file, compressed := compress(make_vae(), draw_images(2)))
    monkeypatch.undo()
    with rejected("has format 4"):
        read_file(file)
    write_file(file, compressed)  # A file of another version may be replaced.
    assert read_file(file) == compressed


def test_foreign_file_is_not_replaced(tmp_path):
    foreign = tmp_path / "thesis.pdf"
    for content in (b"", b"%PDF", COMPRESSED_MAGIC[:-1]):
        foreign.write_bytes(content)
        with rejected("not made by betavae"):
            write_file(foreign, compress(make_vae(), draw_images(1)))
        assert foreign.read_bytes() == content
    with rejected("is not writable"):
        write_file(foreign / "file", compress(make_vae(), draw_images(1)))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_writer_leaves_the_old_file(file, call, monkeypatch):
    before, compressed = file.read_bytes(), compress(make_vae(), draw_images(20))
    child = os.fork()
    if not child:
        monkeypatch.setattr(os, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        write_file(file, compressed)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert file.read_bytes() == before
    assert all(path.suffix == ".part" for path in file.parent.iterdir() if path != file)


def test_interrupted_writer_leaves_no_temporary_file(file, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(file, compress(make_vae(), draw_images(2)))
    assert len(list(file.parent.iterdir())) == 1


def test_images_never_replace_foreign_files(tmp_path):
    images, out = draw_images(12), tmp_path / "images"
    write_images(images, None, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(before) == [f"{i:02d}.png" for i in range(12)]
    write_images(images, None, out)  # Files of this project may be replaced.
    (out / "11.png").write_bytes(b"a photograph")
    with rejected("11.png already exists and was not made by betavae"):
        write_images(255 - images, None, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before | {"11.png": b"a photograph"}
    long = "x" * 251 + ".png"  # the longest name
    write_images(images[:1], [long], tmp_path)
    assert (tmp_path / long).exists()
    (tmp_path / "file").write_bytes(b"")
    for names, where, message in (
        (None, tmp_path / "file", "cannot write"),
        (["../x"] * 12, out, "leads out"),
        (["x"] * 12, out, "one file"),
    ):
        with rejected(message):
            output_paths(names, 12, where)


def test_baselines_and_neg_elbo_are_in_bits_per_dimension():
    images = draw_images(5, (1, 8, 8)) // 128 * 255
    bits = report.compute_baseline_bits(images)
    packed = [np.packbits(image.numpy().ravel() > 0).tobytes() for image in images]
    single = sum(len(gzip.compress(part, 9)) for part in packed)
    assert bits["gzip"] == (8 * single / 320, 8 * len(gzip.compress(b"".join(packed), 9)) / 320)
    assert bits["xz"][0] is None and {"PNG", "WebP", "bz2"} <= set(bits)
    vae = make_vae("bernoulli", (1, 8, 8))
    with torch.no_grad():
        terms = elbo(vae, images.float() / 255, torch.randn(500, 5, 2), 1.0)
    nats = (terms.recon + terms.kl.sum(1)).sum().item()
    assert report.compute_neg_elbo_bits(vae, images, 500) == pytest.approx(nats / math.log(2) / 320, rel=0.01)
    assert report.format_table({"a": (None, 1.5), "b": (2.0, 1.0)}).splitlines()[2].split() == ["b", "2.0000", "1.0000"]
