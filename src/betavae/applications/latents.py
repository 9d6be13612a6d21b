"""Encode images into a file of latents, and read such a file to decode it."""

import csv
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from betavae.data.array_io import ArrayFile
from betavae.data.loader import BYTES
from betavae.data.scaling import Scaling
from betavae.errors import UserError
from betavae.models.vae import VAE
from betavae.objectives import elbo
from betavae.storage.files import STAMP, atomic_path, write_csv

BATCH_SIZE = 500
MAX_PARQUET_RATIO = 8  # values, and unpacked bytes, per byte of a Parquet file


class Latents(NamedTuple):
    """The posteriors of N images."""

    mean: Tensor  # (N, latent_dim)
    logvar: Tensor  # (N, latent_dim)
    kl: Tensor  # (N,) nats
    neg_elbo: Tensor  # (N,) nats, from one posterior sample
    tsne: Tensor | None = None  # (N, 2), see `compute_tsne`


@torch.no_grad()
def encode_images(
    vae: VAE, pixels: Tensor, seed: int = 0, scaling: Scaling = BYTES, labels: Tensor | None = None
) -> Latents:
    """Encode stored images `(N, C, H, W)`, for a conditional model with their `labels` `(N,)`."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for index in torch.arange(len(pixels)).split(BATCH_SIZE):
        x = scaling.apply(pixels.index_select(0, index))
        view = vae.given(None if labels is None else labels[index])
        posterior = view.encode(x)
        terms = elbo(view, x, torch.randn(1, len(x), vae.latent_dim, generator=generator), 1.0)
        kl = terms.kl.sum(1)
        parts.append((*posterior, kl, terms.recon + kl))
    return Latents(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def save_latents(latents: Latents, names: Sequence[str], labels: Sequence[object] | None, out: str | Path) -> None:
    """Save latents as FILE.npz, or as FILE.csv or FILE.parquet with one column per number.

    Raises:
        UserError: If `out` has another ending, or is a file that this project did not write.
    """
    check_format(out)
    suffix = Path(out).suffix
    with atomic_path(out) as path:
        if suffix == ".npz":
            write_npz(path, latents, names, labels)
        elif suffix == ".csv":
            write_csv(path, to_columns(latents, names, labels))
        else:
            from pyarrow import parquet, table

            columns = table(to_columns(latents, names, labels))
            parquet.write_table(columns.replace_schema_metadata({"made_by": STAMP}), path)


def check_format(out: str | Path) -> None:
    """Raise UserError for an ending of another format, or one whose package is not installed."""
    suffix = Path(out).suffix
    if suffix not in (".npz", ".csv", ".parquet"):
        raise UserError(f"out={out} is invalid: expected a name that ends in .npz, .csv or .parquet")
    if suffix == ".parquet":
        check_pyarrow(Path(out))


def write_npz(path: Path, latents: Latents, names: Sequence[str], labels: Sequence[object] | None) -> None:
    """Write `mean`, `logvar`, `kl`, `neg_elbo`, `names` and, where there are any, `tsne` and `labels`."""
    values = {name: value for name, value in latents._asdict().items() if value is not None}
    arrays = {name: value.numpy() for name, value in values.items()} | {"names": np.array(names)}
    if labels is not None:
        arrays["labels"] = np.array(labels)
    np.savez(path, **arrays)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = STAMP.encode()


def to_columns(latents: Latents, names: Sequence[str], labels: Sequence[object] | None) -> dict[str, Sequence[object]]:
    """Arrange latents as columns of a table.

    The columns are name, label, kl, neg_elbo, mean_0, ..., logvar_0, ..., tsne_0, tsne_1.
    """
    columns: dict[str, Sequence[object]] = {"name": names, "label": [""] * len(names) if labels is None else labels}
    columns |= {"kl": latents.kl.tolist(), "neg_elbo": latents.neg_elbo.tolist()}
    for name, values in (("mean", latents.mean), ("logvar", latents.logvar), ("tsne", latents.tsne)):
        if values is None:
            continue
        columns |= {f"{name}_{d}": column.tolist() for d, column in enumerate(values.T)}
    return columns


def load_latents(path: Path, latent_dim: int) -> tuple[list[str], Tensor, list[object] | None]:
    """Load names, latents `(N, latent_dim)` and labels from a file.

    The file is FILE.npy or a file of `save_latents`, whose means are read.

    Raises:
        UserError: If the file is neither, or its latents have another dimension or are not finite.
    """
    if path.suffix == ".parquet":
        check_pyarrow(path)
    try:
        if path.suffix in (".csv", ".parquet"):
            rows = read_rows(path)
            names = [str(row["name"]) for row in rows]
            dimensions = sum(key.startswith("mean_") for key in (rows[0] if rows else ()))
            z = torch.tensor([[float(row[f"mean_{d}"]) for d in range(dimensions)] for row in rows])
            texts = ["" if (label := row.get("label")) is None else str(label) for row in rows]
            labels: list[object] | None = (
                [int(text) if is_integer(text) else text for text in texts] if any(texts) else None
            )
        else:
            file, is_bare = ArrayFile(path), path.suffix == ".npy"
            z = torch.from_numpy(np.array(file.read("images" if is_bare else "mean"), dtype=np.float32))
            names = [str(name) for name in (range(len(z)) if is_bare else file.read("names"))]
            labels = list(file.read("labels").tolist()) if not is_bare and "labels" in file.arrays else None
    except (UserError, OSError, ValueError, TypeError, KeyError, MemoryError, csv.Error) as error:
        raise UserError(f"latents: {path} is neither an intact file of encode.py nor a FILE.npy of numbers") from error
    if z.ndim != 2 or z.shape[1] != latent_dim or not len(z) == len(names) > 0:
        raise UserError(f"latents: {path} has shape {tuple(z.shape)}; expected (N, {latent_dim}) for this model")
    if not z.isfinite().all():
        raise UserError(f"latents: {path} has values that are not finite")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise UserError(f"latents: {path} has names that point outside the output folder")
    if labels is not None and len(labels) != len(z):
        raise UserError(f"latents: {path} has {len(labels)} labels for {len(z)} latents")
    return names, z, labels


def is_integer(text: str) -> bool:
    """Return whether a text is an integer as Python writes it, and not a name such as 007."""
    return text.isascii() and text.isdecimal() and text == str(int(text))


def check_pyarrow(path: Path) -> None:
    """Raise UserError if pyarrow is not installed."""
    if find_spec("pyarrow") is None:
        raise UserError(f'{path} needs pyarrow: pip install -e ".[parquet]"; or use .csv or .npz')


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file, or of a Parquet file of limited compression."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            about = file.metadata
            unpacked = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            if max(unpacked, about.num_rows * about.num_columns) > MAX_PARQUET_RATIO * path.stat().st_size:
                raise ValueError("it unpacks to more than its size allows")
            return file.read().to_pylist()
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
