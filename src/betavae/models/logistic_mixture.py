"""Bytes as bytes: a discretised mixture of logistics for each pixel and channel (Salimans et al. 2017, PixelCNN++).

A component of mean m and scale s is the logistic distribution function F(v) = sigmoid((v - m) / s) on the line of pixel
values, cut at the 255 middles between neighbouring bytes: byte b has the mass between (b - 1/2) / 255 and
(b + 1/2) / 255, byte 0 all of it from -inf, byte 255 all of it up to inf. The channels are independent given z.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from betavae.models.precision import at_least_float32, to_float64

# A scale of e^-15 is a certainty, at e^15 only the bytes 0 and 255 are left: beyond, the scale stays what it is there.
MAX_LOG_SCALE = 15.0


def split_params(params: Tensor, components: int) -> tuple[Tensor, ...]:
    """`(..., 3 * components * C, H, W)` -> logits, means, log-scales, each `(..., components, C, H, W)`."""
    logits, means, log_scales = params.unflatten(-3, (3, components, -1)).unbind(-5)
    return logits, means, log_scales.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)


def pixel_log_prob(x: Tensor, params: Tensor, components: int, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The log-probability of each pixel `(..., C, H, W)`, and its gradient in the shape of `params` if asked for.

    With w = 1 / (255 s) the width of a bin and d = |x - m| / s - w / 2 how far the mean is outside of it, both in
    scales, the difference of the two sigmoids is a product,

        P = sigmoid(-d) sigmoid(d + w) (1 - e^-w),

    in which nothing cancels, in the furthest tail either; for bytes 0 and 255 it is its first factor alone, with the
    distance to their one edge. e^-max(d, 0) is taken out of it and into the mixture's log-sum-exp.
    """
    x = at_least_float32(x).unsqueeze(-4)
    logits, means, log_scales = split_params(params.to(x.dtype), components)
    lowest, highest = x <= 0, x >= 1
    inside = ~(lowest | highest)
    per_scale = torch.exp(-log_scales)
    side = torch.where(lowest, -1.0, torch.where(highest, 1.0, torch.where(x < means, -1.0, 1.0)))
    distance = (x - means) * side * per_scale
    width = per_scale / 255
    d = distance - width / 2
    near = torch.exp(-d.abs())
    # e^-(d + w) and 1 - e^-w, or for the two edge bytes what is their limit at w = inf.
    far = torch.where(inside, torch.exp(-width) * torch.where(d < 0, 1 / (near + 1e-37), near), 0.0)
    mass = torch.where(inside, -torch.expm1(-width), 1.0)
    log_weights = logits - d.relu()
    highest_weight, highest_logit = log_weights.amax(-4, keepdim=True), logits.amax(-4, keepdim=True)
    parts = torch.exp(log_weights - highest_weight) * mass / ((1 + near) * (1 + far))
    shares = torch.exp(logits - highest_logit)
    total, all_shares = parts.sum(-4, keepdim=True), shares.sum(-4, keepdim=True)
    log_prob = (highest_weight - highest_logit + torch.log(total / all_shares)).squeeze(-4)
    if not with_gradient:
        return log_prob, None
    responsibility = parts / total
    outside = torch.where(d < 0, near, 1.0) / (1 + near)  # sigmoid(d)
    beyond = far / (1 + far)  # sigmoid(-(d + w))
    by_distance = responsibility * (beyond - outside)
    by_width = responsibility * ((beyond + outside) / 2 + torch.where(inside, torch.exp(-width) / mass, 0.0))
    free = log_scales.abs() < MAX_LOG_SCALE
    gradient = (
        responsibility - shares / all_shares,
        -by_distance * side * per_scale,
        torch.where(free, -by_distance * distance - by_width * width, 0.0),
    )
    return log_prob, torch.stack(gradient, -5).flatten(-5, -3)


class MixtureLogProb(torch.autograd.Function):
    """The sum over pixels, its gradient taken on the way forward.

    So each exponential is taken once: compiled, forward and backward together take two thirds of the time that autograd
    needs for the same formula, and a third of a sum of logsigmoids in a logsumexp.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, params: Tensor, components: int) -> Tensor:
        log_prob, gradient = pixel_log_prob(x, params, components, ctx.needs_input_grad[1])
        ctx.dtype = params.dtype
        if gradient is not None and params.dtype != torch.float16:  # whose range is too small before the batch's mean
            gradient = gradient.to(params.dtype)
        ctx.save_for_backward(gradient)
        return log_prob.sum((-3, -2, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return None, (gradient * grad[..., None, None, None].to(gradient.dtype)).to(ctx.dtype), None


class LogisticMixture(nn.Module):
    """`params` `(..., 3 * components * C, H, W)`: first all mixture logits, then all means, then all log-scales, the
    means and scales in units in which byte b is b / 255. One component is the plain discretised logistic.
    """

    def __init__(self, components: int = 3):
        super().__init__()
        self.components = components
        self.params_per_channel = 3 * components

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        """`(..., B)` in nats, summed over pixels and channels: a log-probability of images of bytes, x = byte / 255."""
        return MixtureLogProb.apply(x, params, self.components)

    def probabilities(self, params: Tensor) -> Tensor:
        """Of all bytes, `(..., C, H, W, 256)`."""
        bytes_ = at_least_float32(torch.arange(256, dtype=params.dtype, device=params.device)) / 255
        x = bytes_.view(-1, *[1] * params.ndim)
        return pixel_log_prob(x, params, self.components, False)[0].exp().movedim(0, -1)

    def mean(self, params: Tensor) -> Tensor:
        """`(..., C, H, W)` in [0, 1], of the mixture before its bytes are rounded: at most half a byte from theirs."""
        logits, means, log_scales = split_params(to_float64(params), self.components)
        scale = log_scales.exp()
        # 1 less the integral of F over [0, 1]
        below = scale * (nn.functional.softplus((1 - means) / scale) - nn.functional.softplus(-means / scale))
        return (logits.softmax(-4) * (1 - below)).sum(-4).clamp(0, 1).to(params)

    def params_of(self, mean: Tensor) -> Tensor:
        """Parameters of about this mean image: components evenly over [0, 1], weighted binomially, 0.1 wide."""
        k = torch.arange(self.components, dtype=mean.dtype, device=mean.device).view(-1, 1, 1, 1)
        choose = torch.tensor([math.log(math.comb(self.components - 1, i)) for i in range(self.components)]).to(k)
        logits = k * torch.logit(mean, eps=1e-3) + choose.view_as(k)
        means = (k / (self.components - 1)).expand_as(logits) if self.components > 1 else mean.unsqueeze(0)
        return torch.stack((logits, means, torch.full_like(logits, math.log(0.1)))).flatten(0, 2)

    def meaning(self, binarize: str) -> str:
        return "a log-likelihood of images of bytes: compare it, in bits per dimension, with others on the same images"

    def exact(self, binarize: str) -> bool:
        return binarize == "none"

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images of bytes / 255, `(..., C, H, W)`."""
        logits, means, log_scales = split_params(params.float(), self.components)
        shape, device = means.select(-4, 0).shape, params.device
        cumulative = logits.softmax(-4).cumsum(-4)[..., :-1, :, :, :]
        pick = torch.rand(shape, generator=generator, device=device).unsqueeze(-4)
        component = (cumulative <= pick).sum(-4, keepdim=True)
        noise = torch.logit(torch.rand(shape, generator=generator, device=device))
        means, log_scales = (value.gather(-4, component).squeeze(-4) for value in (means, log_scales))
        return (255 * (means + log_scales.exp() * noise)).round().clamp(0, 255) / 255
