"""Rows of numbers in FILE.csv, FILE.parquet or FILE.npy.

A row is an image with a channel for each column.
"""

import csv
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from betavae.data.array_io import ArrayFile, number_labels
from betavae.data.holdout import DEFAULT_HOLDOUT, exclude_indices, hold_out_at_random
from betavae.data.image_set import ImageSet
from betavae.data.labels import are_integers, parse_number
from betavae.data.scaling import FULL_SCALE
from betavae.errors import UserError, first_line
from betavae.storage.files import STAMP_COLUMN

WHOLE = re.compile(r"([+-]?(?:0|[1-9][0-9]{0,17}))(?:\.0*)?")
BOOLEANS = {"True": 1, "False": 0}  # as pandas writes them
Name = str | int  # of a column; columns without a header are numbered from 0


class MissingColumnError(UserError):
    """A table has no column of the requested name."""


class Table(NamedTuple):
    """The columns of a table that are numbers, and the one that is the label."""

    values: Tensor  # (N, C, 1, 1)
    columns: list[str]
    labels: np.ndarray | None  # (N,)


def load_table(
    root: Path,
    split: str,
    label: Name | None = None,
    columns: Sequence[Name] | None = None,
    test_size: float | None = None,
) -> ImageSet | None:
    """Load a split of the rows of a table, (N, C, 1, 1) for C columns.

    Args:
        root: FILE.csv, FILE.parquet or FILE.npy.
        split: "train" or "test"; there are no "validation" rows.
        label: The column of labels, numbers or text.
        columns: The columns to model. None takes all except the label.
        test_size: The rows to hold out for testing, a count or (below 1) a share. None holds out a tenth.

    Raises:
        UserError: If the file is invalid, has no such column, or a column has text or missing values.
    """
    if split == "validation":
        return None
    table = read_table(Path(root).expanduser(), columns, label)
    n = len(table.values)
    numbers, classes = torch.zeros(n, dtype=torch.int64), None
    if table.labels is not None:
        if len(missing := np.flatnonzero(table.labels == "")):
            raise UserError(
                f"{root}: column {label}, the label, has no value in row {missing[0]}; fill it in, remove such "
                "rows, or pass another data.label"
            )
        numbers, classes = number_labels(table.labels, table.labels)
    test = hold_out_at_random(n, DEFAULT_HOLDOUT if test_size is None else test_size, "data.test_size")
    index = test.sort().values if split == "test" else exclude_indices(test, n)
    has_labels = table.labels is not None
    return ImageSet(table.values, numbers, classes, columns=table.columns, has_labels=has_labels).select(index)


def read_table(path: Path, columns: Sequence[Name] | None = None, label: Name | None = None) -> Table:
    """Read all rows of a table; the arguments are those of `load_table`."""
    readers = {".csv": read_csv, ".parquet": read_parquet, ".npy": read_array}
    if path.suffix not in readers:
        raise UserError(f"{path} is not a table: expected FILE.csv, FILE.parquet or FILE.npy")
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    found = readers[path.suffix](path)
    wanted = [str(name) for name in (found if columns is None else columns) if label is None or str(name) != str(label)]
    if columns is None and "" in wanted:
        raise UserError(
            f"{path}: column {list(found).index('') + 1} has no name, as a column of row numbers; name it, remove it, "
            "or name the columns to model in data.columns"
        )
    for name in wanted if label is None else [*wanted, str(label)]:
        if name not in found:
            raise MissingColumnError(f"{path} has no column {name} (it has {', '.join(list(found)[:20])})")
        if wanted.count(name) > 1:
            raise UserError(f"data.columns has {name} twice; name each column once")
    if not wanted or not len(found[wanted[0]]):
        raise UserError(f"{path} has no {'rows' if wanted else 'columns of numbers'}")
    values = torch.from_numpy(np.stack([to_numbers(path, name, found[name]) for name in wanted], 1))
    labels = None if label is None else to_labels(found[str(label)])
    return Table(values[:, :, None, None], wanted, labels)


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """Read the columns of a CSV file, as text, with commas, semicolons or tabs between them.

    A first row of numbers is no header, except 0, 1, 2, ..., which is that of an array without names.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = re.sub('"[^"]*"', "", file.readline())  # quoted names may have commas
            file.seek(0)
            rows = [row for row in csv.reader(file, delimiter=max(",;\t", key=first.count)) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if not rows:
        raise UserError(f"{path} is empty")
    header = [name.strip() for name in rows[0]]
    numbered = [str(number) for number in range(len(header))]
    if all(map(is_number, header)) and (header != numbered or len(header) < 3):
        header = numbered
    else:
        rows = rows[1:]
    texts = [number for number, name in enumerate(header) if not is_number(name)]
    for number in texts if len(texts) < len(header) else ():
        # A label, beside numbers, that is also the label of a row.
        below = (row[number].strip() for row in rows[:1000] if number < len(row))
        if header[number] in below:
            raise UserError(f"{path} has no header: add a first row with the names of its {len(header)} columns")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"{path} has several columns named {twice!r}; rename them")
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise UserError(f"{path}: row {number} has {len(row)} values: expected {len(header)}, one for each column")
    # Python's texts, since NumPy's have the length of the longest one of the whole table.
    columns = dict(zip(header, np.array(rows, dtype=object).reshape(-1, len(header)).T, strict=True))
    columns.pop(STAMP_COLUMN, None)
    return columns


def read_parquet(path: Path) -> dict[str, np.ndarray]:
    """Read the columns of a Parquet file."""
    if find_spec("pyarrow") is None:
        raise UserError(f'{path} needs pyarrow: pip install -e ".[parquet]"; or save it as FILE.csv')
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except Exception as error:  # pyarrow has an error of its own for each kind of damage
        raise UserError(f"{path} is not an intact Parquet file: {first_line(error)}") from error
    # The row numbers of a pandas index without a name, which a CSV file has in a column without a name.
    names = [re.sub(r"__index_level_\d+__", "", name) for name in table.column_names]
    return {name: column.to_numpy() for name, column in zip(names, table.columns, strict=True)}


def read_array(path: Path) -> dict[str, np.ndarray]:
    """Map the columns of a FILE.npy (N, C), which are numbered."""
    array = ArrayFile(path).read("images")
    if array.ndim != 2 or array.dtype.kind not in "biuf" or not array.dtype.isnative:
        raise UserError(f"{path} is {array.dtype} {tuple(array.shape)}: expected numbers (N, C), a row for each of N")
    return {str(number): array[:, number] for number in range(array.shape[1])}


def is_number(text: object) -> bool:
    """Return whether a text is a finite number."""
    return parse_number(str(text)) is not None


def to_numbers(path: Path, name: str, column: np.ndarray) -> np.ndarray:
    """Convert a column to numbers of a type in `FULL_SCALE`; raise UserError for the first other value."""
    if column.dtype.kind in "mM":  # times, which NumPy would convert to any unit
        column = column.astype(str)
    if column.dtype.kind in "biuf":
        numbers = column if column.dtype.name in FULL_SCALE else column.astype(np.float64)
    else:
        try:
            numbers = column.astype(np.float64)
            if any("_" in str(value) for value in column):
                raise ValueError
        except (ValueError, TypeError):
            values = (BOOLEANS.get(str(value), value) for value in column)
            numbers = np.array([float(str(value)) if is_number(value) else np.nan for value in values])
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if not len(wrong):
        return numbers
    value, row = str(column[wrong[0]]).strip(), wrong[0]
    more = f", and in {len(wrong) - 1:,} more rows" if len(wrong) > 1 else ""
    if value.lower() in ("", "none", "nan", "na", "n/a", "null", "<na>"):
        raise UserError(
            f"{path}: column {name} has no value in row {row}{more}; fill in these values, remove the rows, or leave "
            "the column out of data.columns"
        )
    raise UserError(
        f"{path}: column {name} has {value!r} in row {row}{more}: expected numbers; leave the column out of "
        f"data.columns, or name it as the label by data.label={name}"
    )


def to_labels(column: np.ndarray) -> np.ndarray:
    """Convert a column of labels to integers if it has no other values, else to text.

    The text of a value does not depend on the others: 1 and 1.0 are "1", true and TRUE are "True", and a missing value
    is "". Other numbers, such as 007 and 2.50, stay as they are.
    """
    texts = ["" if value is None or value != value else str(value).strip() for value in column.tolist()]
    names = {text: name_label(text) for text in set(texts)}
    labels = [names[text] for text in texts]
    return np.array([int(label) for label in labels] if are_integers(names.values()) else labels)


def name_label(text: str) -> str:
    """Return the only spelling of a label of `to_labels`."""
    if text.lower() in ("true", "false"):
        return text.capitalize()
    if text.lower() == "nan":
        return ""
    whole = WHOLE.fullmatch(text)
    return str(int(whole[1])) if whole else text
