"""Check before a run if it will validate and which validation metrics it will have.

Torch is imported late.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from betavae.errors import UserError
from betavae.runtime.settings import Config, suggest

if TYPE_CHECKING:
    from betavae.data.image_set import ImageSet
    from betavae.data.scaling import Scaling
    from betavae.module import VAEModule

METRICS = ("loss", "recon", "kl", "neg_elbo", "active_units")  # of every validation; an objective may add terms
DEFAULTS = {"monitor": "neg_elbo", "early_stopping_patience": None}  # callbacks.KEY that need no validation


def limit_batches(batches: int, key: str, limit: float) -> int:
    """Return the number of batches that Lightning takes with a limit.

    The limit is a count or a share of the batches.

    Raises:
        UserError: If no batch is left.
    """
    count = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if batches and not count:
        raise UserError(f"trainer.{key}={limit} is invalid: expected a larger share, this is none of {batches} batches")
    return count


def count_batches(settings: Config, sets: Mapping[str, "ImageSet"], processes: int) -> tuple[dict[str, int], int]:
    """Count the batches in an epoch of each split, and the optimizer steps of a training epoch.

    The batches are counted as Lightning counts them.

    Raises UserError for limits that leave none, and for `val_check_interval` beyond the training batches.
    """
    trainer, data = settings["trainer"], settings["data"]
    together, accumulate = trainer["steps_per_batch"], trainer["accumulate_grad_batches"]
    single = -(-(len(sets["train"]) // processes) // data["batch_size"])
    found = {"train": -(-single // (together * accumulate)) if together > 1 else single}
    found |= {split: -(-len(sets[split]) // (processes * data["eval_batch_size"])) for split in ("validation", "test")}
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        overfits = trainer["overfit_batches"] and split != "test"
        key = "overfit_batches" if overfits else f"limit_{name}_batches"
        found[split] = limit_batches(found[split], key, trainer[key])
    interval = trainer["val_check_interval"]
    if isinstance(interval, int) and interval > found["train"] and found["validation"]:
        hint = f" (of {together} steps each, by trainer.steps_per_batch)" if together > 1 else ""
        most = f"at most {found['train']}, the training batches of an epoch{hint}"
        raise UserError(f"trainer.val_check_interval={interval} is invalid: expected {most}")
    steps = -(-single // accumulate)
    return found, min(steps, found["train"] * together) if together > 1 else -(-found["train"] // accumulate)


def never_validates(settings: Config, sets: Mapping[str, "ImageSet"] | None, processes: int = 1) -> str | None:
    """Return the reason why a run will not validate, or None.

    Args:
        settings: Those of `TrainConfig`.
        sets: The images by split; without them, only the reasons that need none are checked.
        processes: The number of processes of the run.
    """
    trainer = settings["trainer"]
    if trainer.get("fast_dev_run"):
        return "trainer.fast_dev_run saves no checkpoint"
    every, epochs, most = (trainer[key] for key in ("check_val_every_n_epoch", "max_epochs", "max_steps"))
    if every > epochs:
        return f"trainer.check_val_every_n_epoch={every} is above trainer.max_epochs={epochs}"
    if sets is None:
        return None
    batches, steps = count_batches(settings, sets, processes)
    if not batches["validation"]:
        return "data.validation_size=0 leaves no validation images"
    # The batch that is followed by the first validation, and the steps before it.
    interval, together = trainer["val_check_interval"], trainer["steps_per_batch"]
    batch = interval if isinstance(interval, int) else max(1, int(batches["train"] * interval))
    before = (batch - 1) * together if together > 1 else (batch - 1) // trainer["accumulate_grad_batches"]
    before += (every - 1) * steps
    if 0 < most <= before:
        return f"trainer.max_steps={most} ends it before the first validation, which {before + 1} steps would reach"
    return None


def check_validation(settings: Config, sets: Mapping[str, "ImageSet"], module: "VAEModule", processes: int) -> None:
    """Raise UserError if settings of callbacks need validation metrics that a run will not have."""
    wanted = settings["callbacks"]
    if settings["trainer"].get("fast_dev_run"):
        return
    why = never_validates(settings, sets, processes)
    for key, default in DEFAULTS.items():
        if why and wanted[key] != default:
            raise UserError(f"callbacks.{key}={wanted[key]} is invalid: this run never validates ({why})")
    if not why:
        check_names("callbacks.monitor", [wanted["monitor"]], METRICS, settings, lambda: (sets["validation"], module))


def check_likelihood(name: str, support: str, scaling: "Scaling") -> None:
    """Raise UserError if a likelihood is not made for values scaled in this way.

    Args:
        name: The setting `model.likelihood`.
        support: As `Likelihood.support`.
        scaling: The scaling of the training data.
    """
    if support == "bytes / 255" and not scaling.is_bytes:
        found = f"{scaling.dtype} with data.scaling={scaling.mode}"
        remedy = "data.scaling=unit" if scaling.dtype == "uint8" else "images of type uint8 with data.scaling=unit"
        needs = "images of 8 bits"
    elif support == "[0, 1]" and not scaling.is_unit_interval:
        needs, found, remedy = "values in [0, 1]", f"data.scaling={scaling.mode}", "data.scaling=minmax"
    else:
        return
    raise UserError(
        f"model.likelihood={name} is invalid: it needs {needs} (found {found}, with stored values from "
        f"{scaling.low:.6g} to {scaling.high:.6g}); pass {remedy}, or model.likelihood=gaussian or laplace"
    )


def check_names(
    key: str,
    names: Sequence[str],
    known: Sequence[str],
    settings: Config,
    build: Callable[[], tuple["ImageSet", "VAEModule"]],
) -> None:
    """Raise UserError for a name that is neither `known` nor a term of the objective.

    The terms are found with the validation images and the module that `build` returns. With custom callbacks, which may
    log other metrics, all names are accepted.
    """
    if settings["callbacks"]["custom"] or set(names) <= set(known):
        return
    known = list(dict.fromkeys((*known, *objective_terms(*build()))))
    for name in names:
        if name not in known:
            raise UserError(f"{key}={name} is invalid: expected one of {', '.join(known)}{suggest(name, known)}")


def objective_terms(images: "ImageSet", module: "VAEModule") -> list[str]:
    """Return the names of the terms of a module's objective, from its value for two gray images."""
    import torch

    from betavae.runtime.callbacks import evaluating

    x = torch.full((min(2, len(images)), *images.pixels.shape[1:]), 0.5)
    noise = torch.zeros(module.k, len(x), module.vae.latent_dim)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(module.vae):
        return list(module.objective(module.vae.given(images.labels[: len(x)]), x, noise, module.beta).batch_sums())
