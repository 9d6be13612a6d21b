"""Images that a person names, as a model sees them."""

from pathlib import Path

import torch

from betavae.data import DATASETS, USER_DATASETS
from betavae.data.file_listing import index_names
from betavae.data.image_io import LoadedImages, read_images
from betavae.data.image_set import ImageSet
from betavae.errors import UserError
from betavae.runtime.checkpoint import TrainedRun

BUILTIN_DATASETS = set(DATASETS) - set(USER_DATASETS)  # whose name alone says which images they are
SPLITS = ("test", "validation", "train")


def is_dataset_name(where: str | list[str]) -> bool:
    """Whether it is the name of a data set, and no file or folder is there by that name."""
    return isinstance(where, str) and where in BUILTIN_DATASETS and not Path(where).exists()


def resolve_images(run: TrainedRun, where: str | list[str], data_root: str | None = None) -> LoadedImages:
    """`test`, `validation` or `train` of the model's own data; the name of a data set, for its test images; a folder, a
    file, or several: pictures, or FILE.npy or .npz. Pixels are uint8 of the model's shape, for a model of binarised
    images 0 and 255; `notes` say what was done to them. Names are the files' where there are files, and the labels of
    pictures in a folder are the names of its folders.

    Raises UserError if there are none.
    """
    if where in SPLITS:
        own = run.subset(str(where), data_root)
        labels: list | None = own.labels.tolist()
        if own.names:  # of a folder, whose labels nobody knows by their numbers
            labels = [own.classes[label] for label in own.labels] if own.classes else None
        return LoadedImages(own.tensor(), own.names or index_names(len(own)), labels, [])
    if is_dataset_name(where):
        images = DATASETS[str(where)](Path(data_root or "data"), "test")
        found = from_dataset(images, run) if images else None
    else:
        look = {key: run.data[key] for key in ("fit", "background") if key in run.data}
        found = read_images(where, run.vae.image_shape, **look)
    if found is None:
        raise UserError(f"images={where}: it has no test images")
    if run.data.get("binarize", "none") == "none":
        return found
    pixels = (found.pixels > 127).to(torch.uint8) * 255
    return found._replace(pixels=pixels, notes=[*found.notes, "binarised: above 127 is 1"])


def from_dataset(images: ImageSet, run: TrainedRun) -> LoadedImages:
    if tuple(images.pixels.shape[1:]) != run.vae.image_shape:
        raise UserError(
            f"its images are {tuple(images.pixels.shape[1:])}, and this model's {run.vae.image_shape}: name a folder "
            "of pictures, which are resized"
        )
    return LoadedImages(images.tensor(), index_names(len(images)), images.labels.tolist(), [])
