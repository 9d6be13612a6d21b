"""Floating-point precision of sums and matrix products, on every device."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32: sums over the pixels of an image overflow float16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_float64(x: Tensor) -> Tensor:
    """Convert to float64, on the CPU if the device has no such type (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def set_float32_precision(precision: str) -> None:
    """Set the internal precision of float32 matrix products: "highest", "high" or "medium".

    `torch.set_float32_matmul_precision` alone leaves cuDNN's convolutions in TF32. Both are torch's legacy setters:
    mixing them with `fp32_precision` raises an error (torch 2.9 and later).
    """
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
