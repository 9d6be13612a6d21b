"""Precisions: bytes stay bytes at each of them, and devices that the test machine lacks, by torch's fake tensors."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from betavae.metrics_callback import TrainMetrics
from betavae.models.likelihoods import LIKELIHOODS, Gaussian
from betavae.models.logistic_mixture import LogisticMixture
from betavae.models.precision import set_float32_precision
from tests.commands import TINY, run

BYTES = torch.arange(256).float() / 255


def test_sums_of_an_interval_resume_on_the_device_of_the_module():
    saved = TrainMetrics()
    saved.window.add({"loss": torch.ones(()), "kl": torch.ones(())}, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):  # a GPU that is not there
        resumed, cuda = TrainMetrics(), torch.device("cuda:0")
        resumed.load_state_dict(saved.state_dict())
        resumed.on_train_start(None, SimpleNamespace(device=cuda))
        resumed.window.add({name: torch.ones((), device=cuda) for name in ("loss", "kl")}, 5)
        strategy = SimpleNamespace(reduce=lambda rows, reduce_op: rows)
        assert resumed.window.reduce_rows(SimpleNamespace(strategy=strategy)).shape == (2, 3)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_precision_is_that_of_convolutions_too(precision):
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
def test_the_likelihood_sees_bytes(tmp_path, precision, more):
    np.save(tmp_path / "x.npy", np.arange(100 * 64).reshape(100, 8, 8).astype(np.uint8))
    words = ["data=arrays", "data.root=x.npy", "data.batch_size=20", "model.likelihood=only_bytes", *more]
    words += ["trainer.max_epochs=1", f"trainer.precision={precision}", "hydra.run.dir=run"]
    run(*TINY, *words, cwd=tmp_path, prepare=register)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("likelihood", [*(make() for make in LIKELIHOODS.values())], ids=list(LIKELIHOODS))
def test_low_precision_parameters_give_the_number_of_the_same_parameters_in_single_precision(likelihood):
    x = torch.randint(256, (4, 1, 16, 16)) / 255
    params = torch.randn(4, likelihood.params_per_channel, 16, 16).bfloat16()
    if isinstance(likelihood, LogisticMixture):
        params[:, -likelihood.components :] -= 6  # scales below half a byte, where a rounded byte is another one
    found = likelihood.log_prob(x, params)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, likelihood.log_prob(x, params.float()))
