"""Labeled grids of images in a file.

Pillow, which starts fast, draws pixels. Matplotlib draws PDF and SVG, with text as text. Lengths are in pixels of the
file.
"""

from collections.abc import Sequence
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from betavae import plotting
from betavae.models.vae import VAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image, ImageFont

MIN_TILE = 64  # smaller images are enlarged to at least this side
MAX_WIDTH = 1600  # of all tiles in a row, unless they are wider at their own size
MIN_CAPTION_WIDTH = 420
MAX_LABEL = 80  # characters
GAP = 2  # between tiles
MARGIN = 8  # around a grid and its labels
FONT_SIZE = 13
LINE = 18  # height of a line of text
DPI = 100  # of a PDF or SVG


class Grid(NamedTuple):
    """Images `(N, C, H, W)` in [0, 1] in rows of `columns`, with labels."""

    images: Tensor
    columns: int
    row_labels: Sequence[str] = ()
    column_labels: Sequence[str] = ()
    title: str = ""

    @property
    def rows(self) -> int:
        return -(-len(self.images) // self.columns)


class Text(NamedTuple):
    """A line of text beside a point.

    `anchor` "l", "m" or "r" is the place of the point in the line. The point is always half-way up.
    """

    text: str
    x: float
    y: float
    anchor: str


class Drawing(NamedTuple):
    """Pictures `(C, H, W)` with their left and top, and texts, of a figure."""

    width: int
    height: int
    pictures: list[tuple[Tensor, int, int]]
    texts: list[Text]


def make_reconstruction_grid(vae: VAE, x: Tensor) -> Grid:
    """Arrange images `(N, C, H, W)` above their reconstructions."""
    columns = min(8, len(x))
    labels = ["input", "reconstruction"] * -(-len(x) // columns)
    return Grid(plotting.stack_reconstructions(vae, x), columns, labels)


def make_traversal_grid(vae: VAE, z: Tensor, values: Tensor, kl: Tensor, rows: int | None = None) -> Grid:
    """Arrange a row for each latent dimension, in which only that dimension of `z` changes.

    Args:
        vae: The model.
        z: The latents `(latent_dim,)` to start from.
        values: The values of the dimension `(V,)`, one per column, as in `plotting.traverse`.
        kl: The KL per latent dimension in nats, which sorts the rows.
        rows: The number of rows; None for all dimensions.
    """
    order = kl.argsort(descending=True)[:rows].tolist()
    labels = [f"z{dimension}  {kl[dimension]:.2f} nats" for dimension in order]
    columns = [f"{round(value, 1) + 0.0:.1f}" for value in values.tolist()]  # 0.0, not -0.0
    return Grid(plotting.traverse(vae, z, order, values), len(values), labels, columns)


def make_manifold_grid(vae: VAE, size: int) -> Grid:
    """Arrange `size` by `size` images of a 2-D latent space, labeled with z."""
    images = plotting.decode_manifold(vae, size)
    quantiles, (mean, std) = plotting.compute_quantiles(size), vae.prior.moments()
    across, up = ([f"{value:.1f}" for value in (mean[d].item() + std[d].item() * quantiles).tolist()] for d in range(2))
    return Grid(images, size, up[::-1], across)


def save_grids(grids: Sequence[Grid], out: str | Path, caption: str = "", across: int | None = None) -> None:
    """Write grids to an image, PDF or SVG file.

    Args:
        grids: The grids, row by row.
        out: The file.
        caption: A text below the grids.
        across: Grids per row; None for all.
    """
    plotting.check_suffix(out, (*plotting.IMAGE_SUFFIXES, ".pdf", ".svg"))
    drawing = arrange(grids, across or len(grids), caption)
    if Path(out).suffix.lower() in plotting.IMAGE_SUFFIXES:
        plotting.save_pil(draw_pixels(drawing), out)
    else:
        plotting.save_figure(draw_vectors(drawing), out)


def arrange(grids: Sequence[Grid], across: int, caption: str = "") -> Drawing:
    """Arrange grids in cells of equal size, with labels around them and a caption below."""
    titles = [[shorten(line) for line in grid.title.splitlines()] for grid in grids]
    left = max((measure(shorten(label)) + MARGIN for grid in grids for label in grid.row_labels), default=0)
    top = LINE * (max(map(len, titles)) + any(grid.column_labels for grid in grids))
    scales = [choose_scale(grid, across) for grid in grids]
    pictures = [draw_tiles(grid, scale) for grid, scale in zip(grids, scales, strict=True)]
    cell_width = max(
        [left + picture.shape[2] for picture in pictures] + [measure(t) for title in titles for t in title]
    )
    cell_height = top + max(picture.shape[1] for picture in pictures)
    placed, texts = [], []
    for number, (grid, title) in enumerate(zip(grids, titles, strict=True)):
        x = MARGIN + number % across * (cell_width + 2 * MARGIN) + left
        y = MARGIN + number // across * (cell_height + 2 * MARGIN) + top
        placed.append((pictures[number], x, y))
        texts += [Text(line, x, y - top + (i + 0.5) * LINE, "l") for i, line in enumerate(title)]
        texts += label_tiles(grid, scales[number], x, y)
    total = max(across * (cell_width + 2 * MARGIN), MIN_CAPTION_WIDTH if caption else 0)
    bottom = -(-len(grids) // across) * (cell_height + 2 * MARGIN)
    lines = wrap(caption, total - 2 * MARGIN)
    texts += [Text(line, MARGIN, bottom + (i + 0.5) * LINE, "l") for i, line in enumerate(lines)]
    return Drawing(total, bottom + len(lines) * LINE + MARGIN * bool(lines), placed, texts)


def choose_scale(grid: Grid, across: int) -> int:
    """Choose how many pixels of the file a pixel of an image is wide and high."""
    height, width = grid.images.shape[-2:]
    return max(1, min(-(-MIN_TILE // max(height, width)), MAX_WIDTH // (across * grid.columns * width)))


def draw_tiles(grid: Grid, scale: int) -> Tensor:
    """Draw the images with thin white gaps, as a picture `(C, H, W)`."""
    tiles = grid.images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return plotting.make_grid(tiles, grid.columns, background=1.0)


def label_tiles(grid: Grid, scale: int, x: int, y: int) -> list[Text]:
    """Place as many row and column labels beside the tiles as have room.

    `x` and `y` are the left and top of the tiles.
    """
    step_y, step_x = (scale * size + GAP for size in grid.images.shape[-2:])
    names = [fit(label, max(step_x, MIN_TILE)) for label in grid.column_labels]
    every = 1 + max(map(measure, names), default=0) // step_x
    across = [x + GAP / 2 + (i + 0.5) * step_x for i in range(grid.columns)]
    down = [y + GAP / 2 + (i + 0.5) * step_y for i in range(grid.rows)]
    above = zip(names[::every], across[::every], strict=False)
    beside = list(zip(grid.row_labels, down, strict=False))[:: 1 + LINE // step_y]
    texts = [Text(label, place, y - LINE / 2, "m") for label, place in above]
    return texts + [Text(shorten(label), x - MARGIN / 2, place, "r") for label, place in beside]


def draw_pixels(drawing: Drawing) -> "Image.Image":
    """Draw with Pillow, in gray if all pictures are."""
    from PIL import Image, ImageDraw

    mode = "L" if all(len(picture) == 1 for picture, _, _ in drawing.pictures) else "RGB"
    image = Image.new(mode, (drawing.width, drawing.height), "white")
    for picture, x, y in drawing.pictures:
        image.paste(plotting.to_pil(picture, 1), (x, y))
    draw = ImageDraw.Draw(image)
    font = load_font()
    for line in drawing.texts:
        draw.text((line.x, line.y), line.text, "black", font, f"{line.anchor}m")
    return image


def draw_vectors(drawing: Drawing) -> "Figure":
    """Draw with Matplotlib, each pixel of an image as a sharp square."""
    figure = plotting.create_figure(drawing.width / DPI, drawing.height / DPI)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for picture, x, y in drawing.pictures:
        image = plotting.to_pil(picture, 1).convert("RGB")  # exact, without a color map
        place = (x, x + image.width, y + image.height, y)
        axes.imshow(image, interpolation="none", extent=place, aspect="auto")
    axes.set(xlim=(0, drawing.width), ylim=(drawing.height, 0))
    sides = {"l": "left", "m": "center", "r": "right"}
    for line in drawing.texts:
        style: dict[str, Any] = {
            "size": FONT_SIZE * 72 / DPI,
            "ha": sides[line.anchor],
            "va": "center_baseline",
            "parse_math": False,
        }
        axes.text(line.x, line.y, line.text, **style)
    return figure


@cache
def load_font() -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    """Load Matplotlib's own font, which has Greek letters, without an import of Matplotlib."""
    from PIL import ImageFont

    file = distribution("matplotlib").locate_file("matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf")
    try:
        # The basic layout draws the same on every machine.
        return ImageFont.truetype(str(file), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError:  # a Linux distribution may have moved it
        return ImageFont.load_default(FONT_SIZE)


def measure(text: str) -> int:
    """Return the width of a line of text."""
    return int(load_font().getlength(text)) + 1


def shorten(text: str) -> str:
    """Return a text as one line of at most `MAX_LABEL` characters."""
    text = " ".join(text.splitlines())
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"


def fit(text: str, width: int) -> str:
    """Shorten a text until it is less wide than `width`."""
    text = shorten(text)
    while measure(text) >= width and len(text) > 1:
        text = f"{text[:-2]}…"
    return text


def wrap(text: str, width: int) -> list[str]:
    """Break a text between words into lines of at most `width`, except for longer words."""
    lines: list[str] = []
    for word in map(shorten, text.split()):
        if lines and measure(longer := f"{lines[-1]} {word}") <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
