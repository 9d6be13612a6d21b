"""The variational autoencoder (Kingma & Welling 2014) in pure PyTorch."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from betavae.errors import UserError
from betavae.models.likelihoods import LIKELIHOODS
from betavae.models.networks import NETWORKS
from betavae.models.precision import at_least_float32
from betavae.models.priors import PRIORS, Prior, one_hot_labels


class Posterior(NamedTuple):
    """q(z|x) = N(mean, diag(exp(logvar))), both `(B, latent_dim)`."""

    mean: Tensor
    logvar: Tensor

    def rsample(self, noise: Tensor) -> Tensor:
        """Return the reparameterized z = mean + std * noise, for noise `(..., B, latent_dim)`."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log q(z|x) in nats, `(..., B)`, for z `(..., B, latent_dim)`."""
        return -0.5 * ((z - self.mean) ** 2 * torch.exp(-self.logvar) + self.logvar + math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Return the entropy in nats, `(B,)`."""
        return 0.5 * (self.logvar + math.log(2 * math.pi * math.e)).sum(-1)

    def detach(self) -> "Posterior":
        """Return the posterior without its gradient."""
        return Posterior(self.mean.detach(), self.logvar.detach())


class VAE(nn.Module):
    """Encoder q(z|x), decoder with likelihood p(x|z), prior p(z).

    A conditional model, which has `classes`, is q(z|x, y), p(x|z, y) and p(z|y) for images with a label y: planes of
    its one-hot vector are further channels of the encoder's images, and the vector follows the decoder's z. A learned
    prior sees the vector, too, and N(0, I) is the same for each y. `given` sets the labels.

    Every argument is a plain value, so that a checkpoint can hold the recipe.

    Args:
        network: A name in `NETWORKS`.
        hidden_dims: Hidden widths, or channels per stage, from the image to the latents.
        latent_dim: Number of latent dimensions.
        activation: A name in `ACTIVATIONS`.
        likelihood: A name in `LIKELIHOODS`.
        image_shape: `(C, H, W)`.
        prior: `name` in `PRIORS` and its settings.
        classes: The names of the labels of a conditional model.
        **settings: Further arguments of the network or the likelihood.

    Raises:
        TypeError: If neither the network nor the likelihood takes one of `settings`.
    """

    labels: Tensor | None = None  # (B,) or (1,), of a view by `given`

    def __init__(
        self,
        network: str,
        hidden_dims: Sequence[int],
        latent_dim: int,
        activation: str,
        likelihood: str,
        image_shape: Sequence[int],
        prior: Mapping[str, Any] = {"name": "standard"},
        classes: Sequence[str] | None = None,
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
        self.classes = tuple(classes or ())
        channels, *size = image_shape
        encoder_shape, decoder_inputs = (channels + len(self.classes), *size), latent_dim + len(self.classes)
        self.encoder = encoder(encoder_shape, hidden_dims, latent_dim, activation, **select_kwargs(encoder, settings))
        likelihood_: Any = parts[2](**select_kwargs(parts[2], settings))
        self.likelihood: Any = likelihood_
        params_shape = (likelihood_.params_per_channel * channels, *size)
        self.decoder = decoder(
            params_shape, hidden_dims, decoder_inputs, activation, **select_kwargs(decoder, settings)
        )
        self.prior = build_prior(prior, latent_dim, self.image_shape, self.encode, len(self.classes))

    def given(self, labels: Tensor | None) -> "VAE":
        """Return a view of a conditional model, with the same weights, that sees images with these labels.

        Args:
            labels: `(B,)`, indices into `classes`, of the images or z in each further call, or `(1,)` for all of them.
                A model that is not conditional ignores labels.
        """
        if not self.classes or labels is None:
            return self
        view = type(self).__new__(type(self))  # `copy.copy` is beyond torch.compile
        # An entry of `__dict__` is found before the submodule of this name, which view and model share.
        view.__dict__.update(self.__dict__, labels=labels, prior=self.prior.given(labels))
        return view

    def describe_numbers(self, binarize: str, values: str) -> str:
        """Describe the meaning of the loss of such images, as `Likelihood.describe` does.

        For a conditional model, a note says that the labels are given.
        """
        note = self.likelihood.describe(binarize, values)
        return f"{note}; of images given their labels, -log p(x|y)" if self.classes else note

    def init_from_mean_image(self, mean: Tensor) -> None:
        """Shift the encoder's input by the mean image `(C, H, W)` and make it the decoder's first output.

        Raises:
            ValueError: If the networks or the likelihood do not support it.
        """
        encoder, decoder, likelihood = self.encoder, self.decoder, self.likelihood
        if not all(hasattr(part, "init_from_mean") for part in (encoder, decoder)):
            raise ValueError("init=data needs networks with a method init_from_mean, such as model.network=mlp")
        planes = mean.new_zeros(len(self.classes), *mean.shape[1:])
        encoder.init_from_mean(torch.cat((mean, planes)))  # type: ignore[operator]
        decoder.init_from_mean(likelihood.params_from_mean(mean))  # type: ignore[operator]

    def encode(self, x: Tensor) -> Posterior:
        """Return the posterior of images `(B, C, H, W)` in [0, 1]."""
        x = x.to(next(self.encoder.parameters()).dtype)
        if self.classes:
            planes = one_hot_labels(self.labels, len(self.classes), x.flatten(1))[:, :, None, None]
            x = torch.cat((x, planes.expand(-1, -1, *x.shape[2:])), 1)
        # Single precision also under autocast: bfloat16 resolves a KL of 25 nats to an eighth only.
        params = at_least_float32(self.encoder(x))
        return Posterior(*params.chunk(2, dim=-1))

    def decode_params(self, z: Tensor) -> Tensor:
        """Return the likelihood's parameters `(..., P * C, H, W)` at z `(..., latent_dim)`."""
        z = z.to(next(self.decoder.parameters()).dtype)
        if self.classes:
            z = torch.cat((z, one_hot_labels(self.labels, len(self.classes), z)), -1)
        return self.decoder(z.flatten(0, -2)).unflatten(0, z.shape[:-1])

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

    def kl(self, posterior: Posterior, z: Tensor) -> Tensor:
        """Return KL(q(z|x) || p(z)) in nats.

        Args:
            posterior: `(B, latent_dim)`.
            z: Samples of the posterior `(..., B, latent_dim)`, which a KL without a closed form is estimated from.

        Returns:
            The KL of each latent dimension, `(B, latent_dim)`; without a closed form their sum, `(B, 1)`.
        """
        kl = self.prior.closed_form_kl(*posterior)
        if kl is None:
            log_pz = self.prior.log_prob(z)
            kl = (-posterior.entropy() - log_pz.reshape(-1, log_pz.shape[-1]).mean(0)).unsqueeze(1)
        return kl

    def kl_per_dimension(self, posterior: Posterior) -> Tensor:
        """Return the KL of each latent dimension to a normal, `(B, latent_dim)` in nats.

        The normal has the prior's moments. For N(0, I) this is `kl`; for a learned prior, whose KL has no parts, it
        tells which dimensions are used. Under p(z|y), each image has the moments of its label, if `given` has set it.
        """
        kl = self.prior.closed_form_kl(*posterior)
        if kl is None:
            mean, std = self.prior.moments() if self.labels is None else self.moments_of_labels(self.labels)
            ratio = posterior.logvar - 2 * std.log()
            kl = 0.5 * (((posterior.mean - mean) / std) ** 2 + ratio.exp() - 1 - ratio)
        return kl

    def moments_of_labels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of p(z|y) for each of the labels `(B,)`, `(B, latent_dim)` each."""
        distinct, index = labels.unique(return_inverse=True)
        moments = [self.given(label[None]).prior.moments() for label in distinct]
        mean, std = (torch.stack(part)[index] for part in zip(*moments, strict=True))
        return mean, std

    def neg_elbo(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return recon + KL in nats per image, `(B,)`, for the arguments of `forward`."""
        posterior, z, params = self(x, noise)
        log_px = self.likelihood.log_prob(x, params)
        return self.kl(posterior, z).sum(1) - log_px.reshape(-1, len(x)).mean(0)

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Return means of p(x|z), `(n, C, H, W)`; `temperature` scales the noise of the prior."""
        return self.decode(self.prior.sample(n, temperature, generator))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the mean of p(x|z) at the posterior mean, `(B, C, H, W)`, as for figures."""
        return self.decode(self.encode(x).mean)


def build_prior(
    settings: Mapping[str, Any], latent_dim: int, image_shape: Sequence[int], encode: Any, num_classes: int
) -> Prior:
    """Return the prior `settings["name"]` with its settings, and with what it takes of the model."""
    prior = PRIORS[settings["name"]]
    model = {"latent_dim": latent_dim, "image_shape": image_shape, "encode": encode, "num_classes": num_classes}
    own = {name: value for name, value in settings.items() if name != "name"}
    try:
        return prior(**select_kwargs(prior, model), **own)
    except TypeError as error:
        raise UserError(f"prior: {prior.__name__} does not take {own} ({error})") from error


def select_kwargs(function: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that `function` takes as arguments."""
    return {name: value for name, value in settings.items() if name in inspect.signature(function).parameters}
