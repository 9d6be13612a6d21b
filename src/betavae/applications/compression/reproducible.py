"""Functions with the same values on every machine.

The functions of NumPy, torch and libm differ in the last bits. Each function here is a library function at fixed
points, rounded so coarsely that such a difference does not change the result. The tests compare the distance to the
nearest tie with that difference. Between these points it uses only arithmetic that IEEE 754 defines exactly: sums,
products, quotients and whole parts of doubles.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]

GRID = 2.0**-12  # Network outputs are rounded to multiples of it.
MAX_EXPONENT = 30.0
EXP_BITS = 20  # bits of the significand
STEP = 2.0**-8
CDF_UNIT = 2.0**-28
QUANTILE_UNIT = 2.0**-24


def exp(x: Floats) -> Floats:
    """Compute e^x to 20 bits for multiples of `GRID` / 2, clamped to [-30, 30]."""
    significand, exponent = np.frexp(np.exp(x.clip(-MAX_EXPONENT, MAX_EXPONENT)))
    return np.ldexp(np.rint(significand * 2**EXP_BITS), exponent - EXP_BITS)


def compute_normal_quantiles(n: int) -> Floats:
    """Compute the quantiles k / n of N(0, 1), `(n + 1,)`, from -inf to inf."""
    quantiles = torch.special.ndtri(torch.from_numpy(np.arange(n + 1) / n)).numpy()
    return np.rint(quantiles / QUANTILE_UNIT) * QUANTILE_UNIT


class DistributionFunction:
    """A distribution function, linear between multiples of `STEP`; 0 below -`end` and 1 above `end`."""

    def __init__(self, function: Callable[[Floats], Floats], end: int):
        self.end = end
        self.values = np.rint(function(np.arange(-end, end + STEP, STEP)) / CDF_UNIT) * CDF_UNIT
        self.increments = np.append(np.diff(self.values), 0)

    def __call__(self, x: Floats) -> Floats:
        position = x.clip(-self.end, self.end)
        position += self.end
        position /= STEP
        cell = position.astype(np.int64)
        position -= cell
        position *= self.increments[cell]
        position += self.values[cell]
        return position


NORMAL = DistributionFunction(lambda x: torch.special.ndtr(torch.from_numpy(x)).numpy(), 7)
LOGISTIC = DistributionFunction(lambda x: 1 / (1 + np.exp(-x)), 22)
