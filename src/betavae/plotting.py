"""Pictures of a VAE: grids as tensors in [0, 1], and matplotlib figures around them. Clamped, never auto-contrasted."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from betavae.errors import UserError
from betavae.models.vae import VAE
from betavae.storage.files import STAMP, atomic_path

MAX_SPRITE_SIDE = 4096  # pixels; of a larger image of all tiles, a browser may show nothing
PIXELS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")


def make_grid(images: Tensor, columns: int) -> Tensor:
    """`(N, C, H, W)` -> one picture `(C, rows * (H + 2) + 2, columns * (W + 2) + 2)`, with black lines between."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    tiles = images.new_zeros(rows * columns, c, h + 2, w + 2)
    tiles[:n, :, 2:, 2:] = images.clamp(0, 1)
    picture = tiles.view(rows, columns, c, h + 2, w + 2).permute(2, 0, 3, 1, 4).reshape(c, rows * (h + 2), -1)
    return torch.nn.functional.pad(picture, (0, 2, 0, 2))


def reconstructions(vae: VAE, x: Tensor) -> Tensor:
    """Rows of originals, each above the row of their reconstructions, in rows of (at most) 8; the last is filled up
    with black where `x` `(N, C, H, W)` does not fill it."""
    pairs = torch.stack((x, vae.reconstruct(x)))
    columns = min(8, len(x))
    pairs = torch.cat((pairs, pairs.new_zeros(2, -len(x) % columns, *x.shape[1:])), 1)
    return pairs.unflatten(1, (-1, columns)).transpose(0, 1).flatten(0, 2)


@torch.no_grad()
def interpolation(vae: VAE, start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Decoded means on the line between the posterior means of two images `(1, C, H, W)`: `(steps, C, H, W)`."""
    weight = torch.linspace(0, 1, steps, device=start.device).unsqueeze(1)
    z = (1 - weight) * vae.encode(start).mean + weight * vae.encode(end).mean
    return vae.decode(z)


@torch.no_grad()
def traversal(vae: VAE, z: Tensor, dimensions: Sequence[int], values: Tensor) -> Tensor:
    """A row for each dimension: the decoded means as it alone moves from `z` `(latent_dim,)` over `values` `(V,)`."""
    grid_z = z.repeat(len(dimensions), len(values), 1)
    for row, dimension in enumerate(dimensions):
        grid_z[row, :, dimension] = values
    return vae.decode(grid_z.flatten(0, 1))


@torch.no_grad()
def manifold(vae: VAE, size: int) -> Tensor:
    """A 2-D latent space at `size` by `size` quantiles of the prior (Kingma & Welling 2014, figure 4)."""
    if vae.latent_dim != 2:
        raise UserError(f"a manifold needs model.latent_dim=2, and this model has latent_dim={vae.latent_dim}")
    device = next(vae.parameters()).device
    quantiles = torch.special.ndtri((torch.arange(size, device=device) + 0.5) / size)
    rows, columns = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return vae.decode(torch.stack((columns, rows), dim=-1).flatten(0, 1))


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure with no window and no global state."""
    from matplotlib.figure import Figure  # imported where it is needed: it takes half a second

    return Figure(figsize=(width, height), layout="constrained")


def imshow(axes: Any, picture: Tensor) -> None:
    """Draw a `(C, H, W)` picture in [0, 1] on matplotlib axes, pixel for pixel."""
    pixels = picture.clamp(0, 1).cpu().permute(1, 2, 0).numpy()
    axes.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])


def kl_bar_figure(kl: Tensor) -> Any:
    """KL per latent dimension in nats, in descending order, as a figure."""
    figure = new_figure(6, 3)
    axes = figure.add_subplot()
    order = kl.argsort(descending=True).tolist()
    axes.bar(range(len(kl)), kl[order].tolist())
    axes.set_xticks(range(len(kl)), [str(d) for d in order], fontsize=7 if len(kl) <= 30 else 4)
    axes.set_xlabel("latent dimension")
    axes.set_ylabel("KL [nats]")
    axes.set_title(f"KL per dimension, {float(kl.sum()):.2f} nats in all", fontsize=10)
    return figure


def traversal_figure(rows: Tensor, values: Tensor, dimensions: Sequence[int], kl: Tensor) -> Any:
    """The rows of a `traversal`, each named by its dimension and that dimension's KL in nats `(latent_dim,)`."""
    figure = new_figure(0.45 * len(values) + 1.2, 0.45 * len(dimensions) + 0.6)
    axes = figure.add_subplot()
    imshow(axes, make_grid(rows, len(values)))
    height, width = (size + 2 for size in rows.shape[-2:])
    axes.set_yticks(
        [(row + 0.5) * height for row in range(len(dimensions))], [f"z{d}  {kl[d]:.2f} nats" for d in dimensions]
    )
    axes.set_xticks([(column + 0.5) * width for column in range(len(values))], [f"{v:.1f}" for v in values.tolist()])
    axes.tick_params(length=0, labelsize=7)
    return figure


def bounds_figure(ks: Sequence[int], bounds: Sequence[dict[str, float]], kl: Sequence[float], active_units: int) -> Any:
    """Importance-weighted bounds (`mean` ± `se`, nats) over their number of samples, beside the KL per dimension."""
    figure = new_figure(9, 3)
    left, right = figure.subplots(1, 2)
    left.errorbar(ks, [b["mean"] for b in bounds], [b["se"] for b in bounds], marker="o", capsize=3)
    left.set_xscale("log")
    left.set_xlabel("importance samples K")
    left.set_ylabel("bound on -log p(x) [nats]")
    right.bar(range(1, len(kl) + 1), sorted(kl, reverse=True))
    right.set_xlabel(f"latent dimensions by their KL, {active_units} of {len(kl)} active")
    right.set_ylabel("KL [nats]")
    return figure


def bits_figure(rows: dict[str, tuple[float | None, float]], note: str) -> Any:
    """Bits per pixel by name, of each image alone where that is known, and of all in one; `note` above."""
    figure = new_figure(6, 0.35 * len(rows) + 0.8)
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
    """`(N, 3, H, W)`: grey images as strokes on white in the colour of their (first) label; colour images as they
    are."""
    import matplotlib

    if x.shape[1] == 3:
        return x
    first = labels if labels.ndim == 1 else labels[:, 0]
    colours = torch.tensor(matplotlib.colormaps["tab10"].colors)[first.cpu() % 10]  # type: ignore[attr-defined]
    return 1 - x.mean(1, keepdim=True) * (1 - colours.view(-1, 3, 1, 1))


def tiles(x: Tensor, labels: Tensor, most: int) -> Tensor:
    """Square tiles `(N, 3, side, side)` of images as `coloured`, shrunk to a side of at most `most`, centered on white.

    TensorBoard's sprite of tiles that are not square fails or is unreadable (torch 2.14).
    """
    drawn, (height, width) = tint_by_label(x, labels), x.shape[-2:]
    side = min(most, max(height, width))
    if max(height, width) > side:
        height, width = (max(1, size * side // max(height, width)) for size in (height, width))
        drawn = torch.nn.functional.interpolate(drawn, (height, width), mode="area")
    left, top = (side - width) // 2, (side - height) // 2
    return torch.nn.functional.pad(drawn, (left, side - width - left, top, side - height - top), value=1.0)


def to_pil(picture: Tensor, scale: int = 2) -> Any:
    """A `(C, H, W)` picture in [0, 1] as one of Pillow's, each pixel `scale` by `scale`."""
    from PIL import Image

    large = picture.clamp(0, 1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    pixels = (255 * large).round().to(torch.uint8).cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def save_image(picture: Tensor, out: str | Path, scale: int = 2) -> None:
    """Write a `(C, H, W)` picture in [0, 1] to a file, each pixel `scale` by `scale`."""
    from PIL.PngImagePlugin import PngInfo

    check_ending(out, (*PIXELS, ".pdf"))
    text = PngInfo()
    text.add_text("Software", STAMP)
    marks: dict[str, dict[str, Any]] = {".png": {"pnginfo": text}, ".pdf": {"creator": STAMP}}
    with atomic_path(out) as path:
        to_pil(picture, scale).save(path, **marks.get(path.suffix.lower(), {"exif": exif_mark()}))


def save_figure(figure: Any, out: str | Path) -> None:
    """Write a matplotlib figure to a file."""
    check_ending(out, (*PIXELS, ".pdf", ".svg"))
    with atomic_path(out) as path:
        name = {".png": "Software", ".pdf": "Creator", ".svg": "Creator"}.get(path.suffix.lower())
        mark = {"metadata": {name: STAMP}} if name else {"pil_kwargs": {"exif": exif_mark()}}
        figure.savefig(path, dpi=150, bbox_inches="tight", **mark)


def exif_mark() -> Any:
    """Name this project as the software in the metadata of a JPEG, WebP or TIFF."""
    from PIL import ExifTags, Image

    exif = Image.Exif()
    exif[ExifTags.Base.Software] = STAMP
    return exif


def check_ending(out: str | Path, endings: Sequence[str]) -> None:
    """Reject a format that has no place for the mark of this project, by which a file may be replaced later."""
    if Path(out).suffix.lower() not in endings:
        raise UserError(f"out={out} is invalid: expected a name that ends in {', '.join(endings)}")


def save_tensor(tensor: Any, out: str | Path) -> Path:
    with atomic_path(out) as path:
        torch.save(tensor, path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = STAMP.encode()
    return Path(out)
