"""Quicker roads to the same numbers on a CPU; `tests/unit/models/test_cpu_kernels.py` holds each against the plain formula it replaces."""

from typing import Any

import torch
from torch import Tensor, nn

from betavae.models.likelihoods import IMAGE_DIMS, Bernoulli
from betavae.models.precision import at_least_float32
from betavae.models.vae import VAE


def use_fast_cpu_kernels(vae: VAE) -> VAE:
    """Put the quicker ones in place, in `vae` itself; its weights, their names and, but for rounding, numbers stay."""
    for module in list(vae.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Tanh:
                setattr(module, name, FastTanh())
    if isinstance(vae.likelihood, Bernoulli):
        vae.likelihood.cross_entropy = cross_entropy  # type: ignore[method-assign]
    return vae


class FastTanh(nn.Module):
    """tanh x = 2 sigmoid(2 x) - 1: torch.tanh takes five times a sigmoid's time (torch 2.15, CPU)."""

    def forward(self, x: Tensor) -> Tensor:
        return (2 * x).sigmoid_().mul(2).sub_(1)


class FastBCEWithLogits(torch.autograd.Function):
    """The sum over an image's pixels of log(1 + e^l) - x l, with its gradient sigmoid(l) - x: exact at any logit l.

    `F.binary_cross_entropy_with_logits` says the same; but log1p is not vectorised on AVX-512 machines (torch 2.15),
    where it takes a sixth of a training step. log(1 + e^l) is relu(l) - log(sigmoid(|l|)), and these sigmoids are at
    least 1/2: up to a hundred of them are safely multiplied in float32, each at an eighth of a log's price, before one
    log is taken.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor) -> Tensor:
        x = at_least_float32(x)  # a hundred halves underflow in float16
        wide = logits.to(x.dtype)
        ctx.save_for_backward(x, wide)
        ctx.dtype = logits.dtype
        factors = wide.abs().sigmoid_().flatten(-3)
        at_once = next(n for n in range(100, 0, -1) if factors.shape[-1] % n == 0)
        logs = factors.unflatten(-1, (-1, at_once)).prod(-1).log_().sum(-1)
        return wide.relu().addcmul_(x, wide, value=-1).sum(IMAGE_DIMS) - logs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        x, logits = ctx.saved_tensors
        return None, (torch.sigmoid(logits) - x).mul_(grad[..., None, None, None]).to(ctx.dtype)


# One object for every VAE: code compiled for one serves the next, unless a function that it calls is another one.
cross_entropy = FastBCEWithLogits.apply
