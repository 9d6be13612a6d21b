"""What an objective gives back for a batch, in nats per image."""

from typing import NamedTuple

from torch import Tensor

from betavae.models.vae import VAE, Posterior

ACTIVE_UNIT_THRESHOLD = (
    0.01  # of the posterior mean over the data; a unit that varies less is not in use (Burda et al.)
)


class LossTerms(NamedTuple):
    """The terms of one batch. `loss` is a scalar; the others hold one value per image and carry no gradient."""

    loss: Tensor  # ()
    recon: Tensor  # (B,)
    kl: Tensor  # (B, latent_dim)
    posterior: Posterior  # (B, latent_dim) each
    extra_terms: dict[str, Tensor] = {}  # noqa: RUF012 - any further terms, (B,) each

    def batch_sums(self) -> dict[str, Tensor]:
        """Each term by its name, summed over the images of the batch."""
        recon, kl = self.recon.sum(), self.kl.sum()
        sums = {"loss": self.loss.detach() * len(self.recon), "recon": recon, "kl": kl, "neg_elbo": recon + kl}
        return sums | {name: term.detach().sum() for name, term in self.extra_terms.items()}


def gaussian_kl(posterior: Posterior) -> Tensor:
    """KL(N(mean, var) || N(0, 1)) per latent dimension, `(B, latent_dim)`."""
    mean, logvar = posterior
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)


def elbo(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, free_bits: float = 0.0) -> LossTerms:
    """The negative evidence lower bound with the KL in closed form, averaged over the leading dimension of `noise`.

    `x` `(B, C, H, W)`, `noise` `(k, B, latent_dim)` from N(0, I). With `free_bits` (nats per latent dimension) no
    dimension's mean KL over the batch is pushed below that floor (Kingma et al. 2016).
    """
    posterior, _, params = vae(x, noise)
    recon = -vae.likelihood.log_prob(x, params).mean(0)
    kl = gaussian_kl(posterior)
    rate = kl.mean(0).clamp(min=free_bits).sum() if free_bits else kl.sum(1).mean()
    return LossTerms(recon.mean() + beta * rate, recon.detach(), kl.detach(), posterior.detach())
