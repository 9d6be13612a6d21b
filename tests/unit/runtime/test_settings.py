"""Invalid settings are described in one line, from the types of their models."""

import functools
from typing import Annotated, Literal

import pytest
from pydantic import Field, NonNegativeFloat, PositiveInt, TypeAdapter

from betavae.errors import UserError
from betavae.runtime.settings import PathStr, RegisteredName, Settings, check_signature, describe, validate


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (PositiveInt, "an integer > 0"),
        (NonNegativeFloat | None, "a number >= 0 or null"),
        (Annotated[float, Field(gt=0, lt=1)], "a number > 0 and < 1"),
        (bool | Literal["warn"], "true or false or warn"),
        (PositiveInt | Literal["auto", -1], "an integer > 0 or one of auto, -1"),
        (PathStr, "a path"),
        (Annotated[list[int], Field(min_length=2, max_length=2)], "a list of 2 values (each an integer)"),
        (Annotated[list[int], Field(min_length=1, max_length=2)], "a list of 1 to 2 values (each an integer)"),
        (Annotated[list[int], Field(min_length=1, examples=[[3, 8]])], "a non-empty list (each an integer, such as"),
        (Annotated[str, RegisteredName("betavae.objectives.schedules", "BETA_SCHEDULES")], "one of constant, lin"),
    ],
)
def test_types_are_described_in_words(kind, words):
    assert describe(TypeAdapter(kind).json_schema()).startswith(words)


class Group(Settings):
    size: PositiveInt | None = 1
    mode: Literal["mean", "sample"] = "mean"


class Root(Settings):
    group: Group
    share: float = 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group": {"size": 0}}, "group.size=0 is invalid: expected an integer > 0 or null"),
        ({"group": {"size": True}}, "group.size=true is invalid: expected an integer > 0 or null"),
        ({"group": {"mode": "men"}}, "group.mode=men is invalid: expected one of mean, sample; did you mean mean?"),
        ({"group": {"siz": 1}}, "group.siz is not a setting; did you mean group.size?"),
        ({"group": 3}, "group=3 is invalid: expected a group of settings"),
        ({}, "group is missing"),
        ({"group": {}, "share": float("inf")}, "share=inf is invalid: expected a number"),
        ({"group": {}, "share": "0.5"}, "share=0.5 is invalid: expected a number"),
    ],
)
def test_an_invalid_setting_is_one_line(values, message):
    with pytest.raises(UserError) as caught:
        validate(Root, values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        (lambda x, y, rate: 0, {"rate": 1}, None),
        (lambda *args, **kwargs: 0, {"rate": 1}, None),
        (lambda x, y, **kwargs: 0, {"rate": 1}, None),
        (lambda x, *, rate=1: 0, {}, "does not take the arguments of its kind .too many positional"),
        (lambda x, y, rate, **kwargs: 0, {}, "g.rate is missing, which"),
        (lambda x, y, rate=1: 0, {"rat": 1}, "g.rat is not a setting of .*; did you mean rate?"),
        (lambda x, y: 0, {"rate": 1}, "g.rate is not a setting of .* remove it by ~g.rate"),
        (lambda x, y: 0, {"x": 1}, "g.x is not a setting of"),
        (functools.partial(lambda x, y, rate: 0, rate=1), {"deep": 1}, "g.deep is not a setting of"),
    ],
)
def test_settings_are_the_further_arguments_of_a_function(function, settings, message):
    if message is None:
        check_signature("g", function, settings, "x", "y")
        return
    with pytest.raises(UserError, match=message):
        check_signature("g", function, settings, "x", "y")
