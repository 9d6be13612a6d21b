"""Lossless compression of images by a trained VAE: bits-back coding with ANS (Townsend, Bird & Barber 2019, BB-ANS).

The expected length of a file is the model's negative ELBO of its images, see docs/compression.md. Networks compute in
double precision on one thread, in batches of the same shape at both ends, and their outputs are rounded to `GRID`: the
same on one machine, and almost surely on another too.
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

from betavae.errors import UserError
from betavae.likelihoods import Bernoulli
from betavae.logistic_mixture import LogisticMixture, split
from betavae.uses.ans import LOWEST, SLOTS, Cumulative, Floats, Stack, slots
from betavae.uses.compressed_file import MOST_LANES, Compressed, smallest_payload
from betavae.vae import VAE

LATENT_BITS = 14  # 2^14 bins of equal prior mass for each latent dimension
GRID = 2.0**-12
DECODED = 32  # images at a time


class Codec:
    """The distributions of a VAE as the coder takes them, for n images at once."""

    def __init__(self, vae: VAE):
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
        # Where a prior's bins end, and the middle of each in between.
        mass = torch.linspace(0, 1, 2 * 2**LATENT_BITS + 1, dtype=torch.float64)
        self.edges, self.medians = torch.special.ndtri(mass)[::2].numpy(), torch.special.ndtri(mass)[1::2].numpy()

    def _outputs(self, *outputs: Tensor) -> list[Tensor]:
        if not all(output.isfinite().all() for output in outputs):
            raise UserError("the model's outputs are not finite for these images: it cannot compress them")
        return [(output / GRID).round_().mul_(GRID) for output in outputs]

    def posterior(self, symbols: Floats) -> Callable[[int], Cumulative]:
        """`symbols` `(n, pixels)` -> for each latent dimension the distribution over its bins.

        No slots are kept for bins that have none: what is pushed here has been popped before. Kept ones would draw one
        z in 500 from the prior, which costs far more than they do.
        """
        x = torch.from_numpy(symbols / (2**self.bits - 1)).view(-1, *self.vae.image_shape)
        mean, logvar = (output.T.contiguous() for output in self._outputs(*self.vae.encode(x)))
        deviation = torch.exp(logvar.clamp(-60, 60) / 2)

        def dimension(d: int) -> Cumulative:
            def below(bins: Floats) -> Floats:
                edges = torch.from_numpy(self.edges[bins.astype(np.int64)])
                return np.floor(torch.special.ndtr((edges - mean[d]) / deviation[d]).numpy() * SLOTS)

            return below

        return dimension

    def mixtures(self, z: Tensor) -> Tensor:
        """Latents `(n, latent_dim)` -> weights, slopes and offsets of logistics, `(3, pixels, components, 1, n)`."""
        (params,) = self._outputs(self.vae.decode_params(z))
        if isinstance(self.vae.likelihood, LogisticMixture):
            logits, means, log_scales = split(params, self.vae.likelihood.components)
            weights, slopes = logits.softmax(1), torch.exp(-log_scales) / 255
            offsets = 255 * means * slopes + slopes / 2
        else:  # P(0) = sigmoid(-logit)
            offsets = params.unsqueeze(1)
            weights, slopes = torch.ones_like(offsets), torch.zeros_like(offsets)
        return torch.stack((weights, slopes, offsets)).flatten(3).permute(0, 3, 2, 1).unsqueeze(3)

    def pixels(self, bins: Floats) -> Callable[[int], Cumulative]:
        """`bins` `(latent_dim, n)` -> for each pixel the distribution over its symbols, a mixture of logistics."""
        z = torch.from_numpy(self.medians[bins.astype(np.int64)].T.copy())
        components = getattr(self.vae.likelihood, "components", 1)
        # A pixel's lanes lie side by side. The decoder takes some at a time, for its memory.
        mixtures = np.empty((3, int(np.prod(self.vae.image_shape)), components, 1, len(z)))
        for first in range(0, len(z), DECODED):
            mixtures[..., first : first + DECODED] = self.mixtures(z[first : first + DECODED]).numpy()

        def pixel(i: int) -> Cumulative:
            weight, slope, offset = mixtures[:, i]

            def below(symbols: Floats) -> Floats:
                parts = np.exp(offset - slope * symbols)
                parts += 1
                return slots(np.divide(weight, parts, out=parts).sum(0), symbols, 2**self.bits)

            return below

        return pixel

    def fingerprint(self) -> str:
        """Of what this machine makes of 8 fixed images and latents."""
        dimensions = int(np.prod(self.vae.image_shape))
        symbols = np.arange(8.0 * dimensions).reshape(8, -1) * 37 % 2**self.bits
        bins = np.arange(8.0 * self.vae.latent_dim).reshape(-1, 8) * 4099 % 2**LATENT_BITS
        posterior, pixels = self.posterior(symbols), self.pixels(bins)
        middle, half = np.full((1, 8), 2.0 ** (LATENT_BITS - 1)), np.full((1, 8), 2.0 ** (self.bits - 1))
        rows = [posterior(d)(middle) for d in range(self.vae.latent_dim)]
        rows += [pixels(i)(half) for i in range(dimensions)]
        return hashlib.sha256(np.concatenate(rows).astype("<i8").tobytes()).hexdigest()


@contextlib.contextmanager
def same_everywhere() -> Iterator[None]:
    """One thread, since a sum may depend on their number; no autocast; and NumPy does not warn of e^1000."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), np.errstate(over="ignore", divide="ignore"):
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


def masks(first: int, latent_dim: int, n: int) -> NDArray[np.uint64]:
    """Random bits `(latent_dim, n)` for the batch that begins with image number `first`, with which to flip the heads.

    The bits from which a posterior is drawn are the last image's latents. These are distributed as all posteriors are
    together, which is not quite the prior; flipped at random, any bits are random bits.
    """
    return np.random.PCG64(first).random_raw(latent_dim * n).reshape(latent_dim, n) % LOWEST


def compress(
    vae: VAE,
    images: Tensor,
    lanes: int = 256,
    names: list[str] | None = None,
    done: Callable[[int], object] = lambda images: None,
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
    if not 1 <= lanes <= MOST_LANES:
        raise UserError(f"lanes={lanes} cannot be: from 1 to {MOST_LANES:,} images are compressed at a time")
    if names is not None and len(names) != len(images):
        raise UserError(f"there are {len(names)} names for {len(images)} images: give one name for each, or none")
    data = np.ascontiguousarray(images.cpu().numpy())
    if codec.bits == 1 and not ((data == 0) | (data == 255)).all():
        raise UserError(
            "a Bernoulli model compresses binarised images only, of bytes 0 and 255: binarise them as it was trained, "
            "or train with model.likelihood=logistic_mixture for grey values"
        )
    levels, stack = data.reshape(len(data), -1) // (255 // (2**codec.bits - 1)), Stack()
    with same_everywhere():
        fingerprint, batches = codec.fingerprint(), list[int]()
        while (first := sum(batches)) < len(data):
            n = next_batch(first, len(data), lanes, vae.latent_dim, stack.top)
            batches.append(n)
            symbols = levels[first : first + n].astype(np.float64)
            stack.grow(n)
            posterior = codec.posterior(symbols)
            bins = np.empty((vae.latent_dim, n))
            for d, mask in enumerate(masks(first, *bins.shape)):
                stack.flip(mask)
                bins[d] = stack.pop(posterior(d), n, LATENT_BITS)
            pixels = codec.pixels(bins)
            columns = np.ascontiguousarray(symbols.T)
            for i in reversed(range(len(columns))):
                stack.push(pixels(i), columns[i], codec.bits)
            for d in reversed(range(vae.latent_dim)):
                stack.push_uniform(bins[d], LATENT_BITS)
            done(n)
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
    codec = Codec(vae)
    elsewhere = UserError(
        "this machine, or its version of torch, computes other probabilities than that which compressed these images: "
        "decompress them there"
    )
    dimensions, at = int(np.prod(vae.image_shape)), len(compressed.payload) - 8 * compressed.heads
    heads = np.frombuffer(compressed.payload[at:], "<u8")
    stack = Stack(heads, np.frombuffer(compressed.payload[:at], "<u4"))
    levels = np.empty((compressed.count, dimensions), np.uint8)
    with same_everywhere():
        if codec.fingerprint() != compressed.probabilities:
            raise elsewhere
        first = compressed.count
        for i, n in reversed(list(enumerate(compressed.batches))):
            first -= n
            try:
                bins = np.stack([stack.pop_uniform(n, LATENT_BITS) for _ in range(vae.latent_dim)])
                pixels = codec.pixels(bins)
                symbols = np.stack([stack.pop(pixels(i), n, codec.bits) for i in range(dimensions)], axis=1)
                posterior, flips = codec.posterior(symbols), masks(first, *bins.shape)
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
