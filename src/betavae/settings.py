"""What each setting of a training run may be. To widen one (a new data set, network, ...), name it in its own table."""

import difflib

import torch
from omegaconf import DictConfig

from betavae.errors import UserError
from betavae.likelihoods import LIKELIHOODS
from betavae.networks import ACTIVATIONS, NETWORKS
from betavae.objectives import BETA_SCHEDULES, LR_DECAYS, OBJECTIVES
from betavae.rules import FLAG, NULL, TEXT, Rule, check, either, integer, list_of, matches, number, one_of

WIDTHS = Rule(list_of(integer(1)).holds, "a list of whole numbers from 1 up, such as [400] or [512,256]")
OPTIMIZERS = ["MuonAdam"] + [
    name
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type)
    and issubclass(cls, torch.optim.Optimizer)
    and name not in ("Optimizer", "SparseAdam")  # of no use for dense gradients
]
BATCHES = either(number(0, 1, above=True), integer(1))

RULES: dict[str, Rule] = {
    "beta": number(0),
    "seed": integer(0, 2**32 - 1),
    "init": one_of(["default", "data"]),
    "runs": TEXT,
    "resume": either(NULL, TEXT),
    "debug": FLAG,
    "name": Rule(lambda v: isinstance(v, str | int | float), "a text"),
    "model.network": one_of(NETWORKS),
    "model.hidden_dims": WIDTHS,
    "model.latent_dim": integer(1),
    "model.activation": one_of(ACTIVATIONS),
    "model.likelihood": one_of(LIKELIHOODS),
    "data.name": TEXT,
    "data.root": TEXT,
    "data.validation_size": integer(0),
    "data.batch_size": integer(1),
    "data.eval_batch_size": integer(1),
    "data.binarize": one_of(["none", "threshold", "dynamic"]),
    "objective.name": one_of(OBJECTIVES),
    "objective.k": integer(1),
    "objective.free_bits": number(0),
    "objective.resample": either(NULL, integer(1)),
    "beta_schedule.name": one_of(BETA_SCHEDULES),
    "beta_schedule.warmup": number(0, 1),
    "beta_schedule.cycles": integer(1),
    "beta_schedule.ramp": number(0, 1, above=True),
    "optimizer.name": one_of(OPTIMIZERS),
    "optimizer.lr": number(0, above=True),
    "lr_schedule.name": one_of(LR_DECAYS),
    "lr_schedule.warmup": number(0, 1),
    "callbacks.figures_every": integer(0),
    "callbacks.early_stopping_patience": either(NULL, integer(0)),
    "trainer.max_epochs": integer(1),
    "trainer.max_steps": either(integer(1), Rule(lambda v: v == -1, "-1")),
    "trainer.max_time": either(NULL, matches(r"\d\d:\d\d:\d\d:\d\d", "DD:HH:MM:SS")),
    "trainer.accelerator": one_of(["auto", "cpu", "gpu", "cuda", "mps"]),
    "trainer.devices": either(integer(1), list_of(integer(0)), one_of(["auto"]), Rule(lambda v: v == -1, "-1")),
    "trainer.num_nodes": integer(1),
    "trainer.strategy": TEXT,
    "trainer.precision": one_of(["32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true"]),
    "trainer.check_val_every_n_epoch": integer(1),
    "trainer.val_check_interval": BATCHES,
    "trainer.overfit_batches": either(number(0, 1), integer(0)),
    "trainer.deterministic": either(FLAG, one_of(["warn"])),
    "trainer.matmul_precision": one_of(["highest", "high", "medium"]),
    "trainer.steps_per_batch": integer(1),
    "trainer.compile": either(FLAG, one_of(["default", "reduce-overhead", "max-autotune"])),
    "trainer.gradient_clip_val": either(NULL, number(0)),
    "trainer.gradient_clip_algorithm": one_of(["norm", "value"]),
    "trainer.accumulate_grad_batches": integer(1),
    "trainer.limit_train_batches": BATCHES,
    "trainer.limit_val_batches": BATCHES,
    "trainer.limit_test_batches": BATCHES,
    "trainer.log_every_n_steps": integer(1),
    "trainer.enable_progress_bar": FLAG,
    "trainer.detect_anomaly": FLAG,
}
# The settings of these groups are the arguments of what `name` names, which `check_arguments` looks at.
FREE_GROUPS = ("model", "data", "objective", "beta_schedule", "optimizer", "lr_schedule")


def check_settings(cfg: DictConfig) -> None:
    """Raises UserError for a setting of a training run that is unknown, missing, or cannot be."""
    groups = {key.split(".")[0] for key in RULES if "." in key}
    known = groups | set(RULES)
    keys = [str(key) for key in cfg]
    for group in sorted(groups & set(keys)):
        if not isinstance(cfg._get_node(group), DictConfig) or cfg[group] is None:
            raise UserError(f"{group} must be a group of settings, and is {cfg[group]}")
        if group not in (*FREE_GROUPS, "trainer"):
            keys += [f"{group}.{key}" for key in cfg[group]]
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"{key} is not a setting" + (f"; did you mean {close[0]}?" if close else ""))
    for key in sorted(known):
        group, _, name = key.rpartition(".")
        needed = group not in FREE_GROUPS or (name == "name" and group != "model") or key == "objective.k"
        if needed and name not in (cfg[group] if group else cfg):
            raise UserError(f"{key} is missing")
    from betavae.data import DATASETS  # here, since the scripts that need no data need not import Lightning

    check(cfg, RULES | {"data.name": one_of(DATASETS)})
