"""Optimizer steps as CUDA graphs, for networks whose kernels run shorter than they take to launch."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from betavae.data.loader import BatchLoader
from betavae.models.precision import at_least_float32
from betavae.module import VAEModule

WARMUP_STEPS = 3
STEPS_PER_GRAPH = 10


class CUDAGraphSteps:
    """Optimizer steps of `module`, at most `capacity` per `run`: gather, draw noise, loss, gradients, clip, update.

    The first `WARMUP_STEPS` steps run eagerly, as does a batch of another size (the last of an epoch). They are steps
    like any other: they also compile, choose kernels and allocate the optimizer's state. Then `STEPS_PER_GRAPH` steps
    are captured as one graph, a single step as another for those left over, and both are replayed from then on.
    Indices, betas and learning rates are inputs of the graphs; random numbers continue the device's generator, as in
    eager steps. Lightning's hooks inside a step are not called.
    """

    def __init__(self, module: VAEModule, batches: BatchLoader, capacity: int, clip: tuple[float | None, str]):
        optimizer: Any = module.optimizers(use_pl_optimizer=False)
        self.module, self.batches, self.optimizer, self.clip = module, batches, optimizer, clip
        self.scheduler: Any = module.lr_schedulers()
        self.warmup_steps = 0
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pending: list[tuple[Tensor, float, float]] = []  # index, beta and learning rate of steps to be replayed
        device, dtype = module.device, at_least_float32(next(module.parameters()).detach()).dtype
        self.stream = torch.cuda.Stream(device)
        self.index = torch.zeros(STEPS_PER_GRAPH, batches.batch_size, dtype=torch.int64, device=device)
        self.betas = [Input(device, dtype) for _ in range(STEPS_PER_GRAPH)]
        self.lrs = [Input(device, torch.float32) for _ in range(STEPS_PER_GRAPH)]  # the dtype of torch's fused kernels
        # The terms of each replayed step of a `run`, and the number of the next row: a replay writes both.
        self.names: list[str] = []
        self.rows = torch.empty(capacity, 0, dtype=dtype, device=device)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)

    def run(self, indices: Iterable[Tensor]) -> list[tuple[dict[str, Tensor], int]]:
        """Take a step for the images at each of `indices`. Returns the terms of each, summed over its images."""
        module, results = self.module, list[tuple[dict[str, Tensor] | None, int]]()
        progress = module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        for index in indices:
            progress.increment_ready()
            results.append((self.step(index, module.current_beta(), self.optimizer.param_groups[0]["lr"]), len(index)))
            progress.increment_completed()
            if self.scheduler is not None:
                self.scheduler.step()
            if module.global_step == module.trainer.max_steps:
                break
        self.replay()
        rows = iter(self.rows.clone().unbind())
        self.row.zero_()
        return [(sums or dict(zip(self.names, next(rows).unbind(), strict=True)), n) for sums, n in results]

    def step(self, index: Tensor, beta: float, lr: float) -> dict[str, Tensor] | None:
        """Take a step eagerly and return its terms, or have it replayed and return None."""
        if len(index) == self.index.shape[1] and self.warmup_steps == WARMUP_STEPS:
            self.pending.append((index, beta, lr))
            if len(self.pending) == STEPS_PER_GRAPH:
                self.replay()
            return None
        self.replay()
        self.warmup_steps = min(self.warmup_steps + 1, WARMUP_STEPS)
        self.betas[0].set(beta)
        self.lrs[0].set(lr)
        # On the stream of the capture, as torch asks of a warm-up.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            sums = self.compute(index, self.betas[0].value, self.lrs[0].value)
        torch.cuda.current_stream().wait_stream(self.stream)
        self.names = list(sums)
        return sums

    def compute(self, index: Tensor, beta: Tensor, lr: Tensor) -> dict[str, Tensor]:
        module, group = self.module, self.optimizer.param_groups[0]
        x = module.trainer.precision_plugin.convert_input(self.batches.batch(index)[0])
        noise = torch.randn(module.k, len(x), module.vae.latent_dim, dtype=x.dtype, device=x.device)
        loss, sums = module.loss(x, noise, beta)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip[0]:
            module.clip_gradients(self.optimizer, *self.clip)
        # Only for this call: the scheduler and checkpoints know the learning rate as a number.
        saved = {key: group[key] for key in ("lr", "capturable")}
        group |= {"lr": lr, "capturable": True}
        self.optimizer.step()
        group |= saved
        return sums

    def replay(self) -> None:
        """Take the pending steps."""
        while self.pending:
            length = STEPS_PER_GRAPH if len(self.pending) == STEPS_PER_GRAPH else 1
            indices, betas, lrs = zip(*self.pending[:length], strict=True)
            torch.stack(indices, out=self.index[:length])
            for number in range(length):
                self.betas[number].set(betas[number])
                self.lrs[number].set(lrs[number])
            if length not in self.graphs:
                self.graphs[length] = self.capture(length)
            self.graphs[length].replay()
            del self.pending[:length]

    def capture(self, length: int) -> torch.cuda.CUDAGraph:
        """Record steps without running them."""
        graph = torch.cuda.CUDAGraph()
        if not self.graphs:
            self.rows = self.rows.new_empty(len(self.rows), len(self.names))
        self.optimizer.zero_grad()  # so that the gradients get memory of the graph
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            for index, beta, lr in zip(self.index[:length], self.betas, self.lrs, strict=False):
                sums = self.compute(index, beta.value, lr.value)
                self.rows.index_copy_(0, self.row, torch.stack(list(sums.values())).to(self.rows).unsqueeze(0))
                self.row.add_(1)
        return graph


class Input:
    """A number on the device, written only when it changes."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.value, self.number = torch.zeros((), dtype=dtype, device=device), 0.0

    def set(self, number: float) -> None:
        if number != self.number:
            self.number = number
            self.value.fill_(number)
