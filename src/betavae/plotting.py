"""Pictures of a VAE: grids as tensors in [0, 1], and Matplotlib figures; values are clamped."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from betavae.errors import UserError
from betavae.models.vae import VAE
from betavae.storage.cache import to_bytes
from betavae.storage.files import STAMP, atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

MAX_SPRITE_SIDE = 4096  # pixels; a browser may not show a larger image of all tiles
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")


def make_grid(images: Tensor, columns: int, background: float = 0.0) -> Tensor:
    """Arrange images `(N, C, H, W)` in a picture `(C, rows * (H + 2) + 2, columns * (W + 2) + 2)`."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    tiles = images.new_full((rows * columns, c, h + 2, w + 2), background)
    tiles[:n, :, 2:, 2:] = images.clamp(0, 1)
    picture = tiles.view(rows, columns, c, h + 2, w + 2).permute(2, 0, 3, 1, 4).reshape(c, rows * (h + 2), -1)
    return torch.nn.functional.pad(picture, (0, 2, 0, 2), value=background)


def stack_reconstructions(vae: VAE, x: Tensor) -> Tensor:
    """Alternate rows of originals and of their reconstructions, for a grid of at most 8 columns.

    White images fill the last row: `(N, C, H, W)` -> `(2 * rows * columns, C, H, W)`.
    """
    pairs = torch.stack((x, vae.reconstruct(x)))
    columns = min(8, len(x))
    pairs = torch.cat((pairs, pairs.new_ones(2, -len(x) % columns, *x.shape[1:])), 1)
    return pairs.unflatten(1, (-1, columns)).transpose(0, 1).flatten(0, 2)


@torch.no_grad()
def interpolate(vae: VAE, start: Tensor, end: Tensor, steps: int, end_vae: VAE | None = None) -> Tensor:
    """Decode `(steps, C, H, W)` on the line between the posterior means of two images `(1, C, H, W)`.

    `end_vae` encodes the end, which has another label for a conditional model.
    """
    weight = torch.linspace(0, 1, steps, device=start.device).unsqueeze(1)
    z = (1 - weight) * vae.encode(start).mean + weight * (end_vae or vae).encode(end).mean
    return vae.decode(z)


@torch.no_grad()
def traverse(vae: VAE, z: Tensor, dimensions: Sequence[int], values: Tensor) -> Tensor:
    """Decode a row of images per dimension, in which only that dimension of `z` `(latent_dim,)` changes.

    Its values are the prior's mean plus `values` `(V,)` of its standard deviations. Returns `(D * V, C, H, W)`.
    """
    mean, std = vae.prior.moments()
    grid_z = z.repeat(len(dimensions), len(values), 1)
    for row, dimension in enumerate(dimensions):
        grid_z[row, :, dimension] = mean[dimension] + std[dimension] * values
    return vae.decode(grid_z.flatten(0, 1))


@torch.no_grad()
def decode_manifold(vae: VAE, size: int) -> Tensor:
    """Decode a 2-D latent space at `size` by `size` quantiles of the prior (Kingma & Welling 2014).

    They are those of a normal distribution with the prior's mean and standard deviation in each dimension.

    Raises:
        UserError: If the latent space is not two-dimensional.
    """
    if vae.latent_dim != 2:
        raise UserError(
            f"ckpt has model.latent_dim={vae.latent_dim}, and a manifold needs 2; train a model with "
            "model.latent_dim=2, or pass the ckpt=PATH of one"
        )
    quantiles = compute_quantiles(size).to(next(vae.parameters()).device)
    rows, columns = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    mean, std = vae.prior.moments()
    return vae.decode(mean + std * torch.stack((columns, rows), dim=-1).flatten(0, 1))


def compute_quantiles(size: int) -> Tensor:
    """Compute `size` quantiles of N(0, 1), the values of z in a manifold."""
    return torch.special.ndtri((torch.arange(size) + 0.5) / size)


def create_figure(width: float, height: float) -> "Figure":
    """Create a Matplotlib figure without a window or global state; sizes are in inches."""
    from matplotlib.figure import Figure  # imported here, since it takes half a second

    return Figure(figsize=(width, height), layout="constrained")


def plot_kl(kl: Tensor) -> "Figure":
    """Plot the KL per latent dimension `(latent_dim,)` in nats as bars in descending order."""
    figure = create_figure(6, 3)
    axes = figure.add_subplot()
    order = kl.argsort(descending=True).tolist()
    axes.bar(range(len(kl)), kl[order].tolist())
    axes.set_xticks(range(len(kl)), [str(d) for d in order], fontsize=7 if len(kl) <= 30 else 4)
    axes.set_xlabel("latent dimension")
    axes.set_ylabel("KL [nats]")
    axes.set_title(f"KL per dimension, {float(kl.sum()):.2f} nats in all", fontsize=10)
    return figure


def plot_bounds(
    ks: Sequence[int], bounds: Sequence[dict[str, float]], kl: Sequence[float], active_units: int
) -> "Figure":
    """Plot importance-weighted bounds over their samples, beside the KL per dimension.

    Each bound has `mean` ± `se`, in nats.
    """
    figure = create_figure(9, 3)
    left, right = figure.subplots(1, 2)
    left.errorbar(ks, [b["mean"] for b in bounds], [b["se"] for b in bounds], marker="o", capsize=3)
    left.set_xscale("log")
    left.set_xlabel("importance samples K")
    left.set_ylabel("bound on -log p(x) [nats]")
    right.bar(range(1, len(kl) + 1), sorted(kl, reverse=True))
    right.set_xlabel(f"latent dimensions by their KL, {active_units} of {len(kl)} active")
    right.set_ylabel("KL [nats]")
    return figure


def plot_bits(rows: dict[str, tuple[float | None, float]], note: str) -> "Figure":
    """Plot the bits per pixel of codecs as bars.

    Args:
        rows: For each codec, the bits with one file per image (None if unknown) and with all images in one file.
        note: The title.
    """
    figure = create_figure(6, 0.35 * len(rows) + 0.8)
    axes = figure.add_subplot()
    names = list(rows)[::-1]
    axes.barh(names, [rows[name][1] for name in names], height=0.4, align="edge", label="all in one")
    alone = [rows[name][0] or 0.0 for name in names]
    axes.barh(names, alone, height=-0.4, align="edge", label="each image alone")
    axes.set_xlabel("bits per pixel and channel")
    axes.set_title(note, fontsize=8)
    axes.legend(fontsize=8)
    return figure


def tint_by_label(x: Tensor, labels: Tensor) -> Tensor:
    """Draw gray images as strokes on white in the color of their (first) label: `(N, 3, H, W)`.

    Color images stay as they are.
    """
    import matplotlib

    if x.shape[1] == 3:
        return x
    first = labels if labels.ndim == 1 else labels[:, 0]
    colors = torch.tensor(matplotlib.colormaps["tab10"].colors)[first.cpu() % 10]  # type: ignore[attr-defined]
    return 1 - x.mean(1, keepdim=True) * (1 - colors.view(-1, 3, 1, 1))


def make_tiles(x: Tensor, labels: Tensor, max_side: int) -> Tensor:
    """Center images, tinted by their labels, on white square tiles: `(N, 3, side, side)`.

    Larger images are shrunk to a side of `max_side` pixels. TensorBoard's sprite of tiles that are not square fails or
    is unreadable (torch 2.14).
    """
    drawn, (height, width) = tint_by_label(x, labels), x.shape[-2:]
    side = min(max_side, max(height, width))
    if max(height, width) > side:
        height, width = (max(1, size * side // max(height, width)) for size in (height, width))
        drawn = torch.nn.functional.interpolate(drawn, (height, width), mode="area")
    left, top = (side - width) // 2, (side - height) // 2
    return torch.nn.functional.pad(drawn, (left, side - width - left, top, side - height - top), value=1.0)


def to_pil(picture: Tensor, scale: int = 2) -> "Image.Image":
    """Convert a picture `(C, H, W)` in [0, 1] to a Pillow image with each pixel `scale` by `scale`."""
    from PIL import Image

    large = picture.clamp(0, 1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    pixels = (255 * large).round().to(torch.uint8).cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def save_image(picture: Tensor, out: str | Path, scale: int = 2) -> None:
    """Write a picture `(C, H, W)` in [0, 1] to a file, each pixel `scale` by `scale`."""
    save_pil(to_pil(picture, scale), out)


def save_pil(image: "Image.Image", out: str | Path) -> None:
    """Write a Pillow image to a file."""
    from PIL.PngImagePlugin import PngInfo

    check_suffix(out, (*IMAGE_SUFFIXES, ".pdf"))
    text = PngInfo()
    text.add_text("Software", STAMP)
    stamps: dict[str, dict[str, Any]] = {".png": {"pnginfo": text}, ".pdf": {"creator": STAMP}}
    with atomic_path(out) as path:
        image.save(path, **stamps.get(path.suffix.lower(), {"exif": make_exif()}))


def save_figure(figure: "Figure", out: str | Path) -> None:
    """Write a Matplotlib figure to a file, with text as text in a PDF or SVG."""
    import matplotlib

    check_suffix(out, (*IMAGE_SUFFIXES, ".pdf", ".svg"))
    with atomic_path(out) as path:
        name = {".png": "Software", ".pdf": "Creator", ".svg": "Creator"}.get(path.suffix.lower())
        stamp = {"metadata": {name: STAMP}} if name else {"pil_kwargs": {"exif": make_exif()}}
        with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
            figure.savefig(path, dpi=150, bbox_inches="tight", **stamp)


def make_exif() -> "Image.Exif":
    """Build metadata of a JPEG, WebP or TIFF that name this project as the software."""
    from PIL import ExifTags, Image

    exif = Image.Exif()
    exif[ExifTags.Base.Software] = STAMP
    return exif


def check_suffix(out: str | Path, suffixes: Sequence[str]) -> None:
    """Raise UserError for a file format without a place for the stamp of this project."""
    if Path(out).suffix.lower() not in suffixes:
        raise UserError(f"out={out} is invalid: expected a name that ends in {', '.join(suffixes)}")


def save_tensor(tensor: Tensor, out: str | Path) -> Path:
    """Write a tensor to a file as `torch.save` does, with the stamp of this project."""
    with atomic_path(out) as path:
        path.write_bytes(to_bytes(tensor))
    return Path(out)
