"""Images in a NumPy file, FILE.npy or FILE.npz."""

from pathlib import Path

from betavae.data.array_io import ArrayFile
from betavae.data.holdout import DEFAULT_HOLDOUT, exclude_indices, hold_out_at_random
from betavae.data.image_set import ImageSet, LazySubset
from betavae.errors import UserError

# The names of the images and labels of a split, which Keras and MedMNIST (Yang et al. 2023) use.
LAYOUTS = (("x_{}", "y_{}"), ("{}_images", "{}_labels"))
PARTS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}


def load_arrays(root: Path, split: str, test_size: float | None = None) -> ImageSet | None:
    """Load a split of the images in a NumPy file, in their own type. FILE.npy is mapped into memory.

    Args:
        root: A file with `images` and optional `labels`, or with the arrays of each split: `x_train`, `y_train`,
            `x_val`, `y_val`, `x_test`, `y_test`, or `train_images`, `train_labels`, ...
        split: "train", "validation" or "test".
        test_size: The images to hold out for testing if the file has no test images, a count or (below 1) a share.
            None holds out a tenth.

    Raises:
        UserError: If the file is invalid, or it has test images and `test_size` is given.
    """
    path = Path(root).expanduser()
    file = ArrayFile(path)
    for images, labels in LAYOUTS:
        if images.format("train") not in file.arrays:
            continue
        if test_size is not None:
            raise UserError(f"data.test_size={test_size} is invalid: expected null ({path} has its own test images)")
        part = next((part for part in PARTS[split] if images.format(part) in file.arrays), PARTS[split][0])
        if split == "validation" and images.format(part) not in file.arrays:
            return None
        pixels = file.read_pixels(images.format(part))
        keys, key = [labels.format(name) for names in PARTS.values() for name in names], labels.format(part)
        return ImageSet(pixels, *file.read_labels(key, len(pixels), keys), has_labels=key in file.arrays)
    if split == "validation":
        return None
    pixels = file.read_pixels()
    numbers, classes = file.read_labels("labels", len(pixels))
    test = hold_out_at_random(len(pixels), DEFAULT_HOLDOUT if test_size is None else test_size, "data.test_size")
    index = test.sort().values if split == "test" else exclude_indices(test, len(pixels))
    return ImageSet(LazySubset(pixels, index), numbers[index], classes, has_labels="labels" in file.arrays)
