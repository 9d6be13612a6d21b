"""Residual convolutional encoder and decoder for pictures of any size (He et al. 2016, with their pre-activation)."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from betavae.activations import ACTIVATIONS

MIN_SIDE = 7  # pixels: resolution is halved until the shorter side has no more


def norm_act(channels: int, activation: str) -> list[nn.Module]:
    """Group norm (Wu & He 2018), in at most 8 groups, and the activation."""
    return [nn.GroupNorm(math.gcd(8, channels), channels), ACTIVATIONS[activation]()]


class ResidualBlock(nn.Module):
    """x + f(x), f of two 3 x 3 convolutions; at first f(x) = 0."""

    def __init__(self, channels: int, activation: str):
        super().__init__()
        last = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.f = nn.Sequential(
            *norm_act(channels, activation),
            nn.Conv2d(channels, channels, 3, padding=1),
            *norm_act(channels, activation),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def stage_shapes(image_shape: Sequence[int], hidden_dims: Sequence[int]) -> list[tuple[int, int, int]]:
    """`(channels, H, W)` of each stage, half the size of the one before, until the shorter side has 4 to 7 pixels.

    The last of `hidden_dims` is repeated as often as it takes; what is left of them is not used.
    """
    height, width = image_shape[1:]
    shapes: list[tuple[int, int, int]] = []
    while min(height, width) > MIN_SIDE or not shapes:
        height, width = (height + 1) // 2, (width + 1) // 2
        shapes.append((hidden_dims[min(len(shapes), len(hidden_dims) - 1)], height, width))
    return shapes


class ResNetEncoder(nn.Sequential):
    """`(B, *image_shape) -> (B, 2 * latent_dim)`; `hidden_dims` are the channels of each halving of resolution."""

    def __init__(
        self, image_shape: Sequence[int], hidden_dims: Sequence[int], latent_dim: int, activation: str, blocks: int = 1
    ):
        layers: list[nn.Module] = []
        channels = image_shape[0]
        for out_channels, _, _ in (shapes := stage_shapes(image_shape, hidden_dims)):
            layers += [nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)]
            layers += [ResidualBlock(out_channels, activation) for _ in range(blocks)]
            channels = out_channels
        head = nn.Linear(math.prod(shapes[-1]), 2 * latent_dim)
        super().__init__(*layers, *norm_act(channels, activation), nn.Flatten(), head)


class ResNetDecoder(nn.Sequential):
    """`(B, latent_dim) -> (B, *params_shape)`, `ResNetEncoder` mirrored with transposed convolutions."""

    def __init__(
        self, params_shape: Sequence[int], hidden_dims: Sequence[int], latent_dim: int, activation: str, blocks: int = 1
    ):
        shapes = [tuple(params_shape), *stage_shapes(params_shape, hidden_dims)]
        layers: list[nn.Module] = [nn.Linear(latent_dim, math.prod(shapes[-1])), nn.Unflatten(1, shapes[-1])]
        for (channels, _, _), (out_channels, height, width) in zip(shapes[:0:-1], shapes[-2::-1], strict=True):
            layers += [ResidualBlock(channels, activation) for _ in range(blocks)]
            # n pixels become 2n by a kernel of 4, 2n - 1 by one of 3.
            kernel = (4 - height % 2, 4 - width % 2)
            layers += [*norm_act(channels, activation), nn.ConvTranspose2d(channels, out_channels, kernel, 2, padding=1)]
        super().__init__(*layers)
