"""torch.compile for the training step."""

import itertools
from typing import Any

import torch

from betavae.models.networks import ConvEncoder, ResNetEncoder
from betavae.module import VAEModule

JOBS_PER_COMPILE_CACHE = 32
compiled_jobs = itertools.count(1)  # of this process


def compile_loss(module: VAEModule, mode: str | None) -> None:
    """Compile `module.loss`; evaluation and the checkpoint's keys stay as they are.

    Jobs of a sweep in one process share compiled code if their structure is the same.
    """
    # By default torch keeps 8 graphs per function and runs everything else uncompiled: from the fifth structure on,
    # because each has one graph for whole batches and one for the last batch of an epoch.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit  # 256
    if next(compiled_jobs) % JOBS_PER_COMPILE_CACHE == 0:
        torch.compiler.reset()
    # Without this layout each compiled convolution in bfloat16 transposes its images first: a quarter of a step (torch
    # 2.15, CPU). Custom networks, and LBFGS, may ask for views that it does not have.
    if type(module.vae.encoder) in (ConvEncoder, ResNetEncoder) and module.hparams["optimizer"]["name"] != "LBFGS":
        module.to(memory_format=torch.channels_last)
    compiled = torch.compile(module.loss, mode=mode, dynamic=False)
    if mode not in ("reduce-overhead", "max-autotune"):
        module.loss = compiled  # type: ignore[method-assign]
        return

    def loss(*args: Any) -> Any:
        value, sums = compiled(*args)
        return value, {name: total.clone() for name, total in sums.items()}  # the next replay of a graph overwrites it

    module.loss = loss  # type: ignore[method-assign,assignment]
