"""Training objectives, written as the equations of their papers, in nats per image.

    recon    = -E_q log p(x|z)
    kl       = KL(q(z|x) || p(z))
    loss     = recon + beta * kl      (the training objective; Higgins et al. 2017)
    neg_elbo = recon + kl             (compared across values of beta)

`elbo.py` has the ELBO, `importance_weighted.py` the bounds with several samples, `disentangling.py` the objectives made
to disentangle, `mmd.py` InfoVAE and WAE, `schedules.py` the schedules of beta.

To add an objective, write a function with `elbo`'s first four arguments and name it in `OBJECTIVES`. Further arguments
are its settings, from `configs/objective/`. Further terms go into `LossTerms.extra_terms` and appear by name in every
average, curve and table.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from betavae.errors import UserError
from betavae.models.vae import VAE
from betavae.objectives.disentangling import beta_tcvae, capacity_vae, dip_vae, kl_decomposition
from betavae.objectives.elbo import LossTerms, elbo
from betavae.objectives.importance_weighted import ciwae, dreg, iwae, miwae, piwae
from betavae.objectives.mmd import mmd_vae

__all__ = ["OBJECTIVES", "LossTerms", "build_objective", "check_prior", "elbo", "select_objective_kwargs"]

OBJECTIVES: dict[str, Callable[..., LossTerms]] = {
    "elbo": elbo,
    "iwae": iwae,
    "dreg": dreg,
    "ciwae": ciwae,
    "miwae": miwae,
    "piwae": piwae,
    "mmd_vae": mmd_vae,
    "beta_tcvae": beta_tcvae,
    "dip_vae": dip_vae,
    "capacity_vae": capacity_vae,
}


def select_objective_kwargs(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that go to the objective's function."""
    takes_size = "num_train_images" in inspect.signature(OBJECTIVES[settings["name"]]).parameters
    shared = ("name", "k", "kl_decomposition", *(() if takes_size else ("num_train_images",)))
    return {key: value for key, value in settings.items() if key not in shared}


# Objectives and settings that are defined for N(0, I) only, with the reason.
STANDARD_PRIOR_ONLY = {
    "objective=beta_tcvae": "its dimension-wise KL compares each latent dimension with N(0, 1)",
    "objective=dip_vae": "it moves the covariance of the latents towards that of N(0, I)",
    "objective=mmd_vae": "its MMD compares z with samples of N(0, I)",
    "objective.kl_decomposition": "its dimension-wise KL compares each latent dimension with N(0, 1)",
    "objective.free_bits": "it needs the KL of each latent dimension",
}


def check_prior(objective: dict[str, Any], prior: str) -> None:
    """Raise UserError if an objective is not defined for a prior."""
    used = [f"objective={objective['name']}"]
    used += [f"objective.{key}" for key in ("kl_decomposition", "free_bits") if objective.get(key)]
    for setting in used if prior != "standard" else []:
        if setting in STANDARD_PRIOR_ONLY:
            raise UserError(f"{setting} needs prior=standard: {STANDARD_PRIOR_ONLY[setting]}")


def build_objective(settings: dict[str, Any]) -> Callable[[VAE, Tensor, Tensor, Tensor | float], LossTerms]:
    """Return the objective `settings["name"]` with its settings bound.

    With `settings["kl_decomposition"]` the three parts of the KL are among its terms; it needs
    `settings["num_train_images"]`, the number of training images.
    """
    objective = partial(OBJECTIVES[settings["name"]], **select_objective_kwargs(settings))
    if not settings.get("kl_decomposition"):
        return objective

    def with_kl_decomposition(vae: VAE, x: Tensor, noise: Tensor, beta: Tensor | float) -> LossTerms:
        terms = objective(vae, x, noise, beta)
        parts = kl_decomposition(terms.posterior, noise, settings["num_train_images"])
        return terms._replace(extra_terms=terms.extra_terms | parts)

    return with_kl_decomposition
