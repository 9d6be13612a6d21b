"""The evidence lower bound, and the terms that every objective returns. Units are nats per image."""

from typing import NamedTuple

from torch import Tensor

from betavae.errors import UserError
from betavae.models.vae import VAE, Posterior

ACTIVE_UNIT_THRESHOLD = 0.01  # variance over the data of an active unit's posterior mean (Burda et al. 2016)


class LossTerms(NamedTuple):
    """Terms of a batch: the scalar `loss` with a gradient, the others per image without one."""

    loss: Tensor  # ()
    recon: Tensor  # (B,)
    kl: Tensor  # (B, latent_dim), or (B, 1) for a prior without a closed form
    posterior: Posterior  # (B, latent_dim) each
    extra_terms: dict[str, Tensor] = {}  # noqa: RUF012 - further terms of an objective, (B,) each, or ()

    def batch_sums(self) -> dict[str, Tensor]:
        """Return each term by name, summed over the images; a scalar counts once per image.

        Raises:
            UserError: For an extra term of another shape.
        """
        recon, kl = self.recon.sum(), self.kl.sum()
        sums = {"loss": self.loss.detach() * len(self.recon), "recon": recon, "kl": kl, "neg_elbo": recon + kl}
        for name, term in self.extra_terms.items():
            if term.shape not in ((), self.recon.shape):
                raise UserError(
                    f"objective: its extra term {name} has shape {tuple(term.shape)}; expected ({len(self.recon)},), "
                    "one number per image, or a scalar"
                )
            sums[name] = term.detach().expand(len(self.recon)).sum()
        return sums


def elbo(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float, free_bits: float = 0.0) -> LossTerms:
    """Compute the negative ELBO (Kingma & Welling 2014, Higgins et al. 2017).

    Args:
        vae: The model.
        x: Images `(B, C, H, W)` in [0, 1].
        noise: `(k, B, latent_dim)` from N(0, I); recon, and a KL without a closed form, are means over them.
        beta: Weight of the KL.
        free_bits: Nats per latent dimension below which the mean KL over the batch has no gradient (Kingma et al.
            2016).
    """
    posterior, z, params = vae(x, noise)
    recon = -vae.likelihood.log_prob(x, params).mean(0)
    kl = vae.kl(posterior, z)
    penalty = kl.mean(0).clamp(min=free_bits).sum() if free_bits else kl.sum(1).mean()
    return LossTerms(recon.mean() + beta * penalty, recon.detach(), kl.detach(), posterior.detach())
