"""One CUDA graph for a whole optimizer step, for networks whose kernels run shorter than they take to launch."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from betavae.data.batches import Batches
from betavae.module import VAEModule

WARMUP_STEPS = 3


class CUDAGraphStep:
    """Optimizer steps of `module`, at most `capacity` per `run`: gather, draw noise, loss, gradients, clip, update.

    The first `WARMUP_STEPS` steps run eagerly, as does a batch of another size (the last of an epoch). They are steps
    like any other: they also compile, choose kernels and allocate the optimizer's state. The next step is captured, and
    replayed from then on. Learning rate and beta are inputs of the graph, and so is the batch's index; its random
    numbers continue the device's generator, as eager steps do. Lightning's hooks inside a step are not called.
    """

    def __init__(self, module: VAEModule, batches: Batches, capacity: int, clip: tuple[float | None, str]):
        optimizer: Any = module.optimizers(use_pl_optimizer=False)
        self.module, self.batches, self.optimizer, self.clip = module, batches, optimizer, clip
        self.scheduler: Any = module.lr_schedulers()
        device = module.device
        self.stream = torch.cuda.Stream(device)
        self.warmup_steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.index = torch.zeros(batches.batch_size, dtype=torch.int64, device=device)
        self.beta, self.lr = (Input(device) for _ in range(2))
        # The terms of each replay of a `run`, and the number of the next row: a replay writes both on the device.
        self.row, self.rows = torch.zeros(1, dtype=torch.int64, device=device), torch.empty(0)
        self.capacity, self.names = capacity, list[str]()

    def run(self, indices: Iterable[Tensor]) -> list[tuple[dict[str, Tensor], int]]:
        """Take a step for the images at each of `indices` and return the terms of each, summed over its images."""
        module, results = self.module, []
        progress = module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        for index in indices:
            progress.increment_ready()
            self.beta.set(module.current_beta())
            sums = self.replay(index) if len(index) == len(self.index) else self.eager(index)
            progress.increment_completed()
            if self.scheduler is not None:
                self.scheduler.step()
            results.append((sums, len(index)))
            if module.global_step == module.trainer.max_steps:
                break
        rows = iter(self.rows.clone().unbind())
        self.row.zero_()
        return [(sums or dict(zip(self.names, next(rows).unbind(), strict=True)), n) for sums, n in results]

    def replay(self, index: Tensor) -> dict[str, Tensor] | None:
        """Take a step by the graph; its terms are in `rows`. Before there is one, take it eagerly."""
        if self.warmup_steps < WARMUP_STEPS:
            self.warmup_steps += 1
            return self.eager(index)
        self.index.copy_(index)
        self.lr.set(self.optimizer.param_groups[0]["lr"])
        if self.graph is None:
            self.graph = self.capture()
        self.graph.replay()
        return None

    def eager(self, index: Tensor) -> dict[str, Tensor]:
        # On the stream of the capture, as torch asks of a warm-up.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            sums = self.step(index)
        torch.cuda.current_stream().wait_stream(self.stream)
        self.names = list(sums)
        return sums

    def step(self, index: Tensor) -> dict[str, Tensor]:
        module = self.module
        x = module.trainer.precision_plugin.convert_input(self.batches.batch(index)[0])
        noise = torch.randn(module.k, len(x), module.vae.latent_dim, device=x.device)
        loss, sums = module.loss(x, noise, self.beta.value)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip[0]:
            module.clip_gradients(self.optimizer, *self.clip)
        self.optimizer.step()
        return sums

    def capture(self) -> torch.cuda.CUDAGraph:
        """Record a step without running it."""
        graph = torch.cuda.CUDAGraph()
        group = self.optimizer.param_groups[0]
        as_they_are = {key: group[key] for key in ("lr", "capturable")}
        self.optimizer.zero_grad()  # so that the gradients get memory of the graph
        weights = next(self.module.parameters()).dtype
        dtype = torch.promote_types(weights, torch.float32)
        self.rows = torch.empty(self.capacity, len(self.names), dtype=dtype, device=self.row.device)
        group |= {"lr": self.lr.value, "capturable": True}
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            sums = self.step(self.index)
            self.rows.index_copy_(0, self.row, torch.stack(list(sums.values())).to(self.rows).unsqueeze(0))
            self.row.add_(1)
        group |= as_they_are
        return graph


class Input:
    """A number on the device, written only when it changes."""

    def __init__(self, device: torch.device):
        self.value, self.number = torch.zeros((), device=device), 0.0

    def set(self, number: float) -> None:
        if number != self.number:
            self.number = number
            self.value.fill_(number)
