"""Latents as files: what an encoder makes of images, to be looked at elsewhere and decoded again."""

import csv
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from betavae.data.array_io import ArrayFile
from betavae.errors import UserError
from betavae.models.vae import VAE
from betavae.objectives import elbo
from betavae.storage.files import STAMP, atomic_path

CHUNK = 500  # images at a time
PARQUET_RATIO = 8  # the most values, and unpacked bytes, per byte of a Parquet file that is read


class Latents(NamedTuple):
    mean: Tensor  # (N, latent_dim), of the posterior
    logvar: Tensor  # (N, latent_dim)
    kl: Tensor  # (N,) nats
    neg_elbo: Tensor  # (N,) nats, by one z


@torch.no_grad()
def encode(vae: VAE, pixels: Tensor, seed: int = 0) -> Latents:
    """`pixels` uint8 `(N, C, H, W)`."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for part in pixels.split(CHUNK):
        x = part.float() / 255
        posterior = vae.encode(x)
        terms = elbo(vae, x, torch.randn(1, len(x), vae.latent_dim, generator=generator), 1.0)
        kl = terms.kl.sum(1)
        parts.append(Latents(*posterior, kl, terms.recon + kl))
    return Latents(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def save_latents(latents: Latents, names: list[str], labels: list[Any] | None, out: str | Path) -> None:
    """As FILE.npz (`names`, `mean`, `logvar`, `kl`, `neg_elbo`, and `labels` if there are any), or as FILE.csv or
    FILE.parquet (which needs pyarrow) with a column for each number.

    Raises UserError for another ending, or a file that is there and not of this project.
    """
    if Path(out).suffix not in (".npz", ".csv", ".parquet"):
        raise UserError(f"out={out} cannot be: it must end in .npz, .csv or .parquet")
    if Path(out).suffix == ".parquet":
        check_pyarrow(Path(out))
    if Path(out).suffix == ".npz":
        columns: dict[str, Any] = {name: value.numpy() for name, value in latents._asdict().items()}
        columns |= {"names": np.array(names)} | ({} if labels is None else {"labels": np.array(labels)})
        with atomic_path(out) as path:
            np.savez(path, **columns)
            with zipfile.ZipFile(path, "a") as archive:
                archive.comment = STAMP.encode()
        return
    columns = {"name": names, "label": labels if labels is not None else [""] * len(names)}
    columns |= {"kl": latents.kl.tolist(), "neg_elbo": latents.neg_elbo.tolist()}
    for part, numbers in (("mean", latents.mean), ("logvar", latents.logvar)):
        columns |= {f"{part}_{d}": column.tolist() for d, column in enumerate(numbers.T)}
    with atomic_path(out) as path:
        if path.suffix == ".parquet":
            from pyarrow import parquet, table

            parquet.write_table(table(columns).replace_schema_metadata({"made_by": STAMP}), path)
            return
        with open(path, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow([*columns, f"made by {STAMP}"])
            rows.writerows([*row, ""] for row in zip(*columns.values(), strict=True))


def load_latents(path: Path, latent_dim: int) -> tuple[list[str], Tensor]:
    """The names and latents `(N, latent_dim)` of a file of `write`'s (its posterior means), or of FILE.npy.

    Raises UserError for any other file, and for latents of another number of dimensions.
    """
    if path.suffix == ".parquet":
        check_pyarrow(path)
    try:
        if path.suffix in (".csv", ".parquet"):
            rows = read_rows(path)
            names = [row["name"] for row in rows]
            z = torch.tensor([[float(row[f"mean_{d}"]) for d in range(count_means(rows))] for row in rows])
        else:
            file = ArrayFile(path)
            lone = path.suffix == ".npy"
            z = torch.from_numpy(np.asarray(file.read("images" if lone else "mean"), dtype=np.float32))
            names = [str(name) for name in (range(len(z)) if lone else file.read("names"))]
    except (UserError, OSError, ValueError, TypeError, KeyError, MemoryError, csv.Error) as error:
        raise UserError(f"latents: {path} is no whole file of encode.py, nor a FILE.npy of numbers") from error
    if z.ndim != 2 or z.shape[1] != latent_dim or not len(z) == len(names) > 0:
        raise UserError(f"latents: {path} holds {tuple(z.shape)}, and this model needs (N, {latent_dim})")
    if not z.isfinite().all():
        raise UserError(f"latents: {path} holds numbers that are not finite")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise UserError(f"latents: {path} has names that lead out of a folder")
    return names, z


def check_pyarrow(path: Path) -> None:
    if find_spec("pyarrow") is None:
        raise UserError(f'{path} needs pyarrow: `pip install -e ".[parquet]"`; or take .csv or .npz')


def read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            about = file.metadata
            unpacked = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            if max(unpacked, about.num_rows * about.num_columns) > PARQUET_RATIO * path.stat().st_size:
                raise ValueError("it unpacks to more than its size allows")
            return file.read().to_pylist()
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def count_means(rows: list[dict[str, Any]]) -> int:
    return sum(key.startswith("mean_") for key in (rows[0] if rows else {}))


def chunks(names: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(names), CHUNK):
        yield names[start : start + CHUNK]
