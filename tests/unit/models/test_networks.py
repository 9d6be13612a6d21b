import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from betavae.models.likelihoods import LIKELIHOODS
from betavae.models.networks import ACTIVATIONS, NETWORKS, ResidualBlock, stage_shapes
from betavae.models.vae import VAE
from tests.conftest import MODEL


def test_mlp_has_the_tutorials_parameters():
    assert sum(p.numel() for p in VAE(**MODEL).parameters()) == 652_824


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 27, 30), (1, 7, 5)])
def test_encoder_and_decoder_shapes(network, shape):
    vae = VAE(**MODEL | {"network": network, "hidden_dims": [8, 16], "latent_dim": 3, "image_shape": shape})
    mean, logvar = vae.encode(torch.rand(5, *shape))
    assert mean.shape == logvar.shape == (5, 3)
    for decode in (vae.decode, vae.decode_params):
        assert decode(torch.randn(5, 3)).shape == (5, *shape)
        assert decode(torch.randn(4, 5, 3)).shape == (4, 5, *shape)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["conv", "resnet"])
@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(*[st.integers(8, 256)] * 2),
    channels=st.sampled_from([1, 3]),
    params_per_channel=st.sampled_from([1, 30]),
    hidden_dims=st.lists(st.integers(1, 40), min_size=1, max_size=5),
)
def test_resnet_takes_images_of_any_size(network, size, channels, params_per_channel, hidden_dims):
    make_encoder, make_decoder = NETWORKS[network]
    with torch.device("meta"):  # shapes without numbers
        encoder = make_encoder((channels, *size), hidden_dims, 3, "silu")
        decoder = make_decoder((channels * params_per_channel, *size), hidden_dims, 3, "silu")
        assert encoder(torch.rand(2, channels, *size)).shape == (2, 6)
        assert decoder(torch.randn(2, 3)).shape == (2, channels * params_per_channel, *size)


@given(size=st.tuples(*[st.integers(8, 256)] * 2), hidden_dims=st.lists(st.integers(1, 99), min_size=1, max_size=9))
def test_resnet_depth_follows_the_image_size(size, hidden_dims):
    shapes = stage_shapes((3, *size), hidden_dims)
    assert 4 <= min(shapes[-1][1:]) <= 7
    for before, after in pairwise([size, *(shape[1:] for shape in shapes)]):
        assert min(before) > 7 and after == tuple(math.ceil(n / 2) for n in before)
    channels = [shape[0] for shape in shapes]
    assert channels == (hidden_dims + [hidden_dims[-1]] * 9)[: len(shapes)]


@pytest.mark.forked
def test_residual_block_starts_as_identity_and_learns():
    block = ResidualBlock(16, "silu")
    x = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(block(x), x)
    block(x).square().sum().backward()
    torch.optim.SGD(block.parameters(), 0.1).step()
    assert not torch.allclose(block(x), x)
    torch.testing.assert_close(block(x), x + block.f(x))


def test_blocks_deepen_a_resnet():
    for network in NETWORKS["resnet"]:
        for blocks in (1, 3):
            layers = list(network((1, 28, 28), [8, 16], 2, "relu", blocks=blocks).modules())
            assert sum(isinstance(layer, ResidualBlock) for layer in layers) == 2 * blocks


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_used(activation):
    vae = VAE(**MODEL | {"activation": activation})
    assert isinstance(vae.encoder[2], ACTIVATIONS[activation])
    assert isinstance(vae.decoder[1], ACTIVATIONS[activation])


def test_leading_dimensions_decode_like_each_sample_alone():
    vae = VAE(**MODEL)
    z = torch.randn(3, 4, 20)
    torch.testing.assert_close(vae.decode_params(z)[2], vae.decode_params(z[2]))


def test_sampling_follows_seed_and_temperature():
    vae = VAE(**MODEL)
    draw = lambda seed, t: vae.sample(4, t, torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(0, 1.0), draw(0, 1.0))
    assert not torch.equal(draw(0, 1.0), draw(1, 1.0))
    z = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draw(0, 0.5), torch.sigmoid(vae.decode_params(0.5 * z)))
    assert torch.equal(draw(0, 0.0)[0], draw(0, 0.0)[1])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_init_from_mean_image_starts_at_the_mean(likelihood):
    x = torch.rand(64, 1, 28, 28) * torch.rand(28, 28)
    vae = VAE(**MODEL | {"likelihood": likelihood})
    plain = vae.encoder[1](x.flatten(1))
    vae.init_from_mean_image(x.mean(0))
    centered = plain.mean(0) - vae.encoder[1].weight @ x.mean(0).flatten()
    torch.testing.assert_close(vae.encoder[1](x.flatten(1)).mean(0), centered, rtol=1e-4, atol=1e-5)
    vae.decoder[0].weight.data.zero_(), vae.decoder[0].bias.data.fill_(-1)  # a dead hidden layer leaves the bias alone
    if likelihood == "logistic_mixture":  # logistics around it, a tenth wide
        torch.testing.assert_close(vae.sample(1)[0], x.mean(0), rtol=0, atol=0.08)
    elif likelihood != "continuous_bernoulli":
        torch.testing.assert_close(vae.sample(1)[0], x.mean(0).clamp(1e-3, 1 - 1e-3), rtol=1e-3, atol=2e-3)
    with pytest.raises(ValueError, match="init=data"):
        VAE(**MODEL | {"network": "conv"}).init_from_mean_image(x.mean(0))
