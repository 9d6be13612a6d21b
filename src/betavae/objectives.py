"""What is minimised, as the equations are written: pure functions of tensors, everything in nats per image.

    recon    = -E_q log p(x|z)        (the distortion)
    kl       = KL(q(z|x) || N(0, I))  (the rate)
    loss     = recon + beta * kl      (what is optimised; Higgins et al. 2017)
    neg_elbo = recon + kl             (beta = 1: what is compared across a beta sweep)

The importance-weighted bounds are in `importance_weighted.py`, those made to disentangle in `disentangling.py`.

To add an objective, write a function with `elbo`'s first four arguments and name it in `OBJECTIVES`; what follows them
are its settings, from `configs/objective/`. Terms of its own go into `LossTerms.extra_terms`, and from there by their names into
every average, curve and table.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from betavae.disentangling import capacity_vae, dip_vae, kl_decomposition, beta_tcvae
from betavae.importance_weighted import dreg, iwae
from betavae.terms import LossTerms, gaussian_kl
from betavae.vae import VAE


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


OBJECTIVES: dict[str, Callable[..., LossTerms]] = {
    "elbo": elbo,
    "iwae": iwae,
    "dreg": dreg,
    "tc": beta_tcvae,
    "dip": dip_vae,
    "capacity": capacity_vae,
}


def objective_kwargs(settings: dict[str, Any]) -> dict[str, Any]:
    """What of an objective's settings goes to its function."""
    takes_images = "images" in inspect.signature(OBJECTIVES[settings["name"]]).parameters
    shared = ("name", "k", "kl_parts", *(() if takes_images else ("images",)))
    return {key: value for key, value in settings.items() if key not in shared}


def build_objective(settings: dict[str, Any]) -> Callable[[VAE, Tensor, Tensor, Tensor | float], LossTerms]:
    """The objective `name` with its own settings; with `kl_parts`, those three are among its terms.

    `images`, the number of training images, is for `kl_parts` and for an objective that takes it.
    """
    objective = partial(OBJECTIVES[settings["name"]], **objective_kwargs(settings))
    if not settings.get("kl_parts"):
        return objective

    def with_kl_decomposition(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float) -> LossTerms:
        terms = objective(vae, x, noise, beta)
        return terms._replace(extra_terms=terms.extra_terms | kl_decomposition(terms.posterior, noise, settings["images"]))

    return with_kl_decomposition
