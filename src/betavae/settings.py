"""What each setting of a training run may be. To widen one (a new data set, network, ...), name it in its own table."""

import torch

from betavae.data import DATASETS
from betavae.likelihoods import LIKELIHOODS
from betavae.networks import ACTIVATIONS, NETWORKS
from betavae.objectives import BETA_SCHEDULES, LR_DECAYS, OBJECTIVES
from betavae.rules import FLAG, NULL, TEXT, Rule, either, integer, number, one_of

WIDTHS = Rule(
    lambda v: isinstance(v, list) and bool(v) and all(integer(1).holds(width) for width in v),
    "a list of whole numbers from 1 up, such as [400] or [512,256]",
)
OPTIMIZERS = ["MuonAdam"] + [
    name
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name != "Optimizer"
]
BATCHES = either(number(0, 1), integer(1))

RULES: dict[str, Rule] = {
    "beta": number(0),
    "seed": integer(0, 2**32 - 1),
    "init": one_of(["default", "data"]),
    "name": Rule(lambda v: isinstance(v, str | int | float), "a text"),
    "model.network": one_of(NETWORKS),
    "model.hidden_dims": WIDTHS,
    "model.latent_dim": integer(1),
    "model.activation": one_of(ACTIVATIONS),
    "model.likelihood": one_of(LIKELIHOODS),
    "data.name": one_of(DATASETS),
    "data.root": TEXT,
    "data.validation_size": integer(0),
    "data.batch_size": integer(1),
    "data.eval_batch_size": integer(1),
    "data.binarize": one_of(["none", "threshold", "dynamic"]),
    "objective.name": one_of(OBJECTIVES),
    "objective.k": integer(1),
    "objective.free_bits": number(0),
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
    "trainer.matmul_precision": one_of(["highest", "high", "medium"]),
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
