import math

import pytest
import torch

from betavae.metrics.collapse import MIN_IMAGES, count_active_units, describe_collapse, diagnose_collapse
from betavae.models.vae import VAE
from tests.conftest import MODEL


@pytest.mark.parametrize(
    ("active", "latent_dim", "kl"),
    [(0, 20, 0.0), (0, 20, 10.0), (1, 20, 0.68), (2, 2, 0.1), (0, 2, 5.0)],  # 10 nats of free bits tell nothing
)
def test_no_active_unit_or_less_than_a_bit_is_a_collapse(active, latent_dim, kl):
    text = describe_collapse(active, latent_dim, kl)
    assert text and "\n" not in text and f"({active} of {latent_dim} units active, KL {kl:.2f} nats)" in text


@pytest.mark.parametrize(("active", "latent_dim", "kl"), [(2, 2, 6.0), (5, 20, 12.0), (1, 20, 0.7), (20, 20, 25.0)])
def test_a_model_with_inactive_units_is_healthy(active, latent_dim, kl):
    assert describe_collapse(active, latent_dim, kl) is None


def make_vae(std: float) -> VAE:
    """Build a VAE whose posterior means have about this standard deviation, beside a posterior deviation of 0.1."""
    vae = VAE(**MODEL)
    (head,) = [layer for layer in vae.encoder.modules() if getattr(layer, "out_features", 0) == 40]
    torch.nn.init.zeros_(head.bias[:20])
    torch.nn.init.constant_(head.bias[20:], 2 * math.log(0.1))
    torch.nn.init.zeros_(head.weight)
    if std:
        head.weight[:3].normal_()
        scale = vae.encode(torch.rand(500, 1, 28, 28)).mean.std(0)[:3]
        head.weight[:3] *= std / scale[:, None]
    return vae


@torch.no_grad()
def test_the_diagnosis_reads_the_posteriors_of_images():
    x = torch.rand(500, 1, 28, 28)
    healthy, collapsed = make_vae(1.0), make_vae(0.0)
    assert diagnose_collapse(healthy, x) is None and count_active_units(healthy.encode(x).mean) == 3
    kl = 20 * 0.5 * (0.01 - 1 - math.log(0.01))
    assert f"(0 of 20 units active, KL {kl:.2f} nats)" in (diagnose_collapse(collapsed, x) or "")
    assert diagnose_collapse(collapsed, x[: MIN_IMAGES - 1]) is None  # too few to tell
