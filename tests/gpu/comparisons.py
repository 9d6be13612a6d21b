"""Compute the same numbers on two devices."""

import contextlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import product
from typing import Any

import torch

from betavae.models.likelihoods import LIKELIHOODS
from betavae.models.networks import NETWORKS
from betavae.models.priors import PRIORS
from betavae.models.vae import VAE
from betavae.objectives import OBJECTIVES, build_objective

SETTINGS: dict[str, dict[str, Any]] = {
    "elbo": {"free_bits": 0.1},
    "beta_tcvae": {"sampling": "weighted"},
    "dip_vae": {"variant": "ii", "off_diagonal": 10.0, "diagonal": 5.0},
    "capacity_vae": {"gamma": 10.0},
    "ciwae": {"elbo_weight": 0.5},
    "miwae": {"groups": 3},
    "piwae": {"groups": 3},
    "mmd_vae": {"mmd_weight": 10.0},
}
PRIOR_SETTINGS: dict[str, dict[str, Any]] = {
    "mixture": {"components": 4},
    "vamp": {"components": 4},
    "flow": {"transforms": 2, "hidden_dims": [8]},
}
HIDDEN = {"mlp": [8], "conv": [2, 3], "resnet": [4, 8]}


@contextlib.contextmanager
def no_synchronization(device: str) -> Iterator[None]:
    """Make waiting for a GPU an error."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def find_difference(compute: Callable[[str], Any], device: str, rtol: float, atol: float) -> str | None:
    """Describe how what `compute` returns for the CPU and for `device` differs, or how it fails."""
    found = []
    for place in ("cpu", device):
        try:
            found.append(compute(place))
        except RuntimeError as error:
            return f"on {place}: {error}"
    try:
        torch.testing.assert_close(*found, rtol=rtol, atol=atol)
    except AssertionError as error:
        return str(error)
    return None


def read_gradients(vae: VAE) -> dict[str, torch.Tensor]:
    return {name: value.grad.cpu() for name, value in vae.named_parameters()}  # type: ignore[union-attr]


def compare_objectives(device: str) -> dict[str, list[str]]:
    """Compute each objective's loss, terms and gradients in double precision on the CPU and on `device`."""
    errors: dict[str, list[str]] = {name: [] for name in OBJECTIVES}
    x, noise = torch.rand(6, 1, 12, 12).mul(255).round().div(255).double(), torch.randn(3, 6, 2).double()
    for name, network, likelihood in product(OBJECTIVES, NETWORKS, LIKELIHOODS):
        objective = build_objective(
            {"name": name, "k": 3, "num_train_images": 50, "kl_decomposition": True} | SETTINGS.get(name, {})
        )
        vae = VAE(network, HIDDEN[network], 2, "tanh", likelihood, [1, 12, 12]).double()

        def compute(place: str, vae: VAE = vae, objective: Any = objective) -> dict[str, torch.Tensor]:
            mine, given = deepcopy(vae).to(place), [t.to(place) for t in (x, noise, torch.tensor(0.5).double())]
            with no_synchronization(place):
                terms = objective(mine, *given)
                terms.loss.backward()
                sums = terms.batch_sums()
            return {key: value.cpu() for key, value in sums.items()} | read_gradients(mine)

        if difference := find_difference(compute, device, 1e-6, 1e-8):
            errors[name].append(f"{network}, {likelihood}: {difference}")
    return errors


def compare_priors(device: str) -> dict[str, list[str]]:
    """Compute the loss and its gradients, samples and moments under each prior, with labels where it takes them."""
    errors: dict[str, list[str]] = {name: [] for name in PRIORS}
    x, noise, labels = torch.rand(6, 1, 4, 4).double(), torch.randn(3, 6, 2).double(), torch.arange(6) % 3
    for name, objective, classes in product(PRIORS, ("elbo", "iwae", "dreg"), ("", "abc")):
        if name == "vamp" and classes:
            continue
        prior = {"name": name} | PRIOR_SETTINGS.get(name, {})
        vae = VAE("mlp", [8], 2, "tanh", "bernoulli", [1, 4, 4], prior, classes).double()
        for parameter in vae.parameters():
            torch.nn.init.normal_(parameter, std=0.3)

        def compute(place: str, vae: VAE = vae, objective: str = objective) -> list[Any]:
            mine, given = deepcopy(vae).to(place), labels.to(place)
            inputs = [t.to(place) for t in (x, noise, torch.tensor(0.5).double())]
            with no_synchronization(place):
                build_objective({"name": objective, "k": 3})(mine.given(given), *inputs).loss.backward()
            samples = mine.given(given).sample(6, generator=torch.Generator().manual_seed(1))
            moments = mine.given(given[:1]).prior.moments()
            return [read_gradients(mine), *(value.detach().cpu() for value in (samples, *moments))]

        if difference := find_difference(compute, device, 1e-5, 1e-6):
            errors[name].append(f"{objective}, classes={classes}: {difference}")
    return errors
