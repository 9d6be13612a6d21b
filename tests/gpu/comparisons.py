"""Compute the same numbers on two devices."""

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
HIDDEN = {"mlp": [8], "conv": [2, 3], "resnet": [4, 8]}


def forbid_synchronization(forbid: bool) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error" if forbid else "default")


def compare_objectives(device: str) -> dict[str, list[str]]:
    """Compute each objective's loss, terms and gradients in double precision on the CPU and on `device`."""
    errors: dict[str, list[str]] = {name: [] for name in OBJECTIVES}
    x, noise = torch.rand(6, 1, 12, 12).mul(255).round().div(255).double(), torch.randn(3, 6, 2).double()
    for name, network, likelihood in product(OBJECTIVES, NETWORKS, LIKELIHOODS):
        objective = build_objective(
            {"name": name, "k": 3, "num_train_images": 50, "kl_decomposition": True} | SETTINGS.get(name, {})
        )
        vae = VAE(network, HIDDEN[network], 2, "tanh", likelihood, [1, 12, 12]).double()
        found = []
        for place in ("cpu", device):
            mine, given = deepcopy(vae).to(place), [t.to(place) for t in (x, noise, torch.tensor(0.5).double())]
            forbid_synchronization(place == "cuda")
            try:
                terms = objective(mine, *given)
                terms.loss.backward()
                sums = terms.batch_sums()
            except RuntimeError as error:
                errors[name].append(f"{network}, {likelihood} on {place}: {error}")
                break
            finally:
                forbid_synchronization(False)
            gradients = {key: value.grad for key, value in mine.named_parameters()}
            found.append({key: value.cpu() for key, value in (sums | gradients).items()})
        else:
            try:
                torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)
            except AssertionError as error:
                errors[name].append(f"{network}, {likelihood}: {error}")
    return errors


def compare_priors(device: str) -> dict[str, list[str]]:
    """Compute the loss and its gradients, samples and moments under each prior, with labels where it takes them."""
    errors: dict[str, list[str]] = {name: [] for name in PRIORS}
    x, noise, labels = torch.rand(6, 1, 4, 4).double(), torch.randn(3, 6, 2).double(), torch.arange(6) % 3
    more: dict[str, dict[str, Any]] = {"mixture": {"components": 4}, "vamp": {"components": 4}}
    more["flow"] = {"transforms": 2, "hidden_dims": [8]}
    for name, objective, classes in product(PRIORS, ("elbo", "iwae", "dreg"), ("", "abc")):
        if name == "vamp" and classes:
            continue
        vae = VAE("mlp", [8], 2, "tanh", "bernoulli", [1, 4, 4], {"name": name} | more.get(name, {}), classes).double()
        for parameter in vae.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        found = []
        for place in ("cpu", device):
            model, given = deepcopy(vae).to(place), labels.to(place)
            inputs = [t.to(place) for t in (x, noise, torch.tensor(0.5).double())]
            forbid_synchronization(place == "cuda")
            try:
                build_objective({"name": objective, "k": 3})(model.given(given), *inputs).loss.backward()
            except RuntimeError as error:
                errors[name].append(f"{objective} on {place}: {error}")
                break
            finally:
                forbid_synchronization(False)
            view = model.given(given)
            samples = (
                view.sample(6, generator=torch.Generator().manual_seed(1)),
                *model.given(given[:1]).prior.moments(),
            )
            gradients = {key: value.grad.cpu() for key, value in model.named_parameters() if value.grad is not None}
            found.append([gradients, *(value.detach().cpu() for value in samples)])
        else:
            try:
                torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
            except AssertionError as error:
                errors[name].append(f"{objective}, classes={classes}: {error}")
    return errors
