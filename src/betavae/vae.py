"""The variational autoencoder (Kingma & Welling 2014) in pure PyTorch: lift this file into a notebook if you like."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from betavae.errors import UserError
from betavae.likelihoods import LIKELIHOODS
from betavae.logistic_mixture import LogisticMixture
from betavae.networks import NETWORKS


class Posterior(NamedTuple):
    """q(z|x) = N(mean, diag(exp(logvar))), both `(B, latent_dim)`."""

    mean: Tensor
    logvar: Tensor

    def rsample(self, noise: Tensor) -> Tensor:
        """The reparameterisation z = mean + std * noise; `noise` `(..., B, latent_dim)` from N(0, I)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class VAE(nn.Module):
    """q(z|x) by an encoder, p(x|z) by a decoder and a likelihood, prior p(z) = N(0, I).

    Every argument is a plain value, so that a checkpoint can hold the recipe. `network`, `activation` and `likelihood`
    are names in `NETWORKS`, `ACTIVATIONS` and `LIKELIHOODS`; `image_shape` is `(C, H, W)`.
    """

    def __init__(
        self,
        network: str,
        hidden_dims: Sequence[int],
        latent_dim: int,
        activation: str,
        likelihood: str,
        image_shape: Sequence[int],
    ):
        super().__init__()
        make_encoder, make_decoder = NETWORKS[network]
        self.latent_dim = latent_dim
        self.image_shape = tuple(image_shape)
        self.encoder = make_encoder(image_shape, hidden_dims, latent_dim, activation)
        self.likelihood: Any = (LIKELIHOODS | {"logistic_mixture": LogisticMixture})[likelihood]()
        channels = getattr(self.likelihood, "params_per_channel", 1) * image_shape[0]
        self.decoder = make_decoder((channels, *image_shape[1:]), hidden_dims, latent_dim, activation)

    def centre(self, mean: Tensor) -> None:
        """Start from the mean image `(C, H, W)` in [0, 1]: the encoder sees what differs from it, the decoder gives it.

        Raises UserError if the networks have no `centre`.
        """
        if not (hasattr(self.encoder, "centre") and hasattr(self.decoder, "centre")):
            raise UserError("init=data needs networks with a `centre` method, such as model.network=mlp")
        self.encoder.centre(mean)  # type: ignore[operator]
        self.decoder.centre(self.likelihood.params_of(mean))  # type: ignore[operator]

    def encode(self, x: Tensor) -> Posterior:
        """`(B, C, H, W)` in [0, 1] -> the posterior."""
        # In the precision of x also under autocast: bfloat16 knows a KL of 25 nats to an eighth only.
        return Posterior(*self.encoder(x).to(x.dtype).chunk(2, dim=-1))

    def decode(self, z: Tensor) -> Tensor:
        """`(..., latent_dim)` -> the likelihood's parameters `(..., P * C, H, W)`, P of them per pixel and channel."""
        return self.decoder(z.flatten(0, -2)).unflatten(0, z.shape[:-1])

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Posterior, Tensor, Tensor]:
        """`x` `(B, C, H, W)`, `noise` `(..., B, latent_dim)` -> posterior, z, likelihood parameters at z."""
        posterior = self.encode(x)
        z = posterior.rsample(noise)
        return posterior, z, self.decode(z)

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """`n` means of p(x|z), `(n, C, H, W)`, for z from the prior with its standard deviation times `temperature`."""
        device = next(self.parameters()).device
        # Drawn on the CPU, so that one seed gives the same pictures on every device.
        z = temperature * torch.randn(n, self.latent_dim, generator=generator)
        return self.likelihood.mean(self.decode(z.to(device)))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x|z) at the posterior mean, `(B, C, H, W)`. For pictures: an ELBO needs sampled z."""
        return self.likelihood.mean(self.decode(self.encode(x).mean))
