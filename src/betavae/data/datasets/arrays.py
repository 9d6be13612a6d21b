"""Images in a NumPy file, FILE.npy or FILE.npz."""

from pathlib import Path

from betavae.data.array_io import ArrayFile
from betavae.data.holdout import DEFAULT_HOLDOUT, exclude_indices, hold_out_at_random
from betavae.data.image_set import ImageSet, LazySubset
from betavae.errors import UserError


def load_arrays(root: Path, split: str, test_size: float | None = None) -> ImageSet | None:
    """Load a split of the uint8 images in a NumPy file. FILE.npy is mapped into memory.

    Args:
        root: A file with `images` and optional `labels`, or with the arrays of a Keras data set: `x_train`, `y_train`,
            `x_test`, `y_test`.
        split: "train" or "test"; there are no "validation" images.
        test_size: The images to hold out for testing if the file has no test images, a count or (below 1) a share.
            None holds out a tenth.

    Raises:
        UserError: If the file is invalid, or it has test images and `test_size` is given.
    """
    path = Path(root).expanduser()
    file = ArrayFile(path)
    if split == "validation":
        return None
    if "x_train" in file.arrays:
        if test_size is not None:
            raise UserError(f"data.test_size={test_size} is invalid: expected null ({path} has its own test images)")
        pixels = file.read_pixels(f"x_{split}")
        return ImageSet(pixels, file.read_labels(f"y_{split}", len(pixels)))
    pixels = file.read_pixels()
    labels = file.read_labels("labels", len(pixels))
    test = hold_out_at_random(len(pixels), DEFAULT_HOLDOUT if test_size is None else test_size, "data.test_size")
    index = test.sort().values if split == "test" else exclude_indices(test, len(pixels))
    return ImageSet(LazySubset(pixels, index), labels[index])
