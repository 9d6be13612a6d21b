"""Schedules of beta: pure functions of the global step, so that resume needs no state.

To add a schedule, write a function `(step, total_steps, **settings) -> factor` and name it in `BETA_SCHEDULES`.
"""

import math
from collections.abc import Callable


def constant(step: int, total_steps: float) -> float:
    """Return 1."""
    return 1.0


def linear(step: int, total_steps: float, warmup: float) -> float:
    """Rise from 0 to 1 over the first `warmup` (a fraction of all steps), then stay (Bowman et al. 2016)."""
    warmup_steps = warmup * total_steps
    return step / warmup_steps if step < warmup_steps else 1.0


def cyclical(step: int, total_steps: float, cycles: int, ramp: float) -> float:
    """Rise from 0 to 1 at the start of each of `cycles` equal periods (Fu et al. 2019).

    The rise takes the fraction `ramp` of a period.
    """
    position = step * cycles / max(1, total_steps)
    return min(1.0, (position - math.floor(position)) / ramp) if position < cycles else 1.0


BETA_SCHEDULES: dict[str, Callable[..., float]] = {"constant": constant, "linear": linear, "cyclical": cyclical}
