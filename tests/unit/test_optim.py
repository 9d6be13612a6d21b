import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from betavae.data.datamodule import ImageDataModule
from betavae.module import VAEModule
from betavae.optim import POLAR_EXPRESS_COEFFS, MuonAdam, optimizer_names, orthogonalize
from betavae.runtime.resume import ExactResume
from tests.conftest import DATA, MODEL, MODULE

pytestmark = pytest.mark.forked  # for autograd

SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "vector_lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}


@pytest.mark.parametrize("shape", [(30, 80), (80, 30), (40, 40)])
def test_orthogonalize_maps_the_singular_values(shape):
    u, s, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    value = s / (s**4).sum() ** 0.25
    for a, b, c in POLAR_EXPRESS_COEFFS:
        value = a * value + b * value**3 + c * value**5
    result = u.T @ orthogonalize(u @ torch.diag(1e-4 * s) @ vt) @ vt.T  # at any scale of the gradient
    assert (result.diagonal() - value).abs().max() < 0.1  # in bfloat16
    assert (result - torch.diag(result.diagonal())).abs().max() < 0.02


@pytest.mark.parametrize("scale", [1e-6, 1e-9, 1e-11, 2e-13, 1e-14, 1e-20, 1e-36, 0.0])
def test_orthogonalize_bounds_the_step_of_a_vanishing_gradient(scale):
    assert torch.linalg.matrix_norm(orthogonalize(scale * torch.randn(256, 25)), 2) < 2


def test_vectors_get_adam_and_matrices_muon():
    layer = nn.Linear(50, 20)
    start, bias = layer.weight.detach().clone(), nn.Parameter(layer.bias.detach().clone())
    ours = MuonAdam(layer.parameters(), **SETTINGS)
    adam = torch.optim.Adam([bias], lr=1e-3, betas=(0.9, 0.99))
    for _ in range(3):
        x = torch.randn(64, 50)
        ours.zero_grad()
        (layer(x) ** 2).sum().backward()
        bias.grad = layer.bias.grad.clone()
        before = layer.weight.detach().clone()
        ours.step()
        adam.step()
        torch.testing.assert_close(layer.bias, bias)
        assert 0.05 < torch.linalg.matrix_norm(layer.weight - before, 2) < 0.2
    assert not torch.equal(start, layer.weight)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (6, 2, 3, 3)])
def test_muon_step_equals_its_equations(shape):
    """Keller Jordan's: Nesterov's momentum, orthogonalised, times (rows / columns)^0.5 where there are more rows."""
    parameter = nn.Parameter(torch.randn(shape))
    expected, momentum = parameter.detach().clone(), torch.zeros(shape)
    optimizer = MuonAdam([parameter], **SETTINGS | {"weight_decay": 0.5})
    for _ in range(3):
        gradient = torch.randn(shape)
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        direction = orthogonalize((0.1 * gradient + 0.9 * momentum).flatten(1)).view(shape)
        scale = (50 / 20) ** 0.5 if shape == (50, 20) else 1
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * scale * direction
        torch.testing.assert_close(parameter.detach(), expected, rtol=0.02, atol=2e-3)  # bfloat16 in orthogonalize


def test_muon_state_survives_a_checkpoint(tmp_path):
    def net_and_optimizer():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))
        return net, MuonAdam(net.parameters(), **SETTINGS)

    def step(net, optimizer, seed):
        optimizer.zero_grad()
        (net(torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(seed))) ** 2).mean().backward()
        optimizer.step()

    whole, split, again = (net_and_optimizer() for _ in range(3))
    for seed in range(4):
        step(*whole, seed)
    for seed in range(2):
        step(*split, seed)
    torch.save([part.state_dict() for part in split], tmp_path / "state.pt")
    for part, state in zip(again, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    for seed in (2, 3):
        step(*again, seed)
    assert all(map(torch.equal, again[0].parameters(), whole[0].parameters()))


@pytest.mark.parametrize("network", ["mlp", "conv", "resnet"])
@pytest.mark.parametrize("name", [name for name in optimizer_names() if name != "Muon"])  # which takes no biases
def test_every_optimizer_resumes_bit_for_bit(tmp_path, name, network):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8))
    data = DATA | {"name": "arrays", "validation_size": 0, "batch_size": 12, "test_size": 4}
    model = MODEL | {"network": network, "hidden_dims": [8], "latent_dim": 2, "image_shape": [1, 8, 8]}
    optimizer = {"name": name} | (SETTINGS if name == "MuonAdam" else {"lr": 1e-2})

    def fit(epochs, ckpt=None):
        L.seed_everything(0, verbose=False)
        module = VAEModule(**MODULE | {"model": model, "optimizer": optimizer})
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[ExactResume()], **quiet)
        trainer.fit(module, ImageDataModule(**data | {"root": str(tmp_path / "images.npy")}), ckpt_path=ckpt)
        return trainer, module

    fit(1)[0].save_checkpoint(tmp_path / "half.ckpt")
    resumed, whole = fit(2, tmp_path / "half.ckpt")[1], fit(2)[1]
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert ours.isfinite().all() and torch.equal(ours, theirs)
