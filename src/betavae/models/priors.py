"""p(z): the standard normal prior and learned ones, each with log-probability, samples and moments.

The KL to a learned prior has no closed form; it is estimated from samples of the posterior (`VAE.kl`). To add a prior,
write a class with the methods of `Prior` and name it in `PRIORS`. Its constructor takes `latent_dim`, and if it has
such parameters the VAE's `image_shape` and `encode`, and `num_classes`, with which it is p(z|y) in a conditional model;
the others are settings of the group `prior`.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from betavae.errors import UserError
from betavae.models.precision import at_least_float32, to_float64

LOG_2PI = math.log(2 * math.pi)
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # from images (B, C, H, W) to mean and log-variance (B, latent_dim)
NUM_MOMENT_SAMPLES = 10_000
MAX_LOG_SCALE = 3.0  # of a coupling layer: factors from 1/20 to 20


def require_labels(labels: Tensor | None) -> Tensor:
    """Return the labels; raise ValueError if there are none."""
    if labels is None:
        raise ValueError("a conditional VAE needs the labels of its images: vae.given(labels)")
    return labels


def one_hot_labels(labels: Tensor | None, num_classes: int, like: Tensor) -> Tensor:
    """Return one-hot vectors `(..., B, num_classes)` for labels `(B,)` or `(1,)`.

    They have the leading dimensions, dtype and device of vectors `like` `(..., B, D)`.

    Raises:
        ValueError: If there are no labels.
    """
    return F.one_hot(require_labels(labels), num_classes).to(like).expand(*like.shape[:-1], -1)


class Prior(nn.Module):
    """Base class of the priors. With `num_classes`, it is p(z|y), and `given` sets the labels y."""

    latent_dim: int
    num_classes = 0
    labels: Tensor | None = None  # (B,) or (1,), of a view by `given`
    has_components = False  # True: a sample also takes a uniform number, which chooses a component

    def given(self, labels: Tensor) -> "Prior":
        """Return a view with the same weights for z with these labels, `(B,)` or `(1,)` for all of them.

        Raises:
            TypeError: If `labels` is no tensor of one dimension.
        """
        if not isinstance(labels, Tensor) or labels.ndim != 1:
            raise TypeError("labels must be a tensor (B,), or (1,) for all images, as in vae.given(torch.tensor([7]))")
        if not self.num_classes:
            return self
        view = type(self).__new__(type(self))  # `copy.copy` is beyond torch.compile
        view.__dict__.update(self.__dict__)
        view.labels = labels
        return view

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log p(z) in nats, `(..., B)`, for z `(..., B, latent_dim)`."""
        raise NotImplementedError

    def sample(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw z, `(n, latent_dim)`; `temperature` is a factor of the noise from N(0, I).

        Random numbers are drawn on the CPU, so that one seed gives the same samples on every device.
        """
        like = next(itertools.chain(self.parameters(), self.buffers()))
        uniform = torch.rand(n, generator=generator).to(like) if self.has_components else None
        noise = temperature * torch.randn(n, self.latent_dim, generator=generator)
        return self.transform(noise.to(like), uniform)

    def count_floats(self) -> int:
        """Count the numbers of 4 bytes, beyond a few per latent dimension, that `log_prob` holds for one z."""
        return 0

    def transform(self, noise: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Turn noise `(n, latent_dim)` from N(0, I) into samples.

        `uniform` `(n,)` in [0, 1) chooses components.
        """
        raise NotImplementedError

    def closed_form_kl(self, mean: Tensor, logvar: Tensor) -> Tensor | None:
        """Return the KL to the prior per latent dimension, `(B, latent_dim)`, if there is a formula.

        It is KL(N(mean, diag(exp(logvar))) || p).
        """
        return None

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each latent dimension, `(latent_dim,)` each.

        Those of p(z|y) for the label `(1,)` of a view, or without labels those of the mean over all classes.
        """
        prior = self
        if self.num_classes and self.labels is None:
            prior = self.given(torch.arange(NUM_MOMENT_SAMPLES) % self.num_classes)
        z = prior.sample(NUM_MOMENT_SAMPLES, generator=torch.Generator().manual_seed(0))
        return z.mean(0), z.std(0)


class StandardNormal(Prior):
    """N(0, I) (Kingma & Welling 2014)."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.latent_dim = latent_dim
        self.register_buffer("zero", torch.zeros(()), persistent=False)  # has the device of the model
        self.zero: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * (z**2 + LOG_2PI).sum(-1)

    def transform(self, noise: Tensor, uniform: Tensor | None = None) -> Tensor:
        return noise

    def closed_form_kl(self, mean: Tensor, logvar: Tensor) -> Tensor:
        return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)

    def moments(self) -> tuple[Tensor, Tensor]:
        mean = self.zero.expand(self.latent_dim)
        return mean, mean + 1


def mixture_log_prob(z: Tensor, mean: Tensor, logvar: Tensor, log_weights: Tensor) -> Tensor:
    """Return log sum_k w_k N(z; mean_k, diag(exp(logvar_k))), `(..., B)` in nats.

    Args:
        z: `(..., B, D)`.
        mean: `(K, D)`.
        logvar: `(K, D)`.
        log_weights: `(K,)`, or `(B, K)` for each z its own; the exponentials sum to 1.
    """
    # The squares (z - mean)^2 / var as two matrix products, which lose digits to cancellation: hence double precision,
    # which autocast and faster products of float32 leave alone.
    values, mean, logvar = to_float64(z), to_float64(mean), to_float64(logvar)
    precision = torch.exp(-logvar)
    constant = (mean**2 * precision + logvar + LOG_2PI).sum(1) - 2 * to_float64(log_weights)
    distances = values**2 @ precision.T - 2 * values @ (mean * precision).T + constant
    return torch.logsumexp(-0.5 * distances, -1).to(z)


class GaussianComponents(Prior):
    """Base class of the mixtures of K normal distributions with diagonal covariance."""

    log_weights: nn.Parameter  # (K,), or of p(z|y) (num_classes, K), before the softmax
    has_components = True

    def components(self) -> tuple[Tensor, Tensor]:
        """Return the means and log-variances, `(K, latent_dim)` each."""
        raise NotImplementedError

    def select_log_weights(self) -> Tensor:
        """Return the normalized log-weights: `(K,)`, or of p(z|y) those of the labels, `(B, K)`."""
        weights = self.log_weights.log_softmax(-1)
        return weights[require_labels(self.labels).to(weights.device)] if self.num_classes else weights

    def log_prob(self, z: Tensor) -> Tensor:
        return mixture_log_prob(z, *self.components(), self.select_log_weights())

    def count_floats(self) -> int:
        return 8 * self.log_weights.shape[-1]  # four matrices in double precision

    def transform(self, noise: Tensor, uniform: Tensor | None = None) -> Tensor:
        if uniform is None:
            raise ValueError("a mixture needs uniform numbers, which choose its components")
        mean, logvar = self.components()
        edges = self.select_log_weights().float().exp().cumsum(-1)[..., :-1]
        chosen = (uniform[:, None] >= edges).sum(1)
        return mean[chosen] + torch.exp(0.5 * logvar[chosen]) * noise

    def moments(self) -> tuple[Tensor, Tensor]:
        mean, logvar = self.components()
        weights = self.log_weights.softmax(-1) if self.labels is None else self.select_log_weights().exp()
        weights = weights.view(-1, len(mean)).mean(0)
        center = weights @ mean
        return center, (weights @ (logvar.exp() + (mean - center) ** 2)).sqrt()


class Mixture(GaussianComponents):
    """Mixture of Gaussians with learned means, scales and weights.

    The weights of p(z|y) depend on the label.
    """

    def __init__(self, latent_dim: int, components: int, num_classes: int = 0):
        super().__init__()
        self.latent_dim, self.num_classes = latent_dim, num_classes
        # Close to N(0, I), and different enough to become different components.
        self.mean = nn.Parameter(0.3 * torch.randn(components, latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(components, latent_dim))
        self.log_weights = nn.Parameter(torch.zeros((num_classes, components) if num_classes else components))

    def components(self) -> tuple[Tensor, Tensor]:
        return self.mean, 2 * self.log_scale

    def closed_form_kl(self, mean: Tensor, logvar: Tensor) -> Tensor | None:
        if len(self.mean) > 1:
            return None
        ratio = logvar - 2 * self.log_scale
        return 0.5 * ((mean - self.mean) ** 2 * torch.exp(-2 * self.log_scale) + ratio.exp() - 1 - ratio)


class VampPrior(GaussianComponents):
    """Mixture of the posteriors of K learned pseudo-inputs (Tomczak & Welling 2018), with learned weights."""

    def __init__(self, latent_dim: int, components: int, image_shape: Sequence[int], encode: Encode):
        super().__init__()
        self.latent_dim, self.encode = latent_dim, encode
        self.pseudo_inputs = nn.Parameter(torch.rand(components, *image_shape))
        self.log_weights = nn.Parameter(torch.zeros(components))

    @torch.no_grad()
    def init_from_images(self, x: Tensor) -> None:
        """Start at images `(K, C, H, W)`, as the network sees them."""
        self.pseudo_inputs.copy_(x)

    def components(self) -> tuple[Tensor, Tensor]:
        return self.encode(self.pseudo_inputs)


class Coupling(nn.Module):
    """Affine coupling layer: z = (a, b) -> (b * exp(s(a)) + t(a), a), so that the next layer changes `a`.

    Args:
        num_fixed: The number of values in `a`.
        num_changed: The number of values in `b`.
        hidden_dims: The hidden widths of the network for s and t.
        num_classes: The number of values in the one-hot vector that the network sees beside `a`.
    """

    def __init__(self, num_fixed: int, num_changed: int, hidden_dims: Sequence[int], num_classes: int = 0):
        super().__init__()
        self.sizes = (num_fixed, num_changed)
        widths = [num_fixed + num_classes, *hidden_dims]
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        last = nn.Linear(widths[-1], 2 * num_changed)
        nn.init.zeros_(last.weight)  # the identity
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(*layers, last)

    def scale_and_shift(self, fixed: Tensor, one_hot: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return s and t; s is bounded, softly, to (-`MAX_LOG_SCALE`, `MAX_LOG_SCALE`)."""
        inputs = fixed if one_hot is None else torch.cat((fixed, one_hot), -1)
        dtype = next(self.network.parameters()).dtype
        log_scale, shift = at_least_float32(self.network(inputs.to(dtype))).chunk(2, -1)
        return log_scale / (1 + log_scale.abs() / MAX_LOG_SCALE), shift

    def forward(self, z: Tensor, one_hot: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the transformed z and the log-determinant `(B,)` of the Jacobian, for z `(B, D)`."""
        fixed, changed = z.split(self.sizes, -1)
        log_scale, shift = self.scale_and_shift(fixed, one_hot)
        return torch.cat((changed * log_scale.exp() + shift, fixed), -1), log_scale.sum(-1)

    def invert(self, z: Tensor, one_hot: Tensor | None = None) -> Tensor:
        """Return the z that `forward` maps to this one."""
        changed, fixed = z.split(self.sizes[::-1], -1)
        log_scale, shift = self.scale_and_shift(fixed, one_hot)
        return torch.cat((fixed, (changed - shift) * torch.exp(-log_scale)), -1)


class Flow(Prior):
    """RealNVP (Dinh et al. 2017): z becomes N(0, I) in affine coupling layers. It starts as N(0, I).

    The layers of p(z|y) also see the label.
    """

    def __init__(self, latent_dim: int, transforms: int, hidden_dims: Sequence[int], num_classes: int = 0):
        super().__init__()
        if latent_dim < 2:
            raise UserError(f"prior=flow needs model.latent_dim of at least 2, and it is {latent_dim}")
        sizes = (latent_dim // 2, latent_dim - latent_dim // 2)
        self.latent_dim, self.num_classes, self.max_width = latent_dim, num_classes, max(hidden_dims, default=0)
        self.layers = nn.ModuleList(
            Coupling(*(sizes if number % 2 == 0 else sizes[::-1]), hidden_dims, num_classes)
            for number in range(transforms)
        )

    def one_hot(self, z: Tensor) -> Tensor | None:
        """Return what the layers of p(z|y) see beside z `(B, latent_dim)`: one-hot vectors `(B, num_classes)`."""
        return one_hot_labels(self.labels, self.num_classes, z).flatten(0, -2) if self.num_classes else None

    def log_prob(self, z: Tensor) -> Tensor:
        noise, one_hot = at_least_float32(z).flatten(0, -2), self.one_hot(z)
        log_det = noise.new_zeros(noise.shape[0])  # `len` would be a constant of an exported graph
        for layer in self.layers:
            noise, change = layer(noise, one_hot)
            log_det = log_det + change
        return (log_det - 0.5 * (noise**2 + LOG_2PI).sum(-1)).unflatten(0, z.shape[:-1])

    def count_floats(self) -> int:
        return 3 * self.max_width  # the input and the output of a layer, and the output of its ReLU

    def transform(self, noise: Tensor, uniform: Tensor | None = None) -> Tensor:
        one_hot = self.one_hot(noise)
        for layer in reversed(self.layers):
            noise = layer.invert(noise, one_hot)  # type: ignore[operator]
        return noise


PRIORS: dict[str, type[Prior]] = {
    "standard": StandardNormal,
    "mixture": Mixture,
    "vamp": VampPrior,
    "flow": Flow,
}
