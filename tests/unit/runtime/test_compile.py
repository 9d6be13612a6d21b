"""torch.compile of the training step."""

import warnings
from functools import partial

import pytest
import torch

from betavae.module import VAEModule
from betavae.objectives import elbo
from betavae.runtime import compile
from betavae.runtime.compile import compile_loss
from tests.commands import run_in_child
from tests.conftest import MODEL, MODULE


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_compiled_loss_equals_the_plain_loss(network):
    # After a compiled backward pass, autograd does not work in forked processes.
    run_in_child(lambda: compare_with_plain_loss(network))


def compare_with_plain_loss(network):
    widths = {"mlp": [400], "conv": [8, 16]}[network]
    module = VAEModule(**MODULE | {"model": MODEL | {"network": network, "hidden_dims": widths}})
    torch.nn.init.ones_(module.vae.encoder[-1].bias)  # or there is hardly any KL
    x, noise = torch.rand(8, 1, 28, 28), torch.randn(1, 8, 20)
    beta = torch.tensor(2.0)
    loss, sums = module.loss(x, None, noise, beta)
    expected = torch.autograd.grad(loss, list(module.parameters()))
    keys = list(module.state_dict())
    compile_loss(module, None)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in module.parameters() if p.ndim == 4)
    compiled, compiled_sums = module.loss(x, None, noise, beta)
    torch.testing.assert_close(compiled, elbo(module.vae, x, noise, 2.0).loss)
    torch.testing.assert_close(compiled_sums, sums)
    for ours, plain in zip(torch.autograd.grad(compiled, list(module.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert list(module.state_dict()) == keys
    # A beta that changes with a schedule must not compile again.
    betas = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for beta in (0.1, 0.2):
            module.current_beta = lambda beta=beta: beta
            module.training_step((x, None), 0)
            sums = module.window.batches[-1]
            assert module.window.images[-1] == 8
            betas.append((sums["loss"] - sums["recon"]) / sums["kl"])
    torch.testing.assert_close(torch.stack(betas), torch.tensor([0.1, 0.2]), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiled_resampling_equals_the_plain_loss_without_warnings():
    run_in_child(compare_resampling)


def compare_resampling():
    warnings.simplefilter("error")
    objective = {"name": "dreg", "k": 5, "resample": 1}
    module = VAEModule(**MODULE | {"model": MODEL | {"hidden_dims": [40]}, "objective": objective})
    x, noise, beta = torch.rand(8, 1, 28, 28), torch.randn(5, 8, 20), torch.tensor(1.0)
    expected = module.loss(x, None, noise, beta)[0]
    compile_loss(module, None)
    compiled = module.loss(x, None, noise, beta)[0]
    torch.testing.assert_close(compiled, expected)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(compiled, list(module.parameters())))


@pytest.mark.slow
def test_compile_cache_is_reset_in_a_long_sweep(monkeypatch):
    monkeypatch.setattr(compile, "JOBS_PER_COMPILE_CACHE", 3)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()  # other tests of this process have compiled, too
    cached = []
    for latent_dim in range(1, 8):
        module = VAEModule(**MODULE | {"model": MODEL | {"hidden_dims": [4], "latent_dim": latent_dim}})
        compile_loss(module, None)
        module.loss(torch.rand(2, 1, 28, 28), None, torch.randn(1, 2, latent_dim), torch.tensor(1.0))
        cached.append(len(torch._dynamo.eval_frame._debug_get_cache_entry_list(VAEModule.loss.__code__)))
    assert max(cached) == 3 and cached.count(1) >= 2
