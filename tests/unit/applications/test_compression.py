import hashlib
import json
import lzma
import math
import os
import signal
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from betavae.applications.compression import file_format, reproducible
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


def small(likelihood="logistic_mixture", shape=(1, 4, 3), latent_dim=2, seed=0, network="mlp"):
    """An untrained VAE whose posteriors are nevertheless far from the prior."""
    torch.manual_seed(seed)
    vae = VAE(network, [6], latent_dim, "silu", likelihood, shape)
    vae.requires_grad_(False)
    for parameter in vae.parameters():
        parameter.mul_(3)
    return vae


def noise(count, shape=(1, 4, 3), seed=0):
    return torch.randint(256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@given(
    count=st.integers(1, 30),
    lanes=st.integers(1, 9),
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(1, 4), st.integers(1, 4)),
    likelihood=st.sampled_from(["logistic_mixture", "bernoulli"]),
    kind=st.sampled_from(["noise", "black", "white", "flat"]),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_images_come_back_as_they_were(count, lanes, shape, likelihood, kind, seed):
    images = noise(count, shape, seed)
    if kind != "noise":
        images = torch.full_like(images, {"black": 0, "white": 255, "flat": 255 * (seed % 2)}[kind])
    if likelihood == "bernoulli":
        images = (images > 127).to(torch.uint8) * 255
    vae = small(likelihood, shape, latent_dim=1 + seed, seed=seed)
    compressed = compress(vae, images, lanes)
    assert torch.equal(decompress(vae, compressed), images)
    assert compressed.count == count and compressed.heads <= lanes


def test_convolutions_and_hundreds_of_lanes():
    vae, images = small(shape=(3, 8, 8), network="conv"), noise(700, (3, 8, 8))
    assert torch.equal(decompress(vae, compress(vae, images)), images)


@pytest.mark.parametrize("bits", [1, 8])
def test_coder_takes_the_entropy_within_a_thousandth(bits):
    size, lanes, count = 2**bits, 16, 2048
    p = np.array([0.98, 0.02]) if bits == 1 else np.random.default_rng(0).dirichlet(np.full(size, 0.2))
    table = np.concatenate(([0], p.cumsum()))
    # Each symbol as often as it is expected, in any order: what is measured is then the entropy itself.
    symbols = np.searchsorted(table, (np.arange(lanes * count) + 0.5) / (lanes * count), "right") - 1.0
    symbols = np.random.default_rng(1).permutation(symbols).reshape(count, lanes)
    stack = Stack()
    stack.grow(lanes)
    before = np.log2(stack.heads.astype(float)).sum()

    def cumulative(symbols):
        return quantize_cdf(table[symbols.astype(int)], symbols, size)

    for row in symbols:
        stack.push(cumulative, row, bits)
    heads, words = stack.content()
    used = 32 * len(words) + np.log2(heads.astype(float)).sum() - before
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum()
    assert used / symbols.size == pytest.approx(entropy, rel=1e-3)
    again = Stack(heads, words)
    for row in symbols[::-1]:
        assert np.array_equal(again.pop(cumulative, lanes, bits), row)
    with pytest.raises(EOFError):  # nothing is made up for what was never pushed
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


def test_shares_are_the_likelihood_s_and_the_posterior_s_probabilities():
    vae = small()
    codec = Codec(vae)
    bins = np.full((2, 1), 5000.0)
    z = torch.special.ndtri(torch.tensor(5000.5 / 2**14)).float().repeat(1, 2)
    expected = vae.likelihood.probabilities(vae.decode_params(z).double()).view(12, 256).numpy()
    symbols = np.arange(257.0)[:, None]
    for i, row in enumerate(expected):
        below = codec.pixels(bins, 0)(i)(symbols).ravel()
        assert np.diff(np.concatenate(([0], below[1:256] / 2**24, [1]))) == pytest.approx(row, abs=2e-3)
    image = noise(1)
    posterior = vae.encode(image.float() / 255)
    below = codec.posterior(image.view(1, -1).numpy().astype(float), 0)(1)(np.array([[4096.0]]))  # the prior's quartile
    normal = torch.distributions.Normal(posterior.mean[0, 1], (0.5 * posterior.logvar[0, 1]).exp())
    assert below.item() / 2**24 == pytest.approx(normal.cdf(torch.tensor(-0.6744898)).item(), abs=1e-3)


@pytest.mark.parametrize("likelihood", ["logistic_mixture", "bernoulli"])
def test_length_is_the_negative_elbo_within_a_hundredth(likelihood):
    shape = (1, 3, 3)
    vae, images = small(likelihood, shape, latent_dim=4, seed=3), noise(2000, shape) // 3
    if likelihood == "bernoulli":
        images = (images > 40).to(torch.uint8) * 255
    with torch.no_grad():
        terms = elbo(vae, images.float() / 255, torch.randn(100, len(images), 4), 1.0)
    # A coder that got no bits back would be far off; so would one that drew its latents from bits as they come, since
    # these posteriors together are nothing like the prior.
    assert terms.kl.sum(1).mean() > 1
    compressed = compress(vae, images, lanes=8)
    bits = 8 * len(compressed.payload) - compressed.initial_bits
    expected = (terms.recon + terms.kl.sum(1)).sum().item() / math.log(2)
    assert bits == pytest.approx(expected, rel=0.01)
    assert compressed.initial_bits <= 4 * 32  # one image's: of 4 latents and a head
    assert compressed.bits_per_dimension() == pytest.approx((bits + compressed.initial_bits) / (2000 * 9))


def test_threads_autocast_and_matmul_precision_change_nothing():
    vae, images = small(), noise(20)
    expected = compress(vae, images)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert compress(vae, images) == expected
            assert torch.equal(decompress(vae, expected), images)
        assert torch.get_num_threads() == threads + 1  # as the caller had it
    finally:
        torch.set_num_threads(threads)


def saturated():
    """A model that is nearly certain of some bytes, as a trained one is of a black background."""
    vae = small()
    _, means, log_scales = vae.decoder[-2].bias.view(3, 3, -1)  # of three components
    means[:, ::2] = 0
    log_scales[:, ::2] = -8
    return vae


@pytest.mark.parametrize("faults", [False, True], ids=["instructions", "faults"])
def test_a_process_whose_last_bits_differ_gives_the_same_images(tmp_path, faults):
    """By other vector instructions, or by faults (see other_machine.py)."""
    models = {"saturated": saturated(), "bernoulli": small("bernoulli"), "conv": small(shape=(3, 8, 8), network="conv")}
    for name, vae in models.items():
        images = noise(300, vae.image_shape)
        images = images // 128 * 255 if name == "bernoulli" else images // 64
        write_file(tmp_path / f"{name}.bvae", compress(vae, images))
        torch.save((vae, images), tmp_path / f"{name}.pt")
    if faults:
        fresh("-m", "tests.unit.applications.other_machine", str(tmp_path), "faults", cwd=REPO)
    else:
        other = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "3"}
        fresh("-m", "tests.unit.applications.other_machine", str(tmp_path), cwd=REPO, **other)


def test_outputs_on_the_edge_of_rounding_are_listed(monkeypatch):
    vae, images = small(), noise(40)
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
        wrong = replace(compressed, near=[[], []], probabilities=fingerprint(vae))
        assert torch.equal(decompress(vae, replace(compressed, probabilities=fingerprint(vae))), images)
        if sign < 0:
            with refused("other probabilities"):
                decompress(vae, wrong)


def fingerprint(vae):
    with deterministic_cpu():
        return Codec(vae).fingerprint()


def test_rounded_functions_are_far_from_ties():
    """By hundreds of units in the last place, where libraries differ by a few."""

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
        assert distribution(knots[[0, -1]]).tolist() == [0, 1] and np.array_equal(
            distribution(knots), distribution.values
        )
        between = np.random.default_rng(0).uniform(-9, 9, 10_000)
        assert np.abs(distribution(between) - function(between)).max() < 1e-6
        assert (np.diff(distribution(np.sort(between))) >= 0).all()


def refused(message):
    return pytest.raises(UserError, match=message)


def test_what_cannot_be_compressed_is_refused():
    vae = small()
    with refused("logistic_mixture"):
        compress(small("gaussian"), noise(2))
    with refused("logistic_mixture"):
        compress(small("continuous_bernoulli"), noise(2))
    with refused("binarised"):
        compress(small("bernoulli"), noise(2))
    for images in (noise(2).float(), noise(2, (1, 3, 4)), noise(2)[0], noise(0)):
        with refused("uint8 of shape"):
            compress(vae, images)
    with refused("lanes=0"):
        compress(vae, noise(2), lanes=0)
    with refused("names"):
        compress(vae, noise(2), names=["one"])
    vae.decoder[-2].bias[0] = math.nan
    with refused("not finite"):
        compress(vae, noise(2))


def test_another_model_is_refused():
    vae = small()
    compressed = compress(vae, noise(3))
    other = small()
    next(other.parameters()).view(-1)[0].add_(1e-6)
    with refused("another model"):
        decompress(other, compressed)
    with refused("another model"):  # whose images are larger than the file says
        decompress(vae, replace(compressed, image_shape=[1, 1, 1]))
    relu = VAE("mlp", [6], 2, "relu", "logistic_mixture", (1, 4, 3))
    relu.load_state_dict(vae.state_dict())
    with refused("another model"):
        decompress(relu, compressed)


def test_a_machine_with_other_probabilities_gives_an_error_and_no_noise(monkeypatch):
    vae, images = small(), noise(50)
    compressed = compress(vae, images)
    decode = VAE.decode_params
    monkeypatch.setattr(VAE, "decode_params", lambda self, z: decode(self, z) + 0.001)
    with refused("other probabilities"):  # at once, by the probabilities of fixed images
        decompress(vae, compressed)
    with deterministic_cpu():
        other = Codec(vae).fingerprint()
    reached = []
    monkeypatch.setattr(Codec, "posterior", lambda *args, real=Codec.posterior: reached.append(1) or real(*args))
    with refused("other probabilities"):  # and if those were alike, by the images' checksum
        decompress(vae, replace(compressed, probabilities=other))
    assert len(reached) > 1


def test_a_payload_that_is_not_the_one_written_gives_an_error():
    vae = small()
    compressed = compress(vae, noise(30))
    first = compressed.initial_bits // 8  # below lie the borrowed bits, which no image depends on
    for at in range(first, len(compressed.payload), 97):
        payload = bytearray(compressed.payload)
        payload[at] ^= 1
        with refused("other probabilities"):
            decompress(vae, replace(compressed, payload=bytes(payload)))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "images.bv"
    write_file(path, compress(small(), noise(12), names=[f"{i}.png" for i in range(12)]))
    return path


def test_a_file_holds_everything(file):
    compressed = read_file(file)
    assert compressed == compress(small(), noise(12), names=[f"{i}.png" for i in range(12)])
    assert torch.equal(decompress(small(), compressed), noise(12))
    assert [path.name for path in file.parent.iterdir()] == ["images.bv"]


def test_a_faulty_file_is_refused_wherever_the_fault_is(file):
    whole, random = file.read_bytes(), np.random.default_rng(0)
    for at in random.integers(len(whole), size=300):
        faulty = bytearray(whole)
        faulty[at] ^= 1 << random.integers(8)
        file.write_bytes(faulty)
        with refused("damaged|holds no images"):
            read_file(file)
    for at in random.integers(len(whole), size=50):
        for faulty in (whole[:at], whole[:at] + whole[at + 1 :], whole + whole[:1]):
            file.write_bytes(faulty)
            with refused("damaged|holds no images"):
                read_file(file)
    with refused("cannot read"):
        read_file(file.with_name("nothing"))
    with refused("cannot read"):
        read_file(file.parent)


def with_header(whole, change):
    """The file with another header, its checksum as it must be."""
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
        {"batches": [4096]},  # more heads than there are bytes
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
        {"batches": [12] * 10_000},  # more images than there are bytes
        {"image_shape": [3, 2**16, 2**16]},
        {"names": ["one"]},
        {"another": 1},
    ],
    ids=str,
)
def test_a_header_that_nobody_wrote_is_refused(file, changes):
    def change(header):
        fields = lzma.decompress(header).partition(b"\n")[0]  # without names, whose number may be wrong too
        return packed(json.dumps(json.loads(fields) | changes).encode())

    file.write_bytes(with_header(file.read_bytes(), change))
    with refused("header that this project does not write"):
        read_file(file)


def test_a_header_that_is_none_is_refused(file):
    whole = file.read_bytes()
    fields, _, names = lzma.decompress(with_header_of(whole)).partition(b"\n")
    lacking = b'{"batches": [12]}'
    for header in (b"", b"[", b"[1]", b"null", b"\xff", b"[" * 10**5, b"9" * 5000, lacking):
        file.write_bytes(with_header(whole, lambda _, header=header: packed(header)))
        with refused("header that this project does not write"):
            read_file(file)
    for raw in (b"", b"not LZMA", b"\x5d\xff\xff\xff\xff" + b"\xff" * 8 + b"\0" * 9):  # a dictionary of 4 GB
        file.write_bytes(with_header(whole, lambda _, raw=raw: raw))
        with refused("header that this project does not write"):
            read_file(file)
    # Other numbers of names, and what would be a header, were its million spaces unpacked.
    for header in (fields + b"\n", fields + b"\n" + names + b"\0", b" " * 2**21 + fields + b"\n" + names):
        file.write_bytes(with_header(whole, lambda _, header=header: packed(header)))
        with refused("header that this project does not write"):
            read_file(file)
    file.write_bytes(with_header(whole, lambda _: packed(fields + b"\n" + names)))
    assert read_file(file).count == 12


def packed(header):
    return lzma.compress(header, lzma.FORMAT_ALONE)


def with_header_of(whole):
    found = []
    with_header(whole, lambda header: found.append(header) or header)
    return found[0]


def test_names_that_count_up_cost_next_to_nothing(file):
    one = compress(small(), noise(1))
    sizes = []
    for names in (None, [f"picture_{i:05d}.png" for i in range(4096)]):
        many = replace(one, payload=bytes(8 * 4096), batches=[4096], names=names)
        write_file(file, many)
        assert read_file(file) == many
        sizes.append(file.stat().st_size)
    assert sizes[1] - sizes[0] < 4096  # less than a byte each


def test_images_of_next_to_no_bits_take_a_byte_each(tmp_path):
    """Or a file could claim any number of images."""
    vae, images = small("bernoulli"), torch.zeros(20_000, 1, 4, 3, dtype=torch.uint8)
    vae.decoder[-2].bias.fill_(-30)
    for parameter in (vae.encoder[-1].weight, vae.encoder[-1].bias, vae.decoder[-2].weight):
        parameter.zero_()
    compressed = compress(vae, images)
    assert len(compressed.payload) == 20_060
    names = [f"ü/{i}\udcff.png" for i in range(len(images))]
    write_file(tmp_path / "a", replace(compressed, names=names))
    assert torch.equal(decompress(vae, read_file(tmp_path / "a")), images) and read_file(tmp_path / "a").names == names
    with refused("names of the images are too long"):
        write_file(tmp_path / "a", replace(compressed, names=[f"{i:0200}" for i in range(len(images))]))


def test_a_newer_format_is_named(file, monkeypatch):
    monkeypatch.setattr(file_format, "FORMAT", 4)
    write_file(file, read_only := compress(small(), noise(2)))
    monkeypatch.undo()
    with refused("has format 4"):
        read_file(file)
    write_file(file, read_only)  # it is a file of this project all the same
    assert read_file(file) == read_only


def test_a_foreign_file_is_left_alone(tmp_path):
    foreign = tmp_path / "thesis.pdf"
    for content in (b"", b"%PDF", COMPRESSED_MAGIC[:-1]):
        foreign.write_bytes(content)
        with refused("not made by betavae"):
            write_file(foreign, compress(small(), noise(1)))
        assert foreign.read_bytes() == content
    with refused("cannot write"):
        write_file(foreign / "file", compress(small(), noise(1)))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_process_killed_while_it_writes_leaves_the_file_as_it_was(file, call, monkeypatch):
    before, compressed = file.read_bytes(), compress(small(), noise(20))
    child = os.fork()
    if not child:
        monkeypatch.setattr(os, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        write_file(file, compressed)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert file.read_bytes() == before
    assert all(path.suffix == ".part" for path in file.parent.iterdir() if path != file)


def test_an_interrupted_process_leaves_no_part(file, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(file, compress(small(), noise(2)))
    assert len(list(file.parent.iterdir())) == 1


def test_images_go_where_nothing_foreign_lies_or_nowhere(tmp_path):
    images, out = noise(12), tmp_path / "images"
    write_images(images, None, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(before) == [f"{i:02d}.png" for i in range(12)]
    write_images(images, None, out)  # ours may be replaced
    (out / "11.png").write_bytes(b"a photograph")
    with refused("11.png already exists and was not made by betavae"):
        write_images(255 - images, None, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before | {"11.png": b"a photograph"}
    long = "x" * 251 + ".png"  # as long as a name can be
    write_images(images[:1], [long], tmp_path)
    assert (tmp_path / long).exists()
    (tmp_path / "file").write_bytes(b"")
    for names, where, message in (
        (None, tmp_path / "file", "cannot write"),
        (["../x"] * 12, out, "leads out"),
        (["x"] * 12, out, "one file"),
    ):
        with refused(message):
            output_paths(names, 12, where)
