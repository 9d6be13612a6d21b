"""p(x|z): log-probability, mean and samples from the decoder's outputs ("params", any real numbers).

`x` is `(B, C, H, W)`; `params` is `(..., B, P * C, H, W)`: leading dimensions are posterior samples, P is the number of
parameters per pixel and channel. To add a likelihood, write a class with these methods and name it in
`LIKELIHOODS`; the arguments of its constructor are settings of the `model` group.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from betavae.models.location_scale import Gaussian, Laplace
from betavae.models.logistic_mixture import LogisticMixture
from betavae.models.precision import at_least_float32

IMAGE_DIMS = (-3, -2, -1)


class Likelihood(nn.Module):
    """Base class of the likelihoods; a density unless a subclass says otherwise."""

    params_per_channel = 1
    support = "real numbers"  # or "[0, 1]", or "bytes / 255": the x that it is made for

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        """Return log p(x|z) `(..., B)` in nats, summed over pixels and channels."""
        raise NotImplementedError

    def mean(self, params: Tensor) -> Tensor:
        """Return the expectation of x, `(..., C, H, W)`."""
        raise NotImplementedError

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw x from p(x|z), `(..., C, H, W)`."""
        raise NotImplementedError

    def describe(self, binarize: str, values: str) -> str:
        """Describe the meaning of its numbers for images with this `data.binarize`.

        `values` names the scaled values, such as "pixels in [0, 1]".
        """
        return f"a log-density of {values}, which may be above 0: compare it with other densities only"

    def is_discrete(self, binarize: str) -> bool:
        """Return whether it is a probability of exactly such images, so that it has a number of bits."""
        return False


class Bernoulli(Likelihood):
    """Independent Bernoulli pixels; `params` are logits.

    On gray pixels this is the tutorial's cross-entropy surrogate, not a log-probability of the data.
    """

    support = "[0, 1]"

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        return -bce_with_logits(x, params)

    def mean(self, params: Tensor) -> Tensor:
        return torch.sigmoid(params)

    def params_from_mean(self, mean: Tensor) -> Tensor:
        """Return the logits of this mean, clipped to about ±7."""
        return torch.logit(mean, eps=1e-3)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(torch.sigmoid(params), generator=generator)

    def describe(self, binarize: str, values: str) -> str:
        if not self.is_discrete(binarize):
            return "a Bernoulli likelihood of pixels that are not binary: the tutorial's surrogate, no log-likelihood"
        return "a log-likelihood of binarized images: compare it with others on images binarized the same way only"

    def is_discrete(self, binarize: str) -> bool:
        return binarize != "none"


class BCEWithLogits(torch.autograd.Function):
    """Binary cross-entropy of one image, exact at any logit l.

    It is the sum over the pixels of log(1 + e^l) - x l. Its gradient is sigmoid(l) - x.
    `F.binary_cross_entropy_with_logits` computes the same, but its log1p is not vectorized on AVX-512 machines: an
    epoch on a CPU takes 9 % longer, with trainer=fast 15 % (torch 2.14). Here
    log(1 + e^l) = relu(l) - log(sigmoid(|l|)). These sigmoids are at least 1/2, so a product of up to a hundred of them
    does not underflow in float32, and one logarithm serves them all.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor) -> Tensor:
        x = at_least_float32(x)
        wide = logits.to(x.dtype)
        ctx.save_for_backward(x, wide)
        ctx.dtype = logits.dtype
        return sum_bce(x, wide)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        x, logits = ctx.saved_tensors
        return None, (torch.sigmoid(logits) - x).mul_(grad[..., None, None, None]).to(ctx.dtype)


def sum_bce(x: Tensor, logits: Tensor) -> Tensor:
    """Compute the formula of `BCEWithLogits` for tensors of one dtype."""
    factors = logits.abs().sigmoid_().flatten(-3)
    at_once = next(n for n in range(100, 0, -1) if factors.shape[-1] % n == 0)
    logs = factors.unflatten(-1, (-1, at_once)).prod(-1).log_().sum(-1)
    return logits.relu().addcmul_(x, logits, value=-1).sum(IMAGE_DIMS) - logs


def bce_with_logits(x: Tensor, logits: Tensor) -> Tensor:
    """Return the binary cross-entropy `(..., B)` in nats, summed over pixels and channels.

    Args:
        x: Images `(B, C, H, W)` in [0, 1].
        logits: `(..., B, C, H, W)`.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        return BCEWithLogits.apply(x, logits)
    # The same formula; torch.jit.trace is unable to save a custom autograd function.
    x = at_least_float32(x)
    return sum_bce(x, logits.to(x.dtype))


class ContinuousBernoulli(Bernoulli):
    """Bernoulli normalized to a density on [0, 1] (Loaiza-Ganem & Cunningham 2019).

    `params` are logits. For a logit l the normalizer is C = l / tanh(l / 2), which is even, smooth, and 2 at l = 0.
    """

    describe, is_discrete = Likelihood.describe, Likelihood.is_discrete

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

    def params_from_mean(self, mean: Tensor) -> Tensor:
        """Return the logits of this mean, clipped to ±20, by bisection."""
        low, high = torch.full_like(mean, -20), torch.full_like(mean, 20)
        for _ in range(30):
            middle = (low + high) / 2
            is_below = self.mean(middle) < mean
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return high

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        u = torch.rand(params.shape, generator=generator, device=params.device)
        size = params.abs().clamp(min=1e-3)
        # The inverse of the distribution function, written for l < 0 (no overflow) and mirrored for l > 0.
        x = -torch.log1p(u * torch.expm1(-size)) / size
        return torch.where(params > 0, 1 - x, x).clamp(0, 1)


LIKELIHOODS: dict[str, type[nn.Module]] = {
    "bernoulli": Bernoulli,
    "continuous_bernoulli": ContinuousBernoulli,
    "gaussian": Gaussian,
    "laplace": Laplace,
    "logistic_mixture": LogisticMixture,
}
