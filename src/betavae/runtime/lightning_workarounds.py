"""Every workaround of Lightning, each with what it costs to do without and the version in which that was seen."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.profilers import PassThroughProfiler

from betavae.data.loader import BatchLoader
from betavae.models.networks import ConvEncoder, ResNetEncoder
from betavae.module import VAEModule
from betavae.runtime.cuda_graph import CUDAGraphSteps


class MultiStepModule(VAEModule):
    """`VAEModule` as train.py runs it: `per_call` optimiser steps in each call that Lightning makes."""

    steps_per_call = 1
    accumulate = 1  # batches for each of them
    clip: tuple[float | None, str] = (None, "norm")
    in_cuda_graph = False
    cuda_graph: CUDAGraphSteps | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the running hook's name here 40 times a step by nn.Module's slow way of setting an attribute,
        # made for parameters: a twentieth of a step (2.6).
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def enable_multi_step(self, per_call: int, accumulate: int, clip: float | None, algorithm: str) -> None:
        """Lightning's own work for a call takes a third of the time of a compiled step (2.6); this shares it."""
        self.automatic_optimization = False
        self.steps_per_call, self.accumulate, self.clip = per_call, accumulate, (clip, algorithm)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        if self.in_cuda_graph:
            if self.cuda_graph is None:
                batches = self.trainer.train_dataloader.batches  # type: ignore[union-attr]
                self.cuda_graph = CUDAGraphSteps(self, batches, self.steps_per_call, self.clip)
            return {"sums": self.cuda_graph.run(batch)}
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        sums = []
        for first in batch:
            for number, one in enumerate(itertools.chain([first], itertools.islice(batch, self.accumulate - 1))):
                if (one[0].device, one[0].dtype) != (self.device, self.dtype):
                    # Lightning does this for a batch, and this was one of several.
                    one = self.trainer.strategy.batch_to_device(self.trainer.precision_plugin.convert_input(one))
                output = super().training_step(one, batch_idx)
                if number == 0:
                    optimizer.zero_grad()  # here, as Lightning does: the new gradients get the memory of the old
                self.manual_backward(output["loss"] / self.accumulate)
                sums += output["sums"]
            if self.clip[0]:
                self.clip_gradients(optimizer, *self.clip)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if self.global_step == self.trainer.max_steps:
                break
        return {"sums": sums}

    def count_steps(self) -> float:
        if self.automatic_optimization:
            return super().count_steps()
        self.trainer.estimated_stepping_batches  # noqa: B018 - sets the loader up
        calls = self.trainer.num_training_batches
        groups: Any = self.trainer.train_dataloader
        steps = min(-(-len(groups.batches) // self.accumulate), calls * self.steps_per_call) * (
            self.trainer.max_epochs or 1
        )
        return min(steps, self.trainer.max_steps) if self.trainer.max_steps > 0 else steps


class BatchGroups:
    """`size` batches at a time, each made when its turn comes; or only their indices."""

    def __init__(self, batches: BatchLoader, size: int, only_indices: bool):
        self.batches, self.size, self.only_indices = batches, size, only_indices

    def __len__(self) -> int:
        return -(-len(self.batches) // self.size)

    def __iter__(self) -> Iterator[Iterator[Any]]:
        batches: Iterator[Any] = self.batches.indices() if self.only_indices else iter(self.batches)
        for first in batches:
            yield itertools.chain([first], itertools.islice(batches, self.size - 1))

    def state_dict(self) -> dict[str, int]:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches.load_state_dict(state)


def group_batches(loader: Callable[[], BatchLoader], size: int, only_indices: bool) -> Callable[[], BatchGroups]:
    return lambda: BatchGroups(loader(), size, only_indices)


JOBS_PER_COMPILE_CACHE = 32
compiled_jobs = itertools.count(1)  # of this process


def compile_loss(module: VAEModule, mode: str | None) -> None:
    """torch.compile what a training step computes; evaluation and the checkpoint's keys stay as they are.

    The jobs of a sweep in one process share compiled code where their structure is the same.
    """
    # By default torch keeps 8 graphs of one function and runs everything else uncompiled: from the fifth structure on,
    # since each has one graph for whole batches and one for the last batch of an epoch.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit  # 256
    if next(compiled_jobs) % JOBS_PER_COMPILE_CACHE == 0:
        torch.compiler.reset()
    # Else each compiled convolution in bfloat16 turns its images around first: a quarter of a step (torch 2.15, CPU).
    # Not for networks of a user's own, and LBFGS, which may ask for views that this layout does not have.
    if type(module.vae.encoder) in (ConvEncoder, ResNetEncoder) and module.hparams["optimizer"]["name"] != "LBFGS":
        module.to(memory_format=torch.channels_last)
    compiled = torch.compile(module.loss, mode=mode, dynamic=False)
    if mode not in ("reduce-overhead", "max-autotune"):
        module.loss = compiled  # type: ignore[method-assign]
        return

    def loss(*args: Any) -> Any:
        value, sums = compiled(*args)
        return value, {name: total.clone() for name, total in sums.items()}  # the next replay of a graph writes over it

    module.loss = loss  # type: ignore[method-assign,assignment]


class NoProfiler(PassThroughProfiler):
    """Lightning's own makes a generator for each of 42 actions of a step: a seventieth of the step's time (2.6)."""

    nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return self.nothing


def cluster_plugins() -> list[Any]:
    # Or it would queue a job again itself, and restart all jobs of its folder from this one's checkpoint (2.6).
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def patch_trainer(trainer: L.Trainer) -> None:
    # With max_steps, it would count the epoch twice from whose end a run goes on (2.6).
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
    if isinstance(trainer.precision_plugin, HalfPrecision):
        # It would round images to the weights' type, and bytes are no longer bytes to the likelihood (2.6). The encoder
        # takes them in single precision.
        trainer.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]
    if not torch.cuda.is_available():
        # Lightning has torch ask NVML, and an optimiser asks at each step: without a GPU that is a search for a library
        # that is not there, a twentieth of a step (2.6, torch 2.15).
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"


def stop_after_this_step(trainer: L.Trainer) -> None:
    """The loop ends as for SIGTERM, between two steps, with everything counted: there is no public way (2.6)."""
    trainer._signal_connector.received_sigterm = True
