"""Each quicker road against the plain formula that it replaces."""

import pytest
import torch
from torch.nn import functional as F

from betavae.models.cpu_kernels import FastBCEWithLogits, FastTanh, use_fast_cpu_kernels
from betavae.models.likelihoods import Bernoulli, ContinuousBernoulli
from betavae.models.vae import VAE
from tests.conftest import MODEL

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def plain(x, logits):
    """In double precision, from the very numbers that went in."""
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
def test_cross_entropy_and_its_gradient_at_any_logit_and_precision(of_images, of_logits, scale):
    # 784 pixels are products of a hundred and fewer; 3 * 11 * 19 has other divisors; 1 and a prime number have none.
    for shape in ((1, 28, 28), (3, 11, 19), (1, 1, 1), (1, 1, 101)):
        x, logits = torch.rand(5, *shape).to(of_images), (scale * torch.randn(2, 5, *shape)).to(of_logits)
        weights = torch.rand(2, 5, dtype=torch.float64)
        value, gradient = value_and_gradient(FastBCEWithLogits.apply, x, logits, weights)
        expected, slope = value_and_gradient(plain, x, logits, weights)
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
def test_cross_entropy_of_a_whole_image_of_one_logit(logit, dtype):
    """A hundred factors of 1/2 are the least product there is: at logit 0."""
    x = torch.tensor([0.0, 0.5, 1.0], dtype=dtype).view(3, 1, 1, 1).expand(3, 1, 10, 10)
    logits = torch.full((1, 3, 1, 10, 10), logit, dtype=dtype)
    weights = torch.ones(1, 3)
    value, gradient = value_and_gradient(FastBCEWithLogits.apply, x, logits, weights)
    expected, slope = value_and_gradient(plain, x, logits, weights)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient, slope)
    assert value.isfinite().all()


def test_cross_entropy_broadcasts_images_over_samples():
    x, logits = torch.rand(4, 1, 6, 5).double(), torch.randn(2, 3, 4, 1, 6, 5).double()
    value = FastBCEWithLogits.apply(x, logits)
    assert value.shape == (2, 3, 4)
    for i, j, n in ((0, 0, 0), (1, 2, 3), (0, 2, 1)):
        torch.testing.assert_close(value[i, j, n], plain(x[[n]], logits[i, j, [n]])[0])
    assert torch.autograd.gradcheck(lambda logits: FastBCEWithLogits.apply(x, logits), logits.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_and_its_gradient(dtype):
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([-1e4, 1e4, 0.0, 1e-3, -1e-3]))).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    value, exact = FastTanh()(ours), torch.tanh(theirs)
    assert value.dtype == dtype
    # 2 sigmoid - 1 is as exact as numbers near 1 are.
    atol = {torch.float64: 1e-15, torch.float32: 3e-7, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(value.double(), exact, rtol=0, atol=atol)
    (ours_grad,) = torch.autograd.grad(value.sum(), ours)
    (theirs_grad,) = torch.autograd.grad(exact.sum(), theirs)
    torch.testing.assert_close(ours_grad.double(), theirs_grad, rtol=0, atol=4 * atol)


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous_bernoulli", "gaussian"])
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_accelerate_leaves_names_and_numbers(network, likelihood):
    settings = MODEL | {"network": network, "hidden_dims": [8, 6], "activation": "tanh", "likelihood": likelihood}
    vae = VAE(**settings)
    x, z = torch.rand(7, 1, 28, 28), torch.randn(3, 7, 20)

    def numbers():
        posterior, params = vae.encode(x), vae.decode_params(z)
        log_px = vae.likelihood.log_prob(x, params)
        gradients = torch.autograd.grad(log_px.sum() + posterior.mean.sum(), [p for p in vae.parameters()])
        return [*posterior, params, log_px, *gradients]

    before, state = numbers(), {name: value.clone() for name, value in vae.state_dict().items()}
    assert use_fast_cpu_kernels(vae) is vae
    kinds = {type(part) for part in vae.modules()}
    assert FastTanh in kinds and torch.nn.Tanh not in kinds
    if isinstance(vae.likelihood, Bernoulli):
        assert vae.likelihood.cross_entropy == FastBCEWithLogits.apply
    assert list(vae.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in vae.state_dict().items())
    for ours, plain_ones in zip(numbers(), before, strict=True):
        torch.testing.assert_close(ours, plain_ones, rtol=1e-4, atol=1e-4)
    fresh = VAE(**settings)
    assert not any(type(part) is FastTanh for part in fresh.modules())  # of this VAE alone
    assert isinstance(fresh.likelihood, ContinuousBernoulli) or "cross_entropy" not in vars(fresh.likelihood)
