"""The binary cross-entropy against torch's formula."""

import pytest
import torch
from torch.nn import functional as F

from betavae.models.likelihoods import bce_with_logits

pytestmark = pytest.mark.forked  # for autograd

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def reference_bce(x, logits):
    """Compute it with torch in double precision."""
    x, logits = x.double().expand_as(logits), logits.double()
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((-3, -2, -1))


def value_and_gradient(function, x, logits, weights):
    logits = logits.detach().requires_grad_()
    value = function(x, logits)
    (gradient,) = torch.autograd.grad((value * weights.to(value.dtype)).sum(), logits)
    return value.detach(), gradient


@pytest.mark.parametrize("of_images", DTYPES)
@pytest.mark.parametrize("of_logits", DTYPES)
@pytest.mark.parametrize("scale", [0.1, 5.0, 500.0])
def test_bce_and_gradient_equal_torch_at_any_logit_and_dtype(of_images, of_logits, scale):
    # 784 pixels are products of a hundred and fewer; 3 * 11 * 19 has other divisors; 1 and a prime number have none.
    for shape in ((1, 28, 28), (3, 11, 19), (1, 1, 1), (1, 1, 101)):
        x, logits = torch.rand(5, *shape).to(of_images), (scale * torch.randn(2, 5, *shape)).to(of_logits)
        weights = torch.rand(2, 5, dtype=torch.float64)
        value, gradient = value_and_gradient(bce_with_logits, x, logits, weights)
        expected, slope = value_and_gradient(reference_bce, x, logits, weights)
        assert value.shape == (2, 5) and value.dtype == torch.promote_types(of_images, torch.float32)
        assert gradient.dtype == of_logits
        double = of_images == torch.float64
        close = {"rtol": 1e-12, "atol": 1e-10} if double else {"rtol": 2e-6, "atol": 1e-4}
        torch.testing.assert_close(value.double(), expected, **close)
        # A gradient is rounded to the precision of what it is the gradient of.
        exact = {"rtol": 1e-12, "atol": 1e-13} if double and of_logits == torch.float64 else {}
        torch.testing.assert_close(gradient, slope, **exact)


@pytest.mark.parametrize("logit", [-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bce_of_an_image_of_one_logit(logit, dtype):
    """At logit 0 a product of a hundred factors of 1/2 is the smallest possible."""
    x = torch.tensor([0.0, 0.5, 1.0], dtype=dtype).view(3, 1, 1, 1).expand(3, 1, 10, 10)
    logits = torch.full((1, 3, 1, 10, 10), logit, dtype=dtype)
    weights = torch.ones(1, 3)
    value, gradient = value_and_gradient(bce_with_logits, x, logits, weights)
    expected, slope = value_and_gradient(reference_bce, x, logits, weights)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient, slope)
    assert value.isfinite().all()


def test_bce_broadcasts_images_over_samples():
    x, logits = torch.rand(4, 1, 6, 5).double(), torch.randn(2, 3, 4, 1, 6, 5).double()
    value = bce_with_logits(x, logits)
    assert value.shape == (2, 3, 4)
    for i, j, n in ((0, 0, 0), (1, 2, 3), (0, 2, 1)):
        torch.testing.assert_close(value[i, j, n], reference_bce(x[[n]], logits[i, j, [n]])[0])
    assert torch.autograd.gradcheck(lambda logits: bce_with_logits(x, logits), logits.requires_grad_())
