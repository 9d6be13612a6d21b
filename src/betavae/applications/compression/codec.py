"""Lossless compression of images by a trained VAE: bits-back coding with ANS (Townsend, Bird & Barber 2019, BB-ANS).

The expected length of a file is the model's negative ELBO of its images, see docs/compression.md. Both ends need the
same probabilities to the last bit, on any machine. Networks compute in double precision, and `Rounding` makes the
outputs of both ends equal. What follows uses `reproducible` functions and arithmetic that IEEE 754 defines exactly.
"""

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from betavae.applications.compression.ans import MIN_HEAD, SLOTS, Cumulative, Floats, Stack, quantize_cdf
from betavae.applications.compression.file_format import MAX_LANES, Compressed, smallest_payload
from betavae.applications.compression.reproducible import GRID, LOGISTIC, NORMAL, exp, normal_quantiles
from betavae.errors import UserError
from betavae.models.likelihoods import Bernoulli
from betavae.models.logistic_mixture import LogisticMixture, split_params
from betavae.models.vae import VAE

LATENT_BITS = 14  # 2^14 bins of equal prior mass for each latent dimension
MARGIN = 2.0**-34  # more than the outputs of a network differ by between machines: 1e-13 was measured
DECODE_BATCH = 32  # images at a time


class Rounding:
    """Round outputs to multiples of `GRID`, equally at both ends, whose outputs differ by less than `MARGIN`.

    An output nearer than that to where rounding up begins could become either multiple. The compressor lists these, and
    both ends round them up. That is a third of the way from one multiple to the next, and not half: the biases of a
    network that ignores its input are float32, and may lie on a half for every image.
    """

    def __init__(self, listed: list[int] | None = None):
        """`listed` is the compressor's list, for the other end."""
        self.finds = listed is None
        self.listed = np.array(listed or [], dtype=np.int64)

    def __call__(self, outputs: Tensor, first: int) -> Floats:
        """`outputs` `(n, m)` of the images from number `first`."""
        if not outputs.isfinite().all():
            raise UserError("the model's outputs are not finite for these images: it cannot compress them")
        scaled = outputs.clamp(-(2**15), 2**15).numpy() / GRID + 2 / 3
        start, rounded = first * scaled.shape[1], np.floor(scaled)
        if self.finds:
            near = np.flatnonzero(np.abs(scaled - np.rint(scaled)) < MARGIN / GRID)
            self.listed = np.append(self.listed, near + start)
        else:
            near = self.listed - start
            near = near[(near >= 0) & (near < scaled.size)]
        rounded.flat[near] = np.rint(scaled.flat[near])
        return rounded * GRID


class Codec:
    """The distributions of a VAE as the coder takes them, for n images at once."""

    def __init__(self, vae: VAE, listed: list[list[int]] | None = None):
        """`listed` are the lists of the compressor's two `rounding`s."""
        likelihood = vae.likelihood
        if type(likelihood) is not Bernoulli and not isinstance(likelihood, LogisticMixture):
            raise UserError(
                f"a {type(likelihood).__name__} likelihood is not a probability of images, so it cannot compress them: "
                "train with model.likelihood=logistic_mixture for bytes, or with bernoulli on binarised images"
            )
        if any(parameter.device.type != "cpu" for parameter in vae.parameters()):
            raise UserError("compression computes on the CPU, where sums are the same each time: pass vae.cpu()")
        self.bits = 8 if isinstance(likelihood, LogisticMixture) else 1
        self.vae = copy.deepcopy(vae).double().eval()
        # The ends of the prior's bins, and the median of each in between.
        quantiles = normal_quantiles(2 * 2**LATENT_BITS)
        self.edges, self.medians = quantiles[::2], quantiles[1::2]
        self.rounding = [Rounding(of) for of in listed or (None, None)]  # of the encoder, and of the decoder

    def posterior(self, symbols: Floats, first: int) -> Callable[[int], Cumulative]:
        """`symbols` `(n, pixels)` of the images from number `first` -> for each latent dimension the distribution over
        its bins.

        No slots are kept for bins that have none: what is pushed here has been popped before. Kept ones would draw one
        z in 500 from the prior, which costs far more than they do.
        """
        x = torch.from_numpy(symbols / (2**self.bits - 1)).view(-1, *self.vae.image_shape)
        outputs = self.rounding[0](torch.cat(self.vae.encode(x), 1), first)
        mean, logvar = np.ascontiguousarray(outputs.T).reshape(2, self.vae.latent_dim, -1)
        deviation = exp(logvar / 2)

        def dimension(d: int) -> Cumulative:
            def cdf(bins: Floats) -> Floats:
                edges = self.edges[bins.astype(np.int64)]
                return np.floor(NORMAL((edges - mean[d]) / deviation[d]) * SLOTS)

            return cdf

        return dimension

    def mixtures(self, z: Tensor, first: int) -> Floats:
        """Latents `(n, latent_dim)` -> weights, slopes and offsets of logistics, `(3, pixels, components, 1, n)`."""
        params = self.vae.decode_params(z)
        params = torch.from_numpy(self.rounding[1](params.flatten(1), first)).view_as(params)
        if isinstance(self.vae.likelihood, LogisticMixture):
            parts = split_params(params, self.vae.likelihood.components)
            logits, means, log_scales = (part.flatten(2).numpy() for part in parts)
            shares, slopes = exp(logits - logits.max(1, keepdims=True)), exp(-log_scales) / 255
            weights, offsets = shares / in_order(shares.swapaxes(0, 1))[:, None], (255 * means + 0.5) * slopes
        else:  # P(0) = sigmoid(-logit)
            offsets = params.flatten(1).unsqueeze(1).numpy()
            weights, slopes = np.ones_like(offsets), np.zeros_like(offsets)
        return np.stack((weights, slopes, offsets)).transpose(0, 3, 2, 1)[:, :, :, None]

    def pixels(self, bins: Floats, first: int) -> Callable[[int], Cumulative]:
        """`bins` `(latent_dim, n)` of the images from number `first` -> for each pixel the distribution over its
        symbols, a mixture of logistics."""
        z = torch.from_numpy(self.medians[bins.astype(np.int64)].T.copy())
        components = getattr(self.vae.likelihood, "components", 1)
        # A pixel's lanes lie side by side. The decoder takes some at a time, for its memory.
        mixtures = np.empty((3, int(np.prod(self.vae.image_shape)), components, 1, len(z)))
        for i in range(0, len(z), DECODE_BATCH):
            mixtures[..., i : i + DECODE_BATCH] = self.mixtures(z[i : i + DECODE_BATCH], first + i)

        def pixel(i: int) -> Cumulative:
            weight, slope, offset = mixtures[:, i]

            def below(symbols: Floats) -> Floats:
                return quantize_cdf(in_order(weight * LOGISTIC(slope * symbols - offset)), symbols, 2**self.bits)

            return below

        return pixel

    def fingerprint(self) -> str:
        """Of what this machine makes of 8 fixed images and latents."""
        dimensions = int(np.prod(self.vae.image_shape))
        symbols = np.arange(8.0 * dimensions).reshape(8, -1) * 37 % 2**self.bits
        bins = np.arange(8.0 * self.vae.latent_dim).reshape(-1, 8) * 4099 % 2**LATENT_BITS
        posterior, pixels = self.posterior(symbols, 0), self.pixels(bins, 0)
        middle, half = np.full((1, 8), 2.0 ** (LATENT_BITS - 1)), np.full((1, 8), 2.0 ** (self.bits - 1))
        rows = [posterior(d)(middle) for d in range(self.vae.latent_dim)]
        rows += [pixels(i)(half) for i in range(dimensions)]
        return hashlib.sha256(np.concatenate(rows).astype("<i8").tobytes()).hexdigest()


def in_order(parts: Floats) -> Floats:
    """The sum over the first axis, of which NumPy does not promise the order."""
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


@contextlib.contextmanager
def deterministic_cpu() -> Iterator[None]:
    """Compute on one thread, since a sum may depend on their number, and without autocast.

    NumPy does not warn of symbols without slots, which are in payloads that are not of this model.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), np.errstate(divide="ignore"):
            yield
    finally:
        torch.set_num_threads(threads)


def model_hash(vae: VAE) -> str:
    """SHA-256 over settings and weights."""
    settings = [vae.image_shape, vae.latent_dim, [type(module).__name__ for module in vae.modules()]]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, value in sorted(vae.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def next_batch(done: int, count: int, lanes: int, latent_dim: int, words: int) -> int:
    """How many images come next, of `count`, after `done` that left so many words on the stack: `lanes`, but no more
    than there are bits to draw their latents and heads from.

    Else a file would borrow for many images at once: of binarised ones, hundreds of bits each, where an image leaves
    some hundred behind. At least a sixteenth of those before, in case that images leave next to nothing.
    """
    return min(lanes, count - done, max(1, done // 16, 32 * words // (LATENT_BITS * latent_dim + 32)))


def xor_masks(first: int, latent_dim: int, n: int) -> NDArray[np.uint64]:
    """Random bits `(latent_dim, n)` for the batch that begins with image number `first`, with which to flip the heads.

    The bits from which a posterior is drawn are the last image's latents. These are distributed as all posteriors are
    together, which is not quite the prior; flipped at random, any bits are random bits.
    """
    return np.random.PCG64(first).random_raw(latent_dim * n).reshape(latent_dim, n) % MIN_HEAD


def compress(
    vae: VAE,
    images: Tensor,
    lanes: int = 256,
    names: list[str] | None = None,
    on_batch: Callable[[int], object] = lambda images: None,
) -> Compressed:
    """Images `(N, C, H, W)` uint8, `lanes` of them side by side; binarised ones are 0 and 255. `done` hears how many
    images each batch had.

    Memory is about 100 bytes per lane, pixel and component. Raises UserError for a likelihood that is not a probability
    of images (see `Codec`), and for images that are not of its kind.
    """
    codec = Codec(vae)
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or shape[1:] != vae.image_shape or not shape[0]:
        raise UserError(
            f"images to compress must be uint8 of shape (N, C, H, W), with the model's (C, H, W) = {vae.image_shape}: "
            f"these are {images.dtype} of shape {shape}"
        )
    if not 1 <= lanes <= MAX_LANES:
        raise UserError(f"lanes={lanes} cannot be: from 1 to {MAX_LANES:,} images are compressed at a time")
    if names is not None and len(names) != len(images):
        raise UserError(f"there are {len(names)} names for {len(images)} images: give one name for each, or none")
    data = np.ascontiguousarray(images.cpu().numpy())
    if codec.bits == 1 and not ((data == 0) | (data == 255)).all():
        raise UserError(
            "a Bernoulli model compresses binarised images only, of bytes 0 and 255: binarise them as it was trained, "
            "or train with model.likelihood=logistic_mixture for grey values"
        )
    levels, stack = data.reshape(len(data), -1) // (255 // (2**codec.bits - 1)), Stack()
    with deterministic_cpu():
        fingerprint, batches = Codec(vae).fingerprint(), list[int]()
        while (first := sum(batches)) < len(data):
            n = next_batch(first, len(data), lanes, vae.latent_dim, stack.top)
            batches.append(n)
            symbols = levels[first : first + n].astype(np.float64)
            stack.grow(n)
            posterior = codec.posterior(symbols, first)
            bins = np.empty((vae.latent_dim, n))
            for d, mask in enumerate(xor_masks(first, *bins.shape)):
                stack.flip(mask)
                bins[d] = stack.pop(posterior(d), n, LATENT_BITS)
            pixels = codec.pixels(bins, first)
            columns = np.ascontiguousarray(symbols.T)
            for i in reversed(range(len(columns))):
                stack.push(pixels(i), columns[i], codec.bits)
            for d in reversed(range(vae.latent_dim)):
                stack.push_uniform(bins[d], LATENT_BITS)
            on_batch(n)
    heads, words = stack.content()
    payload = words.astype("<u4").tobytes() + heads.astype("<u8").tobytes()
    missing = max(0, smallest_payload(len(data), list(vae.image_shape)) - len(payload))
    return Compressed(
        payload=bytes(-(-missing // 4) * 4) + payload,  # words below the last that is popped
        image_shape=list(vae.image_shape),
        batches=batches,
        initial_bits=32 * stack.borrowed,
        model=model_hash(vae),
        probabilities=fingerprint,
        images=hashlib.sha256(data.tobytes()).hexdigest(),
        near=[rounding.listed.tolist() for rounding in codec.rounding],
        names=names,
    )


def check_model(vae: VAE, compressed: Compressed) -> None:
    """Raises UserError unless this model compressed them."""
    if model_hash(vae) != compressed.model or list(vae.image_shape) != compressed.image_shape:
        raise UserError("these images were compressed by another model: load the checkpoint that compressed them")


def decompress(vae: VAE, compressed: Compressed, done: Callable[[int], object] = lambda images: None) -> Tensor:
    """The images, `(N, C, H, W)` uint8, bit for bit. `done` hears how many each batch had.

    Raises UserError for another model than that which compressed them, and on a machine that does not compute the same
    probabilities: what it would give is compared with a checksum, and never returned as images.
    """
    check_model(vae, compressed)
    codec = Codec(vae, compressed.near)
    elsewhere = UserError(
        "this machine, or its version of torch, computes other probabilities than that which compressed these images: "
        "decompress them there"
    )
    dimensions, at = int(np.prod(vae.image_shape)), len(compressed.payload) - 8 * compressed.heads
    heads = np.frombuffer(compressed.payload[at:], "<u8")
    stack = Stack(heads, np.frombuffer(compressed.payload[:at], "<u4"))
    levels = np.empty((compressed.count, dimensions), np.uint8)
    with deterministic_cpu():
        if Codec(vae).fingerprint() != compressed.probabilities:
            raise elsewhere
        first = compressed.count
        for i, n in reversed(list(enumerate(compressed.batches))):
            first -= n
            try:
                bins = np.stack([stack.pop_uniform(n, LATENT_BITS) for _ in range(vae.latent_dim)])
                pixels = codec.pixels(bins, first)
                symbols = np.stack([stack.pop(pixels(i), n, codec.bits) for i in range(dimensions)], axis=1)
                posterior, flips = codec.posterior(symbols, first), xor_masks(first, *bins.shape)
                for d in reversed(range(vae.latent_dim)):
                    stack.push(posterior(d), bins[d], LATENT_BITS)
                    stack.flip(flips[d])
            except EOFError:
                raise elsewhere from None
            stack.shrink(max(compressed.batches[:i], default=0))
            levels[first : first + n] = symbols * (255 // (2**codec.bits - 1))
            done(n)
    if hashlib.sha256(levels.tobytes()).hexdigest() != compressed.images:
        raise elsewhere
    return torch.from_numpy(levels).view(-1, *vae.image_shape)
