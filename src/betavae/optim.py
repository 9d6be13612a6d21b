"""`MuonAdam`, for when an epoch should go further: in torch.optim there is Muon for matrices alone."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Odd polynomials a x + b x^3 + c x^5, applied in turn to the singular values: two of the sequence of Amsel et al.
# 2025 ("Polar Express"). They bring every value from 0.05 up to between 0.18 and 1.9. That is coarse; but in training,
# five steps of the usual kind were no better, and cost more than twice as much.
POLAR_EXPRESS_COEFFS = ((4.1070591, -2.9478499, 0.5448431), (3.9486909, -2.9089021, 0.5518191))


def orthogonalize(matrix: Tensor) -> Tensor:
    """U p(S) V^T of a matrix U S V^T, p(S) roughly 1, by products of bfloat16 matrices alone."""
    x = matrix.bfloat16()
    wide = x.size(0) <= x.size(1)
    for number, (a, b, c) in enumerate(POLAR_EXPRESS_COEFFS):
        gram = x @ x.mT if wide else x.mT @ x
        if number == 0:
            # A bound on the largest singular value that is tighter than the Frobenius norm, and free.
            norm = gram.norm().sqrt().clamp(min=1e-12)
            x, gram = x / norm, gram / norm**2
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        x = polynomial @ x if wide else x @ polynomial
    return x.to(matrix.dtype)


class MuonAdam(Optimizer):
    """Muon (Jordan 2024) for weights, Adam for biases and other vectors.

    Muon steps along the orthogonalised momentum, with `lr` about the step's spectral norm (times the square root of the
    matrix's rows over columns where that is above 1); a convolution's kernel is a matrix with a row per output channel.
    `vector_lr`, `betas` and `eps` are Adam's. A learning-rate schedule scales both rates alike.
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
        params = list(params)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in params if p.ndim >= 2], "lr": lr, "matrices": True},
            {"params": [p for p in params if p.ndim < 2], "lr": vector_lr, "matrices": False},
        ]
        super().__init__(groups, {"momentum": momentum, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
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
    """A class of torch.optim, or `MuonAdam`."""
    return MuonAdam if name == "MuonAdam" else getattr(torch.optim, name)


def optimizer_names() -> list[str]:
    """What `optimizer_class` takes."""
    useless = ("Optimizer", "SparseAdam")  # an abstract class; gradients are dense
    classes = [name for name, cls in vars(torch.optim).items() if isinstance(cls, type) and issubclass(cls, Optimizer)]
    return ["MuonAdam", *(name for name in classes if name not in useless)]


# The decay of the learning rate after its warm-up, as a function of the fraction of training done.
LR_DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda fraction: 1.0,
    "linear": lambda fraction: 1.0 - fraction,
    "cosine": lambda fraction: 0.5 * (1.0 + math.cos(math.pi * fraction)),
}


def lr_factor(step: int, total_steps: float, name: str, warmup: float) -> float:
    """The factor on the learning rate: linear warm-up over the first `warmup` (a fraction of all steps), then decay."""
    warmup_steps = warmup * total_steps
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return LR_DECAYS[name](min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps)))
