"""p(x|z): decoder outputs ("params", any real numbers) -> log-probability, mean, sample.

`x` is `(B, C, H, W)` in [0, 1]; `params` is `(..., B, P * C, H, W)`: leading dimensions are posterior samples, P is how
many numbers the likelihood has per pixel and channel. To add a likelihood, write a class with these methods and name it
in `LIKELIHOODS`; what its constructor takes is a setting of the `model` group.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from betavae.models.logistic_mixture import LogisticMixture
from betavae.models.precision import at_least_float32

IMAGE_DIMS = (-3, -2, -1)


class Likelihood(nn.Module):
    """What all have in common; a density unless a class says otherwise."""

    params_per_channel = 1

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        """`(..., B)` in nats, summed over pixels and channels."""
        raise NotImplementedError

    def mean(self, params: Tensor) -> Tensor:
        """`(..., C, H, W)`, the expectation of x."""
        raise NotImplementedError

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`(..., C, H, W)`, drawn from p(x|z)."""
        raise NotImplementedError

    def describe(self, binarize: str) -> str:
        """What numbers under it are, for images binarised so (a setting of the data)."""
        return "a log-density of pixels in [0, 1], which may be above 0: compare it with other densities only"

    def is_discrete(self, binarize: str) -> bool:
        """Whether it is a probability of just what such images are, so that it has a number of bits."""
        return False


class Bernoulli(Likelihood):
    """Independent Bernoulli pixels, `params` are logits.

    On grey pixels this is the tutorial's cross-entropy surrogate, not a log-probability of the data.
    """

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        return -self.bce_with_logits(x, params)

    @staticmethod
    def bce_with_logits(x: Tensor, logits: Tensor) -> Tensor:
        """`(..., B)` in nats. `fast.accelerate` puts a quicker one in its place."""
        x = at_least_float32(x).expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits.to(x.dtype), x, reduction="none").sum(IMAGE_DIMS)

    def mean(self, params: Tensor) -> Tensor:
        return torch.sigmoid(params)

    def params_from_mean(self, mean: Tensor) -> Tensor:
        """The logits of about this mean, none beyond ±7."""
        return torch.logit(mean, eps=1e-3)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(torch.sigmoid(params), generator=generator)

    def describe(self, binarize: str) -> str:
        if not self.is_discrete(binarize):
            return "a Bernoulli likelihood of pixels that are not binary: the tutorial's surrogate, no log-likelihood"
        return "a log-likelihood of binarised images: compare it with others on images binarised the same way only"

    def is_discrete(self, binarize: str) -> bool:
        return binarize != "none"


class ContinuousBernoulli(Bernoulli):
    """The Bernoulli's shape made a density on [0, 1] (Loaiza-Ganem & Cunningham 2019), `params` are logits.

    With l the logit its normaliser is C = l / tanh(l / 2), which is even, smooth, and 2 at l = 0.
    """

    meaning, exact = Likelihood.describe, Likelihood.is_discrete

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        params = at_least_float32(params)
        size = params.abs()
        small = size < 0.05
        safe = torch.where(small, 1.0, size)
        # log(l / tanh(l/2)), by its series near 0, where the quotient is 0/0.
        log_c = torch.where(
            small,
            math.log(2) + params**2 / 12 - params**4 * (7 / 1440),
            safe.log() + torch.log1p(torch.exp(-safe)) - torch.log(-torch.expm1(-safe)),
        )
        return super().log_prob(x, params) + log_c.sum(IMAGE_DIMS)

    def mean(self, params: Tensor) -> Tensor:
        small = params.abs() < 0.05
        safe = torch.where(small, 1.0, params)
        # 1 / (1 - e^-l) - 1 / l
        return torch.where(small, 0.5 + params / 12, 0.5 + 0.5 / torch.tanh(safe / 2) - 1 / safe)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        u = torch.rand(params.shape, generator=generator, device=params.device)
        size = params.abs().clamp(min=1e-3)
        # Inverse of the distribution function, written for l < 0 (no overflow) and mirrored for l > 0.
        x = -torch.log1p(u * torch.expm1(-size)) / size
        return torch.where(params > 0, 1 - x, x).clamp(0, 1)


class Gaussian(Likelihood):
    """Normal pixels around the decoder's output with one learned scale (sigma-VAE, Rybkin et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        log_scale = at_least_float32(self.log_scale)
        squares = ((at_least_float32(x) - at_least_float32(params)) * torch.exp(-log_scale)) ** 2
        return (-0.5 * squares - log_scale - 0.5 * math.log(2 * math.pi)).sum(IMAGE_DIMS)

    def mean(self, params: Tensor) -> Tensor:
        return params

    params_of = mean  # the mean is the parameter

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(params.shape, generator=generator, device=params.device)
        return params + self.log_scale.exp() * noise


LIKELIHOODS: dict[str, type[nn.Module]] = {
    "bernoulli": Bernoulli,
    "continuous_bernoulli": ContinuousBernoulli,
    "gaussian": Gaussian,
    "logistic_mixture": LogisticMixture,
}
