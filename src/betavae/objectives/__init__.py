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

from betavae.models.vae import VAE
from betavae.objectives.disentangling import beta_tcvae, capacity_vae, dip_vae, kl_decomposition
from betavae.objectives.elbo import LossTerms, elbo
from betavae.objectives.importance_weighted import dreg, iwae

OBJECTIVES: dict[str, Callable[..., LossTerms]] = {
    "elbo": elbo,
    "iwae": iwae,
    "dreg": dreg,
    "beta_tcvae": beta_tcvae,
    "dip_vae": dip_vae,
    "capacity_vae": capacity_vae,
}


def objective_kwargs(settings: dict[str, Any]) -> dict[str, Any]:
    """What of an objective's settings goes to its function."""
    takes_images = "num_train_images" in inspect.signature(OBJECTIVES[settings["name"]]).parameters
    shared = ("name", "k", "kl_decomposition", *(() if takes_images else ("num_train_images",)))
    return {key: value for key, value in settings.items() if key not in shared}


def build_objective(settings: dict[str, Any]) -> Callable[[VAE, Tensor, Tensor, Tensor | float], LossTerms]:
    """The objective `name` with its own settings; with `kl_decomposition`, those three are among its terms.

    `num_train_images`, the number of training images, is for `kl_decomposition` and for an objective that takes it.
    """
    objective = partial(OBJECTIVES[settings["name"]], **objective_kwargs(settings))
    if not settings.get("kl_decomposition"):
        return objective

    def with_kl_decomposition(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float) -> LossTerms:
        terms = objective(vae, x, noise, beta)
        return terms._replace(
            extra_terms=terms.extra_terms | kl_decomposition(terms.posterior, noise, settings["num_train_images"])
        )

    return with_kl_decomposition
