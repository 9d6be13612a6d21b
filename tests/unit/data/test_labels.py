import pytest
import torch

from betavae.data.labels import cycle_labels, find_class, match_labels, name_labels
from betavae.errors import UserError

DIGITS, PETS = [str(digit) for digit in range(10)], ["cat", "dog", "fox"]


@pytest.mark.parametrize(
    ("classes", "labels", "numbers"),
    [
        (PETS, ["fox", "cat", "fox"], [2, 0, 2]),
        (DIGITS, ["7", "0", "7"], [7, 0, 7]),
        (DIGITS, [7, 0, 7], [7, 0, 7]),
        (["3", "8"], [8, 3, 8], [1, 0, 1]),
        (["1.0", "2.0", "2.5"], [1, 2, 2.5], [0, 1, 2]),
        (["01", "02"], [1, 2, "01"], [0, 1, 0]),
        (["False", "True"], ["TRUE", "false", "True"], [1, 0, 1]),  # as a spreadsheet writes them
        (["9007199254740993", "9007199254740992"], [2**53 + 1, 2**53, 2**53], [0, 1, 1]),  # equal as floats
        (["-2", "-1"], [-1, -2, -1], [1, 0, 1]),
        (["false", "True"], [True, False, True], [1, 0, 1]),  # label=True is read as a truth value
        (["1e5", "nan"], [100000.0, "nan", 1e5], [0, 1, 0]),
    ],
)
def test_labels_are_matched_by_name_then_by_value(classes, labels, numbers):
    assert match_labels(classes, 3, None, labels, "x").tolist() == numbers
    assert match_labels(classes, 3, labels[0], None, "x").tolist() == [numbers[0]] * 3


@pytest.mark.parametrize(
    ("classes", "label", "labels", "message"),
    [
        (PETS, None, None, "x has no labels, which a conditional model needs: pass label=one of cat, dog, fox"),
        (PETS, None, ["cat", "cow"], "x: label=cow is invalid: expected one of cat, dog, fox"),
        (PETS, None, [0, 1], "x: label=0 is invalid: expected one of cat, dog, fox, the names of the classes"),
        (["1.2", "1.10"], None, ["1.1", "1.2"], "x: label=1.1 is invalid: expected one of 1.2, 1.10"),  # folders
        (["9007199254740993", "5"], 2**53, None, "label=9007199254740992 is invalid"),
        (PETS, 3, None, "label=3 is invalid: expected one of cat, dog, fox"),
        (PETS, None, ["cat", "1"], "x: label=1 is invalid"),  # a folder's name is no number
        (PETS, -1, None, "label=-1 is invalid"),
        (PETS, None, [[0, 1], [1, 0]], r"x: label=\[0, 1\] is invalid"),
        (["3", "8"], 0, None, "label=0 is invalid: expected one of 3, 8"),  # or else 1 could mean two classes
        (["1.5", "2.5"], 1, None, "label=1 is invalid: expected one of 1.5, 2.5"),
        (["01", "1.0"], 1, None, "label=1 is invalid: expected one of 01, 1.0"),
        (PETS, True, None, "label=True is invalid: expected one of cat, dog, fox"),
        ([], "cat", ["cat", "cat"], "label=cat is invalid: expected null, since the model is not conditional"),
    ],
)
def test_missing_and_unknown_labels_are_rejected(classes, label, labels, message):
    with pytest.raises(UserError, match=message):
        match_labels(classes, 2, label, labels, "x")


def test_a_label_of_a_command_may_be_an_index():
    assert [find_class(label, PETS) for label in (2, "dog", 0)] == [2, 1, 0]


def test_classes_named_by_integers_are_integers():
    assert name_labels(DIGITS, [7, 0]) == [7, 0] and name_labels(["-2", "10"], [1, 0]) == [10, -2]
    assert name_labels(PETS, [2, 0]) == ["fox", "cat"] and name_labels(["1", "02"], [0, 1]) == ["1", "02"]
    assert name_labels(["1", "9" * 20], [0, 1]) == ["1", "9" * 20]  # beyond 64 bits


def test_labels_cycle_through_the_classes_and_are_zero_without():
    assert cycle_labels(PETS, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(cycle_labels([], 4), torch.zeros(4, dtype=torch.long))
    assert torch.equal(match_labels([], 4, None, ["a"] * 4, "x"), torch.zeros(4, dtype=torch.long))
