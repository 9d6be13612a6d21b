"""Lossless compression of images with a trained VAE by bits-back coding with ANS.

The method is BB-ANS (Townsend, Bird & Barber 2019). The expected size of a file is the model's negative ELBO of the
images; see docs/compression.md. Compressor and decompressor need bit-identical probabilities on any machine. The
networks compute in double precision, and `Rounding` makes the outputs of both sides equal. Everything after that uses
`reproducible` functions and arithmetic that IEEE 754 defines exactly.
"""

import contextlib
import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from betavae.applications.compression.ans import MIN_HEAD, SLOTS, Cumulative, Floats, Stack, quantize_cdf
from betavae.applications.compression.file_format import MAX_LANES, Compressed, min_payload_bytes
from betavae.applications.compression.reproducible import GRID, LOGISTIC, NORMAL, compute_normal_quantiles, exp
from betavae.errors import UserError
from betavae.models.likelihoods import Bernoulli
from betavae.models.logistic_mixture import LogisticMixture, split_params
from betavae.models.priors import StandardNormal
from betavae.models.vae import VAE

LATENT_BITS = 14  # Each latent dimension has 2^14 bins of equal prior mass.
MARGIN = 2.0**-34  # upper bound on the difference of network outputs between machines, which is about 1e-13
MAX_ABS_OUTPUT = 2**15
DECODE_BATCH = 32  # images


class Rounding:
    """Round network outputs to multiples of `GRID`, equally on two machines.

    The outputs of the two machines may differ by less than `MARGIN`. An output within `MARGIN` of a rounding threshold
    could be rounded differently. The compressor lists these outputs, and both sides round them up. The threshold is a
    third of the way between multiples rather than halfway, because the outputs of a network that ignores its input are
    its float32 biases, which may be exactly halfway in every image.
    """

    def __init__(self, near_threshold: list[int] | None = None):
        """Take the compressor's list of outputs to round up; None starts such a list."""
        self.is_compressor = near_threshold is None
        self.near_threshold = np.array(near_threshold or [], dtype=np.int64)

    def __call__(self, outputs: Tensor, first: int) -> Floats:
        """Round `outputs` `(n, m)` of the n images from number `first` on."""
        if not outputs.isfinite().all():
            raise UserError("the model has outputs that are not finite for these images and is unable to compress them")
        scaled = outputs.clamp(-MAX_ABS_OUTPUT, MAX_ABS_OUTPUT).numpy() / GRID + 2 / 3
        start, rounded = first * scaled.shape[1], np.floor(scaled)
        if self.is_compressor:
            near = np.flatnonzero(np.abs(scaled - np.rint(scaled)) < MARGIN / GRID)
            self.near_threshold = np.append(self.near_threshold, near + start)
        else:
            near = self.near_threshold - start
            near = near[(near >= 0) & (near < scaled.size)]
        rounded.flat[near] = np.rint(scaled.flat[near])
        return rounded * GRID


class Codec:
    """The distributions of a VAE as the coder needs them, for n images at once."""

    def __init__(self, vae: VAE, near: list[list[int]] | None = None):
        """Prepare a VAE; `near` has the compressor's lists for `Rounding` of encoder and decoder outputs."""
        likelihood = vae.likelihood
        if type(likelihood) is not Bernoulli and not isinstance(likelihood, LogisticMixture):
            raise UserError(
                f"compression needs a discrete likelihood, and this model has {type(likelihood).__name__}; train with "
                "model.likelihood=logistic_mixture for bytes, or with bernoulli on binarized images"
            )
        if vae.classes:
            raise UserError("compression needs a model without labels: train with model.conditional=false")
        if not isinstance(vae.prior, StandardNormal):
            raise UserError("compression needs bins of equal prior mass, which N(0, I) has: train with prior=standard")
        if any(parameter.device.type != "cpu" for parameter in vae.parameters()):
            raise UserError("compression needs the CPU, where sums are reproducible: pass vae.cpu()")
        self.bits = 8 if isinstance(likelihood, LogisticMixture) else 1
        self.vae = copy.deepcopy(vae).double().eval()
        self.num_pixels = math.prod(vae.image_shape)  # channels included
        # The edges of the prior's bins, and the median of each bin.
        quantiles = compute_normal_quantiles(2 * 2**LATENT_BITS)
        self.edges, self.medians = quantiles[::2], quantiles[1::2]
        self.rounding = [Rounding(part) for part in near or (None, None)]

    def build_posterior(self, symbols: Floats, first: int) -> Callable[[int], Cumulative]:
        """Build q(z|x) over the bins of each latent dimension.

        It does not reserve slots for bins of no probability, since a symbol is popped before it is pushed here.
        Reserved slots would draw one z in 500 from the prior, which costs far more bits than they are worth.

        Args:
            symbols: `(n, pixels)`.
            first: The number of the first image.

        Returns:
            A function from a latent dimension to its cumulative distribution.
        """
        x = torch.from_numpy(symbols / (2**self.bits - 1)).view(-1, *self.vae.image_shape)
        outputs = self.rounding[0](torch.cat(self.vae.encode(x), 1), first)
        mean, logvar = np.ascontiguousarray(outputs.T).reshape(2, self.vae.latent_dim, -1)
        deviation = exp(logvar / 2)

        def build_dimension(d: int) -> Cumulative:
            def cumulative(bins: Floats) -> Floats:
                edges = self.edges[bins.astype(np.int64)]
                return np.floor(NORMAL((edges - mean[d]) / deviation[d]) * SLOTS)

            return cumulative

        return build_dimension

    def compute_mixtures(self, z: Tensor, first: int) -> Floats:
        """Decode `(n, latent_dim)` to mixtures of logistics, `(3, pixels, components, 1, n)`.

        The first axis has weights, slopes and offsets.
        """
        params = self.vae.decode_params(z)
        params = torch.from_numpy(self.rounding[1](params.flatten(1), first)).view_as(params)
        if isinstance(self.vae.likelihood, LogisticMixture):
            parts = split_params(params, self.vae.likelihood.components)
            logits, means, log_scales = (part.flatten(2).numpy() for part in parts)
            shares, slopes = exp(logits - logits.max(1, keepdims=True)), exp(-log_scales) / 255
            weights, offsets = shares / sum_in_order(shares.swapaxes(0, 1))[:, None], (255 * means + 0.5) * slopes
        else:  # P(0) = sigmoid(-logit)
            offsets = params.flatten(1).unsqueeze(1).numpy()
            weights, slopes = np.ones_like(offsets), np.zeros_like(offsets)
        return np.stack((weights, slopes, offsets)).transpose(0, 3, 2, 1)[:, :, :, None]

    def build_pixels(self, bins: Floats, first: int) -> Callable[[int], Cumulative]:
        """Build p(x|z), a mixture of logistics over the symbols of each pixel.

        Args:
            bins: `(latent_dim, n)`.
            first: The number of the first image.

        Returns:
            A function from a pixel to its cumulative distribution.
        """
        z = torch.from_numpy(self.medians[bins.astype(np.int64)].T.copy())
        components = getattr(self.vae.likelihood, "components", 1)
        # The lanes of a pixel are contiguous. The decoder runs in batches to limit its memory.
        mixtures = np.empty((3, self.num_pixels, components, 1, len(z)))
        for i in range(0, len(z), DECODE_BATCH):
            mixtures[..., i : i + DECODE_BATCH] = self.compute_mixtures(z[i : i + DECODE_BATCH], first + i)

        def build_pixel(i: int) -> Cumulative:
            weight, slope, offset = mixtures[:, i]

            def cumulative(symbols: Floats) -> Floats:
                return quantize_cdf(sum_in_order(weight * LOGISTIC(slope * symbols - offset)), symbols, 2**self.bits)

            return cumulative

        return build_pixel

    def compute_fingerprint(self) -> str:
        """Hash the probabilities of 8 fixed images and latents on this machine."""
        symbols = np.arange(8.0 * self.num_pixels).reshape(8, -1) * 37 % 2**self.bits
        bins = np.arange(8.0 * self.vae.latent_dim).reshape(-1, 8) * 4099 % 2**LATENT_BITS
        posterior, pixels = self.build_posterior(symbols, 0), self.build_pixels(bins, 0)
        middle, half = np.full((1, 8), 2.0 ** (LATENT_BITS - 1)), np.full((1, 8), 2.0 ** (self.bits - 1))
        rows = [posterior(d)(middle) for d in range(self.vae.latent_dim)]
        rows += [pixels(i)(half) for i in range(self.num_pixels)]
        return hashlib.sha256(np.concatenate(rows).astype("<i8").tobytes()).hexdigest()


def sum_in_order(parts: Floats) -> Floats:
    """Sum over the first axis in its order, which NumPy does not guarantee."""
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


@contextlib.contextmanager
def deterministic_cpu() -> Iterator[None]:
    """Compute on one thread, since the order of a sum may depend on their number, and without autocast.

    NumPy's warnings of symbols without slots, which occur in the payload of another model, are turned off.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), np.errstate(divide="ignore"):
            yield
    finally:
        torch.set_num_threads(threads)


def hash_model(vae: VAE) -> str:
    """Hash the settings and weights of a VAE."""
    settings = [vae.image_shape, vae.latent_dim, [type(module).__name__ for module in vae.modules()]]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, value in sorted(vae.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def choose_batch_size(first: int, count: int, lanes: int, latent_dim: int, words: int) -> int:
    """Choose the size of the batch from image number `first` on, with `words` on the stack.

    It is `lanes`, or fewer if the stack has too few bits to draw their latents and heads. Otherwise a file would borrow
    bits for many images at once, which are hundreds per image, about as many as a compressed binarized image has. It is
    at least a sixteenth of the images so far, in case each of them takes almost no bits.
    """
    return min(lanes, count - first, max(1, first // 16, 32 * words // (LATENT_BITS * latent_dim + 32)))


def draw_xor_masks(first: int, latent_dim: int, n: int) -> NDArray[np.uint64]:
    """Draw random bits `(latent_dim, n)` for the batch from image number `first` on.

    They flip bits of the heads. The latents of one batch supply the bits from which the next posteriors are drawn.
    Their distribution is the aggregate posterior, which differs from the prior. Flipping at random makes them random
    bits.
    """
    return np.random.PCG64(first).random_raw(latent_dim * n).reshape(latent_dim, n) % MIN_HEAD


def to_symbols(images: Tensor, codec: Codec) -> NDArray[np.uint8]:
    """Check images `(N, C, H, W)` and convert them to symbols `(N, pixels)`."""
    image_shape = codec.vae.image_shape
    if images.dtype != torch.uint8 or images.shape[1:] != image_shape or not len(images):
        raise UserError(
            f"images to compress must be uint8 of shape (N, C, H, W) with (C, H, W) = {image_shape}, found "
            f"{images.dtype} of shape {tuple(images.shape)}"
        )
    data = images.cpu().flatten(1).numpy()
    if codec.bits == 1 and not ((data == 0) | (data == 255)).all():
        raise UserError(
            "a Bernoulli model compresses only binarized images, with bytes 0 and 255; binarize them as in training, "
            "or train with model.likelihood=logistic_mixture for gray values"
        )
    return data // (255 // (2**codec.bits - 1))


def hash_images(images: Tensor) -> str:
    """Hash the bytes of images."""
    return hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest()


def compress(
    vae: VAE,
    images: Tensor,
    lanes: int = 256,
    names: list[str] | None = None,
    on_batch: Callable[[int], object] = lambda n: None,
) -> Compressed:
    """Compress images.

    Memory is about 100 bytes per lane, pixel and mixture component.

    Args:
        vae: A VAE with a Bernoulli or logistic mixture likelihood, on the CPU.
        images: `(N, C, H, W)` uint8; binarized images have bytes 0 and 255.
        lanes: The number of images to compress side by side.
        names: A name for each image.
        on_batch: Called with the number of images of each compressed batch.

    Raises:
        UserError: If the likelihood is not discrete, or the images are not what it models.
    """
    codec, stack = Codec(vae), Stack()
    symbols = to_symbols(images, codec)
    if not 1 <= lanes <= MAX_LANES:
        raise UserError(f"lanes={lanes} is invalid: expected 1 to {MAX_LANES:,}")
    if names is not None and len(names) != len(images):
        raise UserError(f"there are {len(names)} names for {len(images)} images: give one name per image, or none")
    with deterministic_cpu():
        fingerprint, batches = Codec(vae).compute_fingerprint(), list[int]()
        while (first := sum(batches)) < len(symbols):
            n = choose_batch_size(first, len(symbols), lanes, vae.latent_dim, stack.top)
            batches.append(n)
            push_images(codec, stack, symbols[first : first + n].astype(np.float64), first)
            on_batch(n)
    heads, words = stack.get_content()
    payload = words.astype("<u4").tobytes() + heads.astype("<u8").tobytes()
    # The net cost of a few tiny images may be negative, which leaves fewer bits than were borrowed.
    min_bytes = max(min_payload_bytes(len(images), list(vae.image_shape)), 4 * stack.borrowed)
    missing = max(0, min_bytes - len(payload))
    return Compressed(
        payload=bytes(math.ceil(missing / 4) * 4) + payload,  # Padding words are at the bottom, where no pop reads.
        image_shape=list(vae.image_shape),
        batches=batches,
        initial_bits=32 * stack.borrowed,
        model=hash_model(vae),
        probabilities=fingerprint,
        images=hash_images(images),
        near=[rounding.near_threshold.tolist() for rounding in codec.rounding],
        names=names,
    )


def push_images(codec: Codec, stack: Stack, symbols: Floats, first: int) -> None:
    """Push a batch of images `(n, pixels)`.

    This pops z from q(z|x), pushes x under p(x|z), and pushes z under the prior.
    """
    n, latent_dim = len(symbols), codec.vae.latent_dim
    stack.grow(n)
    posterior = codec.build_posterior(symbols, first)
    bins = np.empty((latent_dim, n))
    for d, mask in enumerate(draw_xor_masks(first, latent_dim, n)):
        stack.flip(mask)
        bins[d] = stack.pop(posterior(d), n, LATENT_BITS)
    pixels, columns = codec.build_pixels(bins, first), np.ascontiguousarray(symbols.T)
    for i in reversed(range(len(columns))):
        stack.push(pixels(i), columns[i], codec.bits)
    for d in reversed(range(latent_dim)):
        stack.push_uniform(bins[d], LATENT_BITS)


def pop_images(codec: Codec, stack: Stack, n: int, first: int) -> Floats:
    """Pop a batch of images `(n, pixels)`, which undoes `push_images` except for the growth of the stack."""
    latent_dim = codec.vae.latent_dim
    bins = np.stack([stack.pop_uniform(n, LATENT_BITS) for _ in range(latent_dim)])
    pixels = codec.build_pixels(bins, first)
    symbols = np.stack([stack.pop(pixels(i), n, codec.bits) for i in range(codec.num_pixels)], axis=1)
    posterior, masks = codec.build_posterior(symbols, first), draw_xor_masks(first, latent_dim, n)
    for d in reversed(range(latent_dim)):
        stack.push(posterior(d), bins[d], LATENT_BITS)
        stack.flip(masks[d])
    return symbols


def check_model(vae: VAE, compressed: Compressed) -> None:
    """Raise UserError unless this model compressed the images."""
    if hash_model(vae) != compressed.model or list(vae.image_shape) != compressed.image_shape:
        raise UserError("these images were compressed by another model; pass the checkpoint that compressed them")


def decompress(vae: VAE, compressed: Compressed, on_batch: Callable[[int], object] = lambda n: None) -> Tensor:
    """Decompress images, bit for bit.

    Args:
        vae: The VAE that compressed them.
        compressed: The result of `compress`.
        on_batch: Called with the number of images of each decompressed batch.

    Returns:
        `(N, C, H, W)` uint8, equal to the compressed images by their checksum.

    Raises:
        UserError: If another model compressed them, or this machine computes other probabilities.
    """
    check_model(vae, compressed)
    codec = Codec(vae, compressed.near)
    other_machine = UserError(
        "this machine, or its version of torch, computes other probabilities than the one that compressed these "
        "images; decompress them there"
    )
    split = len(compressed.payload) - 8 * compressed.heads
    words = np.frombuffer(compressed.payload[:split], "<u4")
    stack = Stack(np.frombuffer(compressed.payload[split:], "<u8"), words)
    data = np.empty((compressed.count, codec.num_pixels), np.uint8)
    with deterministic_cpu():
        if Codec(vae).compute_fingerprint() != compressed.probabilities:
            raise other_machine
        first = compressed.count
        for i, n in reversed(list(enumerate(compressed.batches))):
            first -= n
            try:
                data[first : first + n] = pop_images(codec, stack, n, first) * (255 // (2**codec.bits - 1))
            except EOFError:
                raise other_machine from None
            stack.shrink(max(compressed.batches[:i], default=0))
            on_batch(n)
    images = torch.from_numpy(data).view(-1, *vae.image_shape)
    if hash_images(images) != compressed.images:
        raise other_machine
    return images
