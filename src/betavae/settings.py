"""What each setting may be, said in one sentence before anything is built or written."""

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from betavae.data import DATASETS
from betavae.errors import UserError
from betavae.likelihoods import LIKELIHOODS
from betavae.networks import ACTIVATIONS, NETWORKS
from betavae.objectives import BETA_SCHEDULES, LR_DECAYS, OBJECTIVES


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
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and low <= v <= high
        and not (above and v == low),
        words,
    )


def one_of(names: Iterable[str]) -> Rule:
    names = list(names)
    return Rule(lambda v: v in names, "one of " + ", ".join(names), names)


def either(*rules: Rule) -> Rule:
    return Rule(lambda v: any(rule.holds(v) for rule in rules), " or ".join(rule.words for rule in rules))


NULL = Rule(lambda v: v is None, "null")
FLAG = Rule(lambda v: isinstance(v, bool), "true or false")
TEXT = Rule(lambda v: isinstance(v, str) and bool(v), "a text")
WIDTHS = Rule(
    lambda v: isinstance(v, list) and bool(v) and all(integer(1).holds(width) for width in v),
    "a list of whole numbers from 1 up, such as [400] or [512,256]",
)
OPTIMIZERS = [
    name for name, cls in vars(torch.optim).items() if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    and name != "Optimizer"
]
BATCHES = either(number(0, 1), integer(1))

RULES: dict[str, Rule] = {
    "beta": number(0),
    "seed": integer(0, 2**32 - 1),
    "name": Rule(lambda v: isinstance(v, str | int | float), "a text"),
    "model.network": one_of(NETWORKS),
    "model.hidden_dims": WIDTHS,
    "model.latent_dim": integer(1),
    "model.activation": one_of(ACTIVATIONS),
    "model.likelihood": one_of(LIKELIHOODS),
    "data.name": one_of(DATASETS),
    "data.root": TEXT,
    "data.validation_size": integer(0),
    "data.batch_size": integer(1),
    "data.eval_batch_size": integer(1),
    "data.binarize": one_of(["none", "threshold", "dynamic"]),
    "objective.name": one_of(OBJECTIVES),
    "objective.k": integer(1),
    "objective.free_bits": number(0),
    "beta_schedule.name": one_of(BETA_SCHEDULES),
    "beta_schedule.warmup": number(0, 1),
    "beta_schedule.cycles": integer(1),
    "beta_schedule.ramp": number(0, 1, above=True),
    "optimizer.name": one_of(OPTIMIZERS),
    "optimizer.lr": number(0, above=True),
    "lr_schedule.name": one_of(LR_DECAYS),
    "lr_schedule.warmup": number(0, 1),
    "callbacks.figures_every": integer(0),
    "callbacks.early_stopping_patience": either(NULL, integer(0)),
    "trainer.max_epochs": integer(1),
    "trainer.max_steps": either(integer(1), Rule(lambda v: v == -1, "-1")),
    "trainer.matmul_precision": one_of(["highest", "high", "medium"]),
    "trainer.compile": either(FLAG, one_of(["default", "reduce-overhead", "max-autotune"])),
    "trainer.gradient_clip_val": either(NULL, number(0)),
    "trainer.gradient_clip_algorithm": one_of(["norm", "value"]),
    "trainer.accumulate_grad_batches": integer(1),
    "trainer.limit_train_batches": BATCHES,
    "trainer.limit_val_batches": BATCHES,
    "trainer.limit_test_batches": BATCHES,
    "trainer.log_every_n_steps": integer(1),
    "trainer.enable_progress_bar": FLAG,
    "trainer.detect_anomaly": FLAG,
}


def check(cfg: DictConfig) -> None:
    """Raises UserError for the first setting that cannot be. Keys without a rule (a new objective's own) pass."""
    for key, rule in RULES.items():
        value = OmegaConf.select(cfg, key, default=...)
        if value is ...:
            continue
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if not rule.holds(value):
            close = difflib.get_close_matches(str(value), rule.names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{key}={value} cannot be: it must be {rule.words}{hint}")
