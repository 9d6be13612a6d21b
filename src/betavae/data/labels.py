"""Match labels to the classes of a conditional model."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from betavae.errors import UserError

MAX_COLUMNS = 20  # classes side by side in a figure


def find_class(label: object, classes: Sequence[str], key: str = "label") -> int:
    """Find the number of a class by its name, or by the number itself if no name is a number.

    Raises:
        UserError: If there is no such class, or more than one.
    """
    number = find_name(label, classes)
    if number is None and type(label) is int and all(parse_number(name) is None for name in classes):
        number = label if 0 <= label < len(classes) else None
    if number is None:
        raise UserError(f"{key}={label} is invalid: expected {describe_classes(classes)}")
    return number


def find_name(label: object, classes: Sequence[str]) -> int | None:
    """Find the number of the class of this name, or else of the only one that `has_same_value`."""
    if str(label) in classes:
        return classes.index(str(label))
    found = [number for number, name in enumerate(classes) if has_same_value(name, label)]
    return found[0] if len(found) == 1 else None


def has_same_value(name: str, label: object) -> bool:
    """Return whether a number, true or false is the value that a class is named by, as 1 is that of "1.0"."""
    if str(label).lower() in ("true", "false"):
        return name.lower() == str(label).lower()
    return isinstance(label, int | float) and parse_number(name) == label


def parse_number(text: str) -> int | float | None:
    """Return the finite number that a text is, or None. An integer is exact."""
    if "_" in text:  # Python reads 1_000 as 1000
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def describe_classes(classes: Sequence[str]) -> str:
    """Name the classes of a model, the first twenty of many."""
    return f"one of {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}"


def match_labels(classes: Sequence[str], n: int, label: object, labels: Sequence[object] | None, where: str) -> Tensor:
    """Match the labels of images or latents to the classes of a model.

    Args:
        classes: The classes of the model; none if it is not conditional.
        n: The number of images.
        label: A class for all of them, instead of their own labels.
        labels: Their own labels: names of classes, or numbers of the same value. A number is no index, since a file
            does not know the order of the classes.
        where: The images, for messages.

    Returns:
        Class numbers, (N,); zeros for a model that is not conditional, which ignores them.

    Raises:
        UserError: If labels are missing, or are no classes of the model.
    """
    if not classes:
        if label is not None:
            raise UserError(f"label={label} is invalid: expected null, since the model is not conditional")
        return torch.zeros(n, dtype=torch.long)
    if label is not None:
        return torch.full((n,), find_class(label, classes))
    if labels is None:
        raise UserError(
            f"{where} has no labels, which a conditional model needs: pass label={describe_classes(classes)}"
        )
    numbers = {value: find_name(value, classes) for value in dict.fromkeys(map(as_key, labels))}
    if "" in numbers and "" not in classes:
        raise UserError(f"{where} has no label for number {list(labels).index('')}, from 0; add it, or pass label=")
    for value, number in numbers.items():
        if number is None:
            names = "" if isinstance(value, str) else ", the names of the classes"
            raise UserError(f"{where}: label={value} is invalid: expected {describe_classes(classes)}{names}")
    return torch.tensor([numbers[as_key(label)] for label in labels])


def as_key(label: object) -> object:
    """Return a label as a dictionary key; several factors of an image, which are a list, as a text."""
    return label if isinstance(label, int | float) else str(label)


def name_labels(classes: Sequence[str], numbers: Iterable[int]) -> list[Any]:
    """Return the names of class numbers, as integers if all classes are named by integers."""
    convert = int if are_integers(classes) else str
    return [convert(classes[number]) for number in numbers]


def are_integers(names: Iterable[str]) -> bool:
    """Return whether all names are integers of 64 bits in their usual spelling, which 007 is not."""
    return all(re.fullmatch("0|-?[1-9][0-9]{,17}", name) for name in names)


def cycle_labels(classes: Sequence[str], n: int) -> Tensor:
    """Return class numbers (N,) that cycle through the classes: in a grid, a column per class."""
    return torch.arange(n) % max(1, len(classes))


def count_columns(classes: Sequence[str], default: int) -> int:
    """Return the columns of a grid of samples with cycled labels: `default`, or a column per class."""
    return min(len(classes), MAX_COLUMNS) or default
