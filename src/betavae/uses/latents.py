"""Latents as files: what an encoder makes of images, to be looked at elsewhere and decoded again."""

import csv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from betavae.errors import UserError
from betavae.files import STAMP, writing
from betavae.objectives import elbo
from betavae.vae import VAE

CHUNK = 500  # images at a time


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


def write(latents: Latents, names: list[str], labels: list[Any] | None, out: str | Path) -> None:
    """As FILE.npz (`names`, `mean`, `logvar`, `kl`, `neg_elbo`, and `labels` if there are any), or as FILE.csv with a
    column for each number. Raises UserError for another ending, or a file that is there and not of this project."""
    with writing(out) as path:
        if path.suffix == ".npz":
            columns: dict[str, Any] = {name: value.numpy() for name, value in latents._asdict().items()}
            columns |= {"names": np.array(names)} | ({} if labels is None else {"labels": np.array(labels)})
            with open(path, "wb") as file:
                np.savez(file, **columns)
            with zipfile.ZipFile(path, "a") as archive:
                archive.comment = STAMP.encode()
        elif path.suffix == ".csv":
            dims = range(latents.mean.shape[1])
            header = ["name", "label", "kl", "neg_elbo", *(f"mean_{d}" for d in dims), *(f"logvar_{d}" for d in dims)]
            with open(path, "w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow([*header, f"made by {STAMP}"])
                for i, name in enumerate(names):
                    numbers = [*latents.mean[i].tolist(), *latents.logvar[i].tolist()]
                    label = "" if labels is None else labels[i]
                    rows.writerow([name, label, latents.kl[i].item(), latents.neg_elbo[i].item(), *numbers, ""])
        else:
            raise UserError(f"out={out} cannot be: it must end in .npz or .csv")


def read(path: Path, latent_dim: int) -> tuple[list[str], Tensor]:
    """The names and latents `(N, latent_dim)` of a file of `write`'s (its posterior means), or of FILE.npy.

    Raises UserError for any other file, and for latents of another number of dimensions.
    """
    try:
        if path.suffix == ".csv":
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
            names = [row["name"] for row in rows]
            z = torch.tensor([[float(row[f"mean_{d}"]) for d in range(count_means(rows))] for row in rows])
        else:
            held = np.load(path, allow_pickle=False)
            array = held if isinstance(held, np.ndarray) else held["mean"]
            z = torch.from_numpy(np.asarray(array, dtype=np.float32))
            names = [str(n) for n in (range(len(z)) if isinstance(held, np.ndarray) else held["names"])]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"latents: {path} is no whole file of encode.py, nor a FILE.npy of numbers") from error
    if z.ndim != 2 or z.shape[1] != latent_dim or not len(z):
        raise UserError(f"latents: {path} holds {tuple(z.shape)}, and this model needs (N, {latent_dim})")
    if not z.isfinite().all():
        raise UserError(f"latents: {path} holds numbers that are not finite")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise UserError(f"latents: {path} has names that lead out of a folder")
    return names, z


def count_means(rows: list[dict[str, str]]) -> int:
    return sum(key.startswith("mean_") for key in (rows[0] if rows else {}))


def chunks(names: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(names), CHUNK):
        yield names[start : start + CHUNK]
