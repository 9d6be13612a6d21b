"""The variational autoencoder (Kingma & Welling 2014) in pure PyTorch; copy this package into a notebook."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from betavae.models.likelihoods import LIKELIHOODS
from betavae.models.networks import NETWORKS
from betavae.models.precision import at_least_float32


class Posterior(NamedTuple):
    """q(z|x) = N(mean, diag(exp(logvar))), both `(B, latent_dim)`."""

    mean: Tensor
    logvar: Tensor

    def rsample(self, noise: Tensor) -> Tensor:
        """Return z = mean + std * noise (the reparameterization), for `noise` `(..., B, latent_dim)` from N(0, I)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def detach(self) -> "Posterior":
        """Return the posterior without its gradient."""
        return Posterior(self.mean.detach(), self.logvar.detach())


class VAE(nn.Module):
    """Encoder q(z|x), decoder with likelihood p(x|z), prior p(z) = N(0, I).

    Every argument is a plain value, so that a checkpoint can hold the recipe.

    Args:
        network: A name in `NETWORKS`.
        hidden_dims: Hidden widths, or channels per stage, from the image to the latents.
        latent_dim: Number of latent dimensions.
        activation: A name in `ACTIVATIONS`.
        likelihood: A name in `LIKELIHOODS`.
        image_shape: `(C, H, W)`.
        **settings: Further arguments of the network or the likelihood.

    Raises:
        TypeError: If neither the network nor the likelihood takes one of `settings`.
    """

    def __init__(
        self,
        network: str,
        hidden_dims: Sequence[int],
        latent_dim: int,
        activation: str,
        likelihood: str,
        image_shape: Sequence[int],
        **settings: Any,
    ):
        super().__init__()
        encoder, decoder = NETWORKS[network]
        parts = (encoder, decoder, LIKELIHOODS[likelihood])
        for name in settings:
            if not any(name in inspect.signature(part).parameters for part in parts):
                raise TypeError(f"neither network={network} nor likelihood={likelihood} has a setting {name}")
        self.latent_dim = latent_dim
        self.image_shape = tuple(image_shape)
        channels, *size = image_shape
        self.encoder = encoder(image_shape, hidden_dims, latent_dim, activation, **select_kwargs(encoder, settings))
        likelihood_: Any = parts[2](**select_kwargs(parts[2], settings))
        self.likelihood: Any = likelihood_
        params_shape = (likelihood_.params_per_channel * channels, *size)
        self.decoder = decoder(params_shape, hidden_dims, latent_dim, activation, **select_kwargs(decoder, settings))

    def init_from_mean_image(self, mean: Tensor) -> None:
        """Shift the encoder's input by the mean image `(C, H, W)` and make it the decoder's first output.

        Raises:
            ValueError: If the networks or the likelihood do not support it.
        """
        encoder, decoder, likelihood = self.encoder, self.decoder, self.likelihood
        if not all(hasattr(part, "init_from_mean") for part in (encoder, decoder)):
            raise ValueError("init=data needs networks with a method init_from_mean, such as model.network=mlp")
        encoder.init_from_mean(mean)  # type: ignore[operator]
        decoder.init_from_mean(likelihood.params_from_mean(mean))  # type: ignore[operator]

    def encode(self, x: Tensor) -> Posterior:
        """Return the posterior of images `(B, C, H, W)` in [0, 1]."""
        params = self.encoder(x.to(next(self.encoder.parameters()).dtype))
        # Single precision also under autocast: bfloat16 resolves a KL of 25 nats to an eighth only.
        params = at_least_float32(params)
        return Posterior(*params.chunk(2, dim=-1))

    def decode_params(self, z: Tensor) -> Tensor:
        """Return the likelihood's parameters `(..., P * C, H, W)` at z `(..., latent_dim)`."""
        dtype = next(self.decoder.parameters()).dtype
        return self.decoder(z.to(dtype).flatten(0, -2)).unflatten(0, z.shape[:-1])

    def decode(self, z: Tensor) -> Tensor:
        """Return the means of p(x|z), `(..., C, H, W)` in [0, 1], at z `(..., latent_dim)`."""
        return self.likelihood.mean(self.decode_params(z))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Posterior, Tensor, Tensor]:
        """Encode, sample and decode.

        Args:
            x: Images `(B, C, H, W)` in [0, 1].
            noise: `(..., B, latent_dim)` from N(0, I); None draws one sample per image.

        Returns:
            The posterior, z `(..., B, latent_dim)` and the likelihood's parameters `(..., B, P * C, H, W)`.
        """
        posterior = self.encode(x)
        z = posterior.rsample(torch.randn_like(posterior.mean) if noise is None else noise)
        return posterior, z, self.decode_params(z)

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Return means of p(x|z), `(n, C, H, W)`, for z from the prior scaled by `temperature`."""
        device = next(self.parameters()).device
        # Drawn on the CPU, so that one seed gives the same images on every device.
        z = temperature * torch.randn(n, self.latent_dim, generator=generator)
        return self.decode(z.to(device))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the mean of p(x|z) at the posterior mean, `(B, C, H, W)`. For figures: an ELBO needs sampled z."""
        return self.decode(self.encode(x).mean)


def select_kwargs(function: Callable[..., Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that `function` takes as arguments."""
    return {name: value for name, value in settings.items() if name in inspect.signature(function).parameters}
