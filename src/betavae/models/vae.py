"""The variational autoencoder (Kingma & Welling 2014) in pure PyTorch: lift this file into a notebook if you like."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from betavae.errors import UserError
from betavae.models.likelihoods import LIKELIHOODS
from betavae.models.networks import NETWORKS
from betavae.models.precision import at_least_float32


class Posterior(NamedTuple):
    """q(z|x) = N(mean, diag(exp(logvar))), both `(B, latent_dim)`."""

    mean: Tensor
    logvar: Tensor

    def rsample(self, noise: Tensor) -> Tensor:
        """The reparameterisation z = mean + std * noise; `noise` `(..., B, latent_dim)` from N(0, I)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def detach(self) -> "Posterior":
        return Posterior(self.mean.detach(), self.logvar.detach())


class VAE(nn.Module):
    """q(z|x) by an encoder, p(x|z) by a decoder and a likelihood, prior p(z) = N(0, I).

    Every argument is a plain value, so that a checkpoint can hold the recipe. `network`, `activation` and `likelihood`
    are names in `NETWORKS`, `ACTIVATIONS` and `LIKELIHOODS`; `image_shape` is `(C, H, W)`; `settings` go by their names
    to the network or the likelihood whose signature has them. Raises TypeError for one that neither has.
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
        self.encoder = encoder(image_shape, hidden_dims, latent_dim, activation, **_kwargs_for(encoder, settings))
        likelihood_: Any = parts[2](**_kwargs_for(parts[2], settings))
        self.likelihood: Any = likelihood_
        params_shape = (likelihood_.params_per_channel * channels, *size)
        self.decoder = decoder(params_shape, hidden_dims, latent_dim, activation, **_kwargs_for(decoder, settings))

    def init_from_mean_image(self, mean: Tensor) -> None:
        """Start from the mean image `(C, H, W)` in [0, 1]: the encoder sees what differs from it, the decoder gives it.

        Raises UserError if the networks or the likelihood cannot.
        """
        parts = ((self.encoder, "centre"), (self.decoder, "centre"), (self.likelihood, "params_of"))
        if not all(hasattr(part, name) for part, name in parts):
            raise UserError("init=data needs networks with a `centre` method, such as model.network=mlp")
        self.encoder.centre(mean)  # type: ignore[operator]
        self.decoder.centre(self.likelihood.params_of(mean))  # type: ignore[operator]

    def encode(self, x: Tensor) -> Posterior:
        """`(B, C, H, W)` in [0, 1] -> the posterior."""
        params = self.encoder(x.to(next(self.encoder.parameters()).dtype))
        # In single precision also under autocast: bfloat16 knows a KL of 25 nats to an eighth only.
        params = at_least_float32(params)
        return Posterior(*params.chunk(2, dim=-1))

    def decode_params(self, z: Tensor) -> Tensor:
        """`(..., latent_dim)` -> the likelihood's parameters (logits, of the Bernoulli) `(..., P * C, H, W)`."""
        weights = next(self.decoder.parameters()).dtype  # bfloat16, say, where z is kept in single precision
        return self.decoder(z.to(weights).flatten(0, -2)).unflatten(0, z.shape[:-1])

    def decode(self, z: Tensor) -> Tensor:
        """`(..., latent_dim)` -> the means of p(x|z), `(..., C, H, W)` in [0, 1]."""
        return self.likelihood.mean(self.decode_params(z))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Posterior, Tensor, Tensor]:
        """`x` `(B, C, H, W)`, `noise` `(..., B, latent_dim)` from N(0, I) (None: drawn) -> posterior, z, params."""
        posterior = self.encode(x)
        z = posterior.rsample(torch.randn_like(posterior.mean) if noise is None else noise)
        return posterior, z, self.decode_params(z)

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """`n` means of p(x|z), `(n, C, H, W)`, for z from the prior with its standard deviation times `temperature`."""
        device = next(self.parameters()).device
        # Drawn on the CPU, so that one seed gives the same pictures on every device.
        z = temperature * torch.randn(n, self.latent_dim, generator=generator)
        return self.decode(z.to(device))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x|z) at the posterior mean, `(B, C, H, W)`. For pictures: an ELBO needs sampled z."""
        return self.decode(self.encode(x).mean)


def _kwargs_for(part: Callable[..., Any], settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in inspect.signature(part).parameters}
