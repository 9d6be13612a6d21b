"""Encoders and decoders: plain `nn.Module`s from images `(B, C, H, W)` to latents and back.

To add a network, write an encoder and a decoder and name the pair in `NETWORKS`. Both take the four arguments of
`MLPEncoder`; each further argument (`dropout: float = 0.1`) is a setting of the `model` group.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
}


class MLPEncoder(nn.Sequential):
    """Map `(B, *image_shape)` to `(B, 2 * latent_dim)`, the posterior's mean beside its log-variance."""

    def __init__(self, image_shape: Sequence[int], hidden_dims: Sequence[int], latent_dim: int, activation: str):
        widths = [math.prod(image_shape), *hidden_dims]
        layers: list[nn.Module] = [nn.Flatten()]
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), ACTIVATIONS[activation]()]
        # One head of 2 * latent_dim is the tutorial's two heads side by side: same numbers, one matrix product.
        super().__init__(*layers, nn.Linear(widths[-1], 2 * latent_dim))

    @torch.no_grad()
    def init_from_mean(self, mean: Tensor) -> None:
        """Set the first bias so that the layer sees images minus `mean` `(*image_shape)`."""
        weight, bias = self[1].weight, self[1].bias
        bias.sub_(weight @ mean.flatten())  # type: ignore[operator]


class MLPDecoder(nn.Sequential):
    """Map `(B, latent_dim)` to `(B, *params_shape)` through the hidden widths in reverse order."""

    def __init__(self, params_shape: Sequence[int], hidden_dims: Sequence[int], latent_dim: int, activation: str):
        widths = [latent_dim, *reversed(hidden_dims)]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), ACTIVATIONS[activation]()]
        super().__init__(*layers, nn.Linear(widths[-1], math.prod(params_shape)), nn.Unflatten(1, tuple(params_shape)))

    @torch.no_grad()
    def init_from_mean(self, params: Tensor) -> None:
        """Set the last bias to the likelihood parameters `(*params_shape)` of the mean image."""
        self[-2].bias.copy_(params.flatten())  # type: ignore[operator]


class ConvEncoder(nn.Sequential):
    """Map `(B, *image_shape)` to `(B, 2 * latent_dim)`, with a stride-2 convolution per width."""

    needs_images = True  # and not the rows of a table, which have no neighbors

    def __init__(self, image_shape: Sequence[int], hidden_dims: Sequence[int], latent_dim: int, activation: str):
        channels, height, width = image_shape
        layers: list[nn.Module] = []
        for out_channels in hidden_dims:
            layers += [nn.Conv2d(channels, out_channels, 3, stride=2, padding=1), ACTIVATIONS[activation]()]
            channels, height, width = out_channels, (height + 1) // 2, (width + 1) // 2
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * height * width, 2 * latent_dim))


class ConvDecoder(nn.Sequential):
    """Map `(B, latent_dim)` to `(B, *params_shape)`: `ConvEncoder` mirrored with transposed convolutions."""

    def __init__(self, params_shape: Sequence[int], hidden_dims: Sequence[int], latent_dim: int, activation: str):
        sizes = [tuple(params_shape[1:])]
        for _ in hidden_dims:
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        channels = [*reversed(hidden_dims), params_shape[0]]
        smallest = (channels[0], *sizes[-1])
        layers: list[nn.Module] = [nn.Linear(latent_dim, math.prod(smallest)), nn.Unflatten(1, smallest)]
        for i, (height, width) in enumerate(reversed(sizes[:-1])):
            # A stride-2 convolution maps 2n and 2n - 1 to n; output_padding chooses between the two.
            padding = (1 - height % 2, 1 - width % 2)
            layers += [
                ACTIVATIONS[activation](),
                nn.ConvTranspose2d(channels[i], channels[i + 1], 3, stride=2, padding=1, output_padding=padding),
            ]
        super().__init__(*layers)


MIN_SIDE = 7  # pixels: the resolution is halved until the shorter side is at most this


def norm_act(channels: int, activation: str) -> list[nn.Module]:
    """Return group normalization (Wu & He 2018) in at most 8 groups, and the activation."""
    return [nn.GroupNorm(math.gcd(8, channels), channels), ACTIVATIONS[activation]()]


class ResidualBlock(nn.Module):
    """Pre-activation block x + f(x) (He et al. 2016), with f(x) = 0 at initialization."""

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
    """Return `(channels, H, W)` of each stage, halving the size until the shorter side has 4 to 7 pixels.

    The last entry of `hidden_dims` is repeated as often as needed; surplus entries are ignored.
    """
    height, width = image_shape[1:]
    shapes: list[tuple[int, int, int]] = []
    while min(height, width) > MIN_SIDE or not shapes:
        height, width = (height + 1) // 2, (width + 1) // 2
        shapes.append((hidden_dims[min(len(shapes), len(hidden_dims) - 1)], height, width))
    return shapes


class ResNetEncoder(nn.Sequential):
    """Map `(B, *image_shape)` of any size to `(B, 2 * latent_dim)`, with a stage per width."""

    needs_images = True

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
    """Map `(B, latent_dim)` to `(B, *params_shape)`: `ResNetEncoder` mirrored."""

    def __init__(
        self, params_shape: Sequence[int], hidden_dims: Sequence[int], latent_dim: int, activation: str, blocks: int = 1
    ):
        shapes = [tuple(params_shape), *stage_shapes(params_shape, hidden_dims)]
        layers: list[nn.Module] = [nn.Linear(latent_dim, math.prod(shapes[-1])), nn.Unflatten(1, shapes[-1])]
        for (channels, _, _), (out_channels, height, width) in zip(shapes[:0:-1], shapes[-2::-1], strict=True):
            layers += [ResidualBlock(channels, activation) for _ in range(blocks)]
            # A kernel of 4 maps n pixels to 2n, a kernel of 3 to 2n - 1.
            kernel = (4 - height % 2, 4 - width % 2)
            layers += [
                *norm_act(channels, activation),
                nn.ConvTranspose2d(channels, out_channels, kernel, 2, padding=1),
            ]
        super().__init__(*layers)


NETWORKS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "mlp": (MLPEncoder, MLPDecoder),
    "conv": (ConvEncoder, ConvDecoder),
    "resnet": (ResNetEncoder, ResNetDecoder),
}
