"""Normal and Laplace pixels around the decoder's output. The shapes are those of `likelihoods`."""

import math

import torch
from torch import Tensor, nn

from betavae.models.precision import at_least_float32

IMAGE_DIMS = (-3, -2, -1)
MIN_LOG_SCALE = -6.0  # of a scale per value, e^-6 = 1/403: a constant value would have an infinite density


class Gaussian(nn.Module):
    """Normal pixels around the decoder's output (sigma-VAE, Rybkin et al. 2021).

    Args:
        scale: "shared" learns one standard deviation. With "per_value" the decoder has a second output for each pixel
            and channel, after all means: its log-scale, bounded below by `MIN_LOG_SCALE`.
    """

    params_per_channel = 1
    support = "real numbers"

    def __init__(self, scale: str = "shared") -> None:
        super().__init__()
        self.per_value = scale == "per_value"
        if self.per_value:
            self.params_per_channel = 2
        else:
            self.log_scale = nn.Parameter(torch.zeros(()))

    def split_params(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return the locations `(..., C, H, W)` and the log-scales.

        The log-scales have one value or the same shape.
        """
        params = at_least_float32(params)
        if not self.per_value:
            return params, at_least_float32(self.log_scale)
        location, raw = params.chunk(2, -3)
        # Smooth, so that a scale at the bound still has a gradient.
        return location, MIN_LOG_SCALE + nn.functional.softplus(raw - MIN_LOG_SCALE)

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        location, log_scale = self.split_params(params)
        squares = ((at_least_float32(x) - location) * torch.exp(-log_scale)) ** 2
        return (-0.5 * squares - log_scale - 0.5 * math.log(2 * math.pi)).sum(IMAGE_DIMS)

    def mean(self, params: Tensor) -> Tensor:
        return params.chunk(2, -3)[0] if self.per_value else params

    def params_from_mean(self, mean: Tensor) -> Tensor:
        """Return parameters of this mean, with a scale of about 1."""
        return torch.cat((mean, torch.zeros_like(mean)), -3) if self.per_value else mean

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        location, log_scale = self.split_params(params)
        noise = torch.randn(location.shape, generator=generator, device=params.device)
        return location + log_scale.exp() * noise

    def describe(self, binarize: str, values: str) -> str:
        return f"a log-density of {values}, which may be above 0: compare it with other densities only"

    def is_discrete(self, binarize: str) -> bool:
        return False


class Laplace(Gaussian):
    """Laplace pixels around the decoder's output, whose scale is the mean absolute difference.

    Outliers cost less than with a normal distribution.
    """

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        location, log_scale = self.split_params(params)
        distances = (at_least_float32(x) - location).abs() * torch.exp(-log_scale)
        return (-distances - log_scale - math.log(2)).sum(IMAGE_DIMS)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        location, log_scale = self.split_params(params)
        u = torch.rand(location.shape, generator=generator, device=params.device) - 0.5
        return location - log_scale.exp() * u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.5 - 1e-7))
