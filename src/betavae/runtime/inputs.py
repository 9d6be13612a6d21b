"""Resolve the images that a user names to the pixels that a model sees."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from betavae.data import DATASETS, USER_DATASETS
from betavae.data.datasets.table import MissingColumnError, read_table
from betavae.data.file_listing import index_names
from betavae.data.image_io import LoadedImages, read_images
from betavae.data.image_set import ImageSet
from betavae.data.labels import describe_classes, match_labels, name_labels
from betavae.data.loader import binarize_pixels
from betavae.data.scaling import check_values, dtype_name, find_outside
from betavae.errors import UserError
from betavae.runtime.checkpoint import TrainedRun

SPLITS = ("test", "validation", "train")


def is_dataset_name(where: str | list[str]) -> bool:
    """Return True for the name of a built-in data set, unless a file or folder has this name."""
    return isinstance(where, str) and where in DATASETS and where not in USER_DATASETS and not Path(where).exists()


def resolve_images(run: TrainedRun, where: str | list[str], data_root: str | None = None) -> LoadedImages:
    """Load images as the model `run` sees them.

    Args:
        run: The trained model.
        where: "test", "validation" or "train" of the model's own data; the name of a data set, for its test images; a
            folder, an image file or a list of these; or FILE.npy or FILE.npz.
        data_root: The folder or file of the data set, if it was moved.

    Returns:
        Images of the model's shape and stored type, with only two values for a model of binarized images. Labels of
        images from folders are the names of the folders.

    Raises:
        UserError: If there are no such images.
    """
    if where in SPLITS:
        return load_own_split(run, str(where), data_root)
    if is_dataset_name(where) and where == run.data.get("name"):
        return load_own_split(run, "test", data_root)
    if run.columns is not None:
        found = read_rows(run, where)
    elif is_dataset_name(where):
        images = DATASETS[str(where)](Path(data_root or "data"), "test")
        if images is None:
            raise UserError(f"images={where} has no test images")
        found = match_shape(str(where), images, run)
    else:
        settings = {key: run.data[key] for key in ("fit", "background") if key in run.data}
        found = read_images(where, run.vae.image_shape, **settings, dtype=run.scaling.stored_dtype)
        if found.pixels.is_floating_point():
            check_values(ImageSet(found.pixels, torch.empty(0)), run.scaling.mode, f"images={where}: its images")
    if run.scaling.mode == "minmax" and (note := describe_outside(run, found.pixels)):
        found = found._replace(notes=[*found.notes, note])
    if run.data.get("binarize", "none") == "none":
        return found
    threshold = f"{run.scaling.invert(torch.tensor([0.5])).mean():g}" if not run.scaling.is_bytes else "127"
    pixels = run.scaling.to_stored(binarize_pixels(found.pixels, "threshold", run.scaling))
    return found._replace(pixels=pixels, notes=[*found.notes, f"binarized: above {threshold} is 1"])


def includes_training_images(run: TrainedRun, where: str | list[str], data_root: str | None = None) -> bool:
    """Return True if `where` names the training or validation images, or the file or folder that has them."""
    if where in ("train", "validation"):
        return True
    if not isinstance(where, str):
        return False
    path, root = (Path(name).expanduser() for name in (where, data_root or run.data["root"]))
    return path.exists() and root.exists() and path.samefile(root)


def describe_outside(run: TrainedRun, pixels: Tensor) -> str | None:
    """Describe values outside the range of the training data, which data.scaling=minmax maps to [0, 1]."""
    values = pixels.numpy()
    lowest, highest = (torch.from_numpy(f(values, (0, 2, 3))).double() for f in (np.min, np.max))
    outside = find_outside(run.scaling, lowest, highest)
    if not outside:
        return None
    if run.columns is not None:
        names = ", ".join(run.columns[number] for number in outside[:5]) + ", ..." * (len(outside) > 5)
        return f"values outside the range of the training data (data.scaling=minmax) in {names}"
    found = f"values from {lowest.min().item():g} to {highest.max().item():g}"
    return f"{found}; the training data have {run.scaling.low:g} to {run.scaling.high:g} (data.scaling=minmax)"


def resolve_labels(run: TrainedRun, where: str | list[str], images: LoadedImages, label: object) -> Tensor:
    """Match the labels of images to the classes of a conditional model.

    The labels are those of `resolve_images`, or one `label` for all images.

    Returns:
        Class numbers, (N,); zeros for a model that is not conditional, which ignores them.

    Raises:
        UserError: If the images have no labels, or other ones than the model.
    """
    classes, labels, is_dataset = run.vae.classes, images.labels, is_dataset_name(where)
    is_own = where in SPLITS or (is_dataset and where == run.data["name"])
    if classes and label is None and is_dataset and not is_own:
        raise UserError(
            f"images={where}: its labels are not those of the model's data set; pass label={describe_classes(classes)}"
        )
    if classes and label is None and labels is None and run.columns is not None:
        raise UserError(
            f"images={where} has no column {run.data['label']}, the label; add it, or pass "
            f"label={describe_classes(classes)} for all rows"
        )
    if classes and labels and is_own and run.data["name"] not in USER_DATASETS:
        labels = [classes[number] for number in labels]
    return match_labels(classes, len(images.names), label, labels, f"images={where}")


def read_rows(run: TrainedRun, where: str | list[str]) -> LoadedImages:
    """Read the columns of a model of a table from a file, and the labels if they are there."""
    path = Path(where if isinstance(where, str) else where[0]).expanduser()
    if not isinstance(where, str) or path.suffix not in (".csv", ".parquet", ".npy"):
        raise UserError(f"images={where} is invalid: expected FILE.csv, .parquet or .npy for a model of a table")
    try:
        table = read_table(path, run.columns, run.data.get("label"))
    except MissingColumnError:
        table = read_table(path, run.columns)  # new rows may have no labels
    labels = None if table.labels is None else table.labels.tolist()
    return LoadedImages(table.values, index_names(len(table.values)), labels, [])


def load_own_split(run: TrainedRun, split: str, data_root: str | None) -> LoadedImages:
    images = run.subset(split, data_root)
    labels: list | None = images.labels.tolist()
    if not images.has_labels:
        labels = None
    elif run.data["name"] in USER_DATASETS and images.classes:  # users know these labels only by name
        numbers = images.labels.tolist()
        is_folder = run.data["name"] == "folder"  # a number in the name of a folder is a text
        labels = [images.classes[n] for n in numbers] if is_folder else name_labels(images.classes, numbers)
    return LoadedImages(images.tensor(), images.names or index_names(len(images)), labels, [])


def match_shape(name: str, images: ImageSet, run: TrainedRun) -> LoadedImages:
    """Load the images of a data set.

    Raises:
        UserError: If the model expects another shape.
    """
    shape = tuple(images.pixels.shape[1:])
    if shape != run.vae.image_shape:
        raise UserError(
            f"images={name} is invalid: its images have shape {shape}, and the model expects {run.vae.image_shape}; "
            "pass a folder of images, which are resized"
        )
    if images.dtype != run.scaling.stored_dtype:
        types = f"are of type {dtype_name(images.dtype)}, and the model's of {run.scaling.dtype}"
        raise UserError(f"images={name} is invalid: its images {types}")
    return LoadedImages(images.tensor(), index_names(len(images)), images.labels.tolist(), [])
