import pytest
import torch

from betavae.networks import ACTIVATIONS, NETWORKS
from betavae.vae import VAE
from tests.conftest import MODEL


def test_mlp_has_the_tutorials_parameters():
    assert sum(p.numel() for p in VAE(**MODEL).parameters()) == 652_824


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 27, 30), (1, 7, 5)])
def test_images_in_latents_between_images_out(network, shape):
    vae = VAE(**MODEL | {"network": network, "hidden_dims": [8, 16], "latent_dim": 3, "image_shape": shape})
    mean, logvar = vae.encode(torch.rand(5, *shape))
    assert mean.shape == logvar.shape == (5, 3)
    for decode in (vae.decode, vae.decode_params):
        assert decode(torch.randn(5, 3)).shape == (5, *shape)
        assert decode(torch.randn(4, 5, 3)).shape == (4, 5, *shape)


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
