"""`MuonAdam`, since torch.optim has Muon for matrices only, and schedules of the learning rate."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Odd polynomials a x + b x^3 + c x^5, applied in turn to the singular values: the first two of Polar Express (Amsel et
# al. 2025). They map every value above 0.05 to between 0.18 and 1.9. Five of the usual Newton-Schulz steps trained no
# better and cost more than twice as much.
POLAR_EXPRESS_COEFFS = ((4.1070591, -2.9478499, 0.5448431), (3.9486909, -2.9089021, 0.5518191))


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return U p(S) V^T of a matrix U S V^T with p(S) roughly 1, from products of bfloat16 matrices."""
    x = matrix.bfloat16()
    wide = x.size(0) <= x.size(1)
    for number, (a, b, c) in enumerate(POLAR_EXPRESS_COEFFS):
        gram = x @ x.mT if wide else x.mT @ x
        if number == 0:
            # This bound on the largest singular value is tighter than the Frobenius norm. Fourth powers of a matrix
            # below 1e-9 underflow: of the fading momentum of dead units, which would become an enormous step.
            norm = gram.norm().sqrt().clamp(min=1e-8)
            x, gram = x / norm, gram / norm**2
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        x = polynomial @ x if wide else x @ polynomial
    return x.to(matrix.dtype)


class MuonAdam(Optimizer):
    """Muon (Jordan 2024) for weights, Adam for biases and other vectors.

    A convolution's kernel is a matrix with one row per output channel. A learning-rate schedule scales `lr` and
    `vector_lr` alike.

    Args:
        params: The parameters.
        lr: About the spectral norm of a Muon step, times sqrt(rows / columns) if that is above 1.
        momentum: The decay of Muon's Nesterov momentum.
        weight_decay: Decoupled weight decay of the matrices.
        vector_lr: Adam's learning rate.
        betas: Adam's decays.
        eps: Adam's epsilon.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: float,
        vector_lr: float,
        betas: tuple[float, float],
        eps: float,
    ):
        if not all(0 <= decay < 1 for decay in (momentum, *betas)):
            raise ValueError(f"momentum={momentum} and betas={list(betas)} must be at least 0 and below 1")
        if min(lr, vector_lr, weight_decay, eps) < 0:
            raise ValueError("lr, vector_lr, weight_decay and eps must be at least 0")
        params = list(params)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in params if p.ndim >= 2], "lr": lr, "matrices": True},
            {"params": [p for p in params if p.ndim < 2], "lr": vector_lr, "matrices": False},
        ]
        super().__init__(groups, {"momentum": momentum, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters. Returns the value of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon if group["matrices"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def _muon(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        direction = orthogonalize(gradient.lerp(momentum, group["momentum"]).flatten(1)).view_as(parameter)
        rows, columns = parameter.shape[0], parameter[0].numel()
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _adam(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["mean"].lerp_(gradient, 1 - beta1) / (1 - beta1 ** state["step"])
        square = state["square"].lerp_(gradient**2, 1 - beta2) / (1 - beta2 ** state["step"])
        parameter.addcdiv_(mean, square.sqrt() + group["eps"], value=-group["lr"])


def optimizer_class(name: str) -> type[Optimizer]:
    """Return a class of torch.optim, or `MuonAdam`, by name."""
    return MuonAdam if name == "MuonAdam" else getattr(torch.optim, name)


def optimizer_names() -> list[str]:
    """Return the names that `optimizer_class` takes."""
    excluded = ("Optimizer", "SparseAdam")  # abstract; for sparse gradients only
    classes = [name for name, cls in vars(torch.optim).items() if isinstance(cls, type) and issubclass(cls, Optimizer)]
    return ["MuonAdam", *(name for name in classes if name not in excluded)]


# Decay of the learning rate after the warm-up, as a function of the fraction of training done.
LR_DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda fraction: 1.0,
    "linear": lambda fraction: 1.0 - fraction,
    "cosine": lambda fraction: 0.5 * (1.0 + math.cos(math.pi * fraction)),
}


def lr_factor(step: int, total_steps: float, name: str, warmup: float) -> float:
    """Return the factor on the learning rate.

    It rises linearly over the first `warmup` (a fraction of all steps), then decays.
    """
    warmup_steps = warmup * total_steps
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return LR_DECAYS[name](min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps)))
