"""Precision settings: which numbers the likelihood sees."""

import json

import numpy as np
import pytest
import torch

from betavae.models.likelihoods import LIKELIHOODS, Gaussian
from betavae.models.logistic_mixture import LogisticMixture
from betavae.models.precision import set_float32_precision
from tests.commands import TINY, run

BYTES = torch.arange(256).float() / 255


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_precision_applies_to_convolutions(precision):
    set_float32_precision(precision)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision != "highest")


class OnlyBytes(Gaussian):
    """A likelihood that fails for anything but bytes / 255."""

    def log_prob(self, x, params):
        if not torch.isin(x.float(), BYTES).all() or x.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"not bytes: {x.dtype}")
        return super().log_prob(x, params)


def register():
    LIKELIHOODS["only_bytes"] = OnlyBytes


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("more", [[], ["trainer.steps_per_batch=2", "data.binarize=dynamic"]], ids=["plain", "several"])
def test_likelihood_sees_exact_bytes_at_every_precision(tmp_path, precision, more):
    np.save(tmp_path / "x.npy", np.arange(100 * 64).reshape(100, 8, 8).astype(np.uint8))
    words = ["data=arrays", "data.root=x.npy", "data.batch_size=20", "model.likelihood=only_bytes", *more]
    words += ["trainer.max_epochs=1", f"trainer.precision={precision}", "hydra.run.dir=run"]
    run(*TINY, *words, cwd=tmp_path, prepare=register)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("likelihood", [*(make() for make in LIKELIHOODS.values())], ids=list(LIKELIHOODS))
def test_half_precision_params_are_summed_in_float32(likelihood):
    x = torch.randint(256, (4, 1, 16, 16)) / 255
    params = torch.randn(4, likelihood.params_per_channel, 16, 16).bfloat16()
    if isinstance(likelihood, LogisticMixture):
        params[:, -likelihood.components :] -= 6  # scales below half a byte, where a rounded byte is another one
    found = likelihood.log_prob(x, params)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, likelihood.log_prob(x, params.float()))
