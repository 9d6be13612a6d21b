"""p(x|z): decoder outputs ("params", any real numbers) -> log-probability, mean, sample.

`x` is `(B, C, H, W)` in [0, 1]; `params` is `(..., B, C, H, W)`: leading dimensions are posterior samples.
To add a likelihood, write a class with these three methods and name it in `LIKELIHOODS`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

IMAGE_DIMS = (-3, -2, -1)


class BernoulliLogProb(torch.autograd.Function):
    """The sum over an image's pixels of x l - log(1 + e^l), with its gradient x - sigmoid(l): exact at any logit l.

    `F.binary_cross_entropy_with_logits` says the same; but log1p is not vectorised on AVX-512 machines, where it takes
    a sixth of a training step. log(1 + e^l) is relu(l) - log(sigmoid(|l|)), and these sigmoids are at least 1/2: up to
    a hundred of them are safely multiplied, each at an eighth of a log's price, before one log is taken.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor) -> Tensor:
        logits = logits.to(x.dtype)
        ctx.save_for_backward(x, logits)
        factors = logits.abs().sigmoid_().flatten(-3)
        together = next(n for n in range(100, 0, -1) if factors.shape[-1] % n == 0)
        logs = factors.unflatten(-1, (-1, together)).prod(-1).log_().sum(-1)
        return logs - logits.relu().addcmul_(x, logits, value=-1).sum(IMAGE_DIMS)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        x, logits = ctx.saved_tensors
        return None, (x - torch.sigmoid(logits)).mul_(grad[..., None, None, None])


class Bernoulli(nn.Module):
    """Independent Bernoulli pixels, `params` are logits.

    On grey pixels this is the tutorial's cross-entropy surrogate, not a log-probability of the data.
    """

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        """`(..., B)` in nats, summed over pixels."""
        return BernoulliLogProb.apply(x, params)

    def mean(self, params: Tensor) -> Tensor:
        return torch.sigmoid(params)

    def params_of(self, mean: Tensor) -> Tensor:
        """The logits of about this mean, none beyond ±7."""
        return torch.logit(mean, eps=1e-3)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(torch.sigmoid(params), generator=generator)


class ContinuousBernoulli(Bernoulli):
    """The Bernoulli's shape made a density on [0, 1] (Loaiza-Ganem & Cunningham 2019), `params` are logits.

    With l the logit its normaliser is C = l / tanh(l / 2), which is even, smooth, and 2 at l = 0.
    """

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        """`(..., B)`, log-density in nats, summed over pixels."""
        size = params.abs()
        small = size < 0.05
        safe = torch.where(small, 1.0, size)
        # log(l / tanh(l/2)), by its series near 0, where the quotient is 0/0.
        log_c = torch.where(
            small,
            math.log(2) + params**2 / 12 - params**4 * (7 / 1440),
            safe.log() + torch.log1p(torch.exp(-safe)) - torch.log(-torch.expm1(-safe)),
        )
        return BernoulliLogProb.apply(x, params) + log_c.sum(IMAGE_DIMS)

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


class Gaussian(nn.Module):
    """Normal pixels around the decoder's output with one learned scale (sigma-VAE, Rybkin et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        """`(..., B)`, log-density in nats, summed over pixels; can be above 0."""
        squares = ((x - params) * torch.exp(-self.log_scale)) ** 2
        return (-0.5 * squares - self.log_scale - 0.5 * math.log(2 * math.pi)).sum(IMAGE_DIMS)

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
}


def meaning(likelihood: str, binarize: str) -> tuple[str, bool]:
    """What numbers under this likelihood, of images binarised so, are in plain words; and whether a surrogate."""
    if likelihood == "bernoulli" and binarize == "none":
        return "grey pixels under a Bernoulli likelihood: the tutorial's surrogate, not a log-likelihood", True
    if likelihood == "bernoulli":
        return (
            "a log-likelihood of binarised images: compare it with others on images binarised the same way only",
            False,
        )
    return "a log-density of pixels in [0, 1], which may be above 0: compare it with other densities only", False
