"""What a setting may be, said in one sentence before anything is built or written; and the settings of the scripts."""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from betavae.errors import UserError


class Rule:
    """A test of a value and the words for what it should be."""

    def __init__(self, holds: Callable[[Any], bool], words: str, names: Iterable[str] = ()):
        self.holds, self.words, self.names = holds, words, list(names)


def integer(low: int, high: float = math.inf) -> Rule:
    words = f"a whole number from {low}" + ("" if high == math.inf else f" to {high:.0f}") + " up" * (high == math.inf)
    return Rule(lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high, words)


def number(low: float, high: float = math.inf, above: bool = False) -> Rule:
    words = f"a number above {low:g}" if above else f"a number from {low:g}" + " up" * (high == math.inf)
    words += "" if high == math.inf else f" to {high:g}"
    return Rule(
        lambda v: (
            isinstance(v, int | float)
            and not isinstance(v, bool)
            and math.isfinite(v)
            and low <= v <= high
            and not (above and v == low)
        ),
        words,
    )


def one_of(names: Iterable[str]) -> Rule:
    names = list(names)
    # The type too: True == 1.
    return Rule(
        lambda v: any(v == name and type(v) is type(name) for name in names),
        "one of " + ", ".join(map(str, names)),
        map(str, names),
    )


def list_of(rule: Rule) -> Rule:
    words = f"a list, each of it {rule.words}"
    return Rule(lambda v: isinstance(v, list) and bool(v) and all(rule.holds(item) for item in v), words)


def matches(pattern: str, words: str) -> Rule:
    return Rule(lambda v: isinstance(v, str) and re.fullmatch(pattern, v) is not None, words)


def either(*rules: Rule) -> Rule:
    return Rule(lambda v: any(rule.holds(v) for rule in rules), " or ".join(rule.words for rule in rules))


NULL = Rule(lambda v: v is None, "null")
FLAG = Rule(lambda v: isinstance(v, bool), "true or false")
TEXT = Rule(lambda v: isinstance(v, str) and bool(v), "a text")
PAIR = Rule(lambda v: isinstance(v, list) and len(v) == 2 and all(integer(0).holds(i) for i in v), "two whole numbers")
KEYS = Rule(
    lambda v: isinstance(v, list) and len(v) in (1, 2) and all(TEXT.holds(key) for key in v),
    "one or two names of settings, such as [model.latent_dim,beta]",
)
SCRIPT_RULES: dict[str, Rule] = {
    "ckpt": either(NULL, TEXT),
    "seed": integer(0, 2**63 - 1),
    "out": TEXT,
    "n": integer(1),
    "rounds": integer(1),
    "epochs": integer(1),
    "quality": FLAG,
    "only": either(NULL, one_of(["reference", "bare", "floor"])),
    "temperature": number(0),
    "columns": integer(1),
    "save_images": FLAG,
    "save_tensor": FLAG,
    "digits": PAIR,
    "images": either(NULL, PAIR),
    "steps": integer(2),
    "rows": integer(1),
    "image": either(NULL, integer(0)),
    "dimensions": either(NULL, integer(1)),
    "span": number(0, above=True),
    "size": integer(1),
    "folder": either(NULL, TEXT),
    "over": either(NULL, KEYS),
    "metric": TEXT,
    "jobs": integer(1),
    "settings": TEXT,
    "k": integer(1),
    "first": either(NULL, integer(2)),
    "memory_mb": integer(1),
    "matmul_precision": one_of(["highest", "high", "medium"]),
    "device": one_of(["auto", "cpu", "cuda", "mps"]),
    "probes": FLAG,
}


def check(cfg: DictConfig, rules: dict[str, Rule] = SCRIPT_RULES) -> None:
    """Raises UserError for the first setting that cannot be. Keys without a rule (a new objective's own) pass."""
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{missing[0]}=??? is no value")
    for key, rule in rules.items():
        value = OmegaConf.select(cfg, key, default=...)
        if value is ...:
            continue
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if not rule.holds(value):
            close = difflib.get_close_matches(str(value), rule.names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{key}={value} cannot be: it must be {rule.words}{hint}")


def check_arguments(group: str, function: Callable[..., Any], settings: dict[str, Any], *given: Any) -> None:
    """Raises UserError when `function(*given, **settings)` would lack a setting or have one too many."""
    try:
        inspect.signature(function).bind(*given, **settings)
    except TypeError as error:
        raise UserError(f"{group}: the settings {', '.join(settings)} do not fit ({error})") from error
