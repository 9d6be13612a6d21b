"""Optimizer steps as CUDA graphs, for networks whose kernels take less time to run than to launch."""

from typing import Any

import torch
from torch import Tensor

from betavae.models.precision import at_least_float32
from betavae.module import VAEModule

WARMUP_STEPS = 3
STEPS_PER_GRAPH = 10


class CUDAGraphSteps:
    """Optimizer steps of `module` on the parts of a batch: draw noise, loss, gradients, clip, update.

    The first `WARMUP_STEPS` steps run eagerly, as does a part of another size (the last of an epoch). They are steps
    like any other; they also compile, choose kernels and allocate the optimizer's state. Then `STEPS_PER_GRAPH` steps
    are captured as one graph, and a single step as another for the remainder; both are replayed from then on.
    Images, betas and learning rates are inputs of the graphs; random numbers continue the device's generator, as in
    eager steps. Lightning's hooks inside a step are not called.
    """

    def __init__(self, module: VAEModule):
        self.module = module
        self.warmup_steps = 0
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pending: list[tuple[Tensor, float, float]] = []  # images, beta and learning rate of steps to be replayed
        self.stream: torch.cuda.Stream | None = None

    def allocate(self, x: Tensor) -> None:
        """Allocate the inputs and outputs of the graphs for batches like `x`."""
        module, device = self.module, self.module.device
        self.optimizer: Any = module.optimizers(use_pl_optimizer=False)
        self.scheduler: Any = module.lr_schedulers()
        self.stream = torch.cuda.Stream(device)
        dtype = at_least_float32(next(module.parameters()).detach()).dtype
        self.x = x.new_zeros(STEPS_PER_GRAPH, module.batch_size, *x.shape[1:])
        self.betas = [GraphInput(device, x.dtype) for _ in range(STEPS_PER_GRAPH)]
        self.lrs = [GraphInput(device, torch.float32) for _ in range(STEPS_PER_GRAPH)]  # the dtype of fused kernels
        # The terms of each replayed step of a call, and the index of the next row; a replay writes both.
        self.names: list[str] = []
        self.rows = torch.empty(module.steps_per_batch, 0, dtype=dtype, device=device)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)

    def __call__(self, x: Tensor) -> None:
        """Take a step on each part of the batch, and add their terms to `module.window`."""
        if self.stream is None:
            self.allocate(x)
        module, results = self.module, list[tuple[dict[str, Tensor] | None, int]]()
        progress = module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        for part in x.split(module.batch_size):
            progress.increment_ready()
            results.append((self.step(part, module.current_beta(), self.optimizer.param_groups[0]["lr"]), len(part)))
            progress.increment_completed()
            if self.scheduler is not None:
                self.scheduler.step()
            if module.global_step == module.trainer.max_steps:
                break
        self.replay()
        rows = iter(self.rows.clone().unbind())
        self.row.zero_()
        for sums, images in results:
            module.window.add(sums or dict(zip(self.names, next(rows).unbind(), strict=True)), images)

    def step(self, x: Tensor, beta: float, lr: float) -> dict[str, Tensor] | None:
        """Take a step eagerly and return its terms, or queue it for replay and return None."""
        if len(x) == self.module.batch_size and self.warmup_steps == WARMUP_STEPS:
            self.pending.append((x, beta, lr))
            if len(self.pending) == STEPS_PER_GRAPH:
                self.replay()
            return None
        self.replay()
        self.warmup_steps = min(self.warmup_steps + 1, WARMUP_STEPS)
        self.betas[0].set(beta)
        self.lrs[0].set(lr)
        # On the capture stream, as torch requires for the warm-up.
        self.stream.wait_stream(torch.cuda.current_stream())  # type: ignore[union-attr]
        with torch.cuda.stream(self.stream):
            sums = self.compute(x, self.betas[0].value, self.lrs[0].value)
        torch.cuda.current_stream().wait_stream(self.stream)  # type: ignore[arg-type]
        self.names = list(sums)
        return sums

    def compute(self, x: Tensor, beta: Tensor, lr: Tensor) -> dict[str, Tensor]:
        """Compute one step from inputs on the device, and return its terms."""
        module, group = self.module, self.optimizer.param_groups[0]
        noise = torch.randn(module.k, len(x), module.vae.latent_dim, dtype=x.dtype, device=x.device)
        loss, sums = module.loss(x, None, noise, beta)
        self.optimizer.zero_grad()
        loss.backward()
        if module.clip:
            module.clip_gradients(self.optimizer, module.clip, module.clip_algorithm)
        # Only during this call: the scheduler and checkpoints store the learning rate as a number.
        saved = {key: group[key] for key in ("lr", "capturable")}
        group |= {"lr": lr, "capturable": True}
        self.optimizer.step()
        group |= saved
        return sums

    def replay(self) -> None:
        """Take the pending steps."""
        while self.pending:
            length = STEPS_PER_GRAPH if len(self.pending) == STEPS_PER_GRAPH else 1
            parts, betas, lrs = zip(*self.pending[:length], strict=True)
            torch.stack(parts, out=self.x[:length])
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
            for x, beta, lr in zip(self.x[:length], self.betas, self.lrs, strict=False):
                sums = self.compute(x, beta.value, lr.value)
                self.rows.index_copy_(0, self.row, torch.stack(list(sums.values())).to(self.rows).unsqueeze(0))
                self.row.add_(1)
        return graph


class GraphInput:
    """A number on the device, written only when it changes."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.value, self.number = torch.zeros((), dtype=dtype, device=device), 0.0

    def set(self, number: float) -> None:
        """Write the number if it differs from the last one."""
        if number != self.number:
            self.number = number
            self.value.fill_(number)
