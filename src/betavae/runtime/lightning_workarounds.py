"""Workarounds of Lightning, each with its cost and the version in which it was seen."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.profilers import PassThroughProfiler


class NoProfiler(PassThroughProfiler):
    """A profiler that returns one shared context.

    Lightning's default creates a generator for each of the 42 actions of a step: 4 % of an epoch with trainer=fast
    (2.6).
    """

    context = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        """Return a context that does nothing."""
        return self.context


def cluster_plugins() -> list[Any]:
    """Return the Slurm plugin without requeueing.

    Lightning would requeue the job itself, and restart all jobs of its folder from this one's checkpoint (2.6).
    """
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def patch_trainer(trainer: L.Trainer) -> None:
    """Change what no argument of the Trainer changes."""
    # With max_steps, Lightning counts the epoch twice from whose end a run is resumed (2.6).
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
    if isinstance(trainer.precision_plugin, HalfPrecision):
        # Lightning rounds images to the type of the weights, and bytes are no longer bytes to the likelihood (2.6). The
        # encoder takes them in single precision.
        trainer.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]
    if not torch.cuda.is_available():
        # Lightning makes torch ask NVML, and an optimizer asks at each step: without a GPU that is a search for a
        # missing library, 3 % of an epoch with trainer=fast (2.6, torch 2.14).
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"


def stop_after_this_step(trainer: L.Trainer) -> None:
    """End the loop between two steps, with everything counted, as for SIGTERM.

    Lightning 2.6 has no public way to do so.
    """
    trainer._signal_connector.received_sigterm = True
