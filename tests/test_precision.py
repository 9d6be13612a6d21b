"""Devices and precisions that the test machine lacks, by what torch says of them without one."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from betavae.curves import Curves
from betavae.precision import set_float32_precision


def test_sums_of_an_interval_resume_on_the_device_of_the_module():
    saved = Curves()
    saved.interval.add({"loss": torch.ones(()), "kl": torch.ones(())}, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):  # a GPU that is not there
        resumed, cuda = Curves(), torch.device("cuda:0")
        resumed.load_state_dict(saved.state_dict())
        resumed.on_train_start(None, SimpleNamespace(device=cuda))
        resumed.interval.add({name: torch.ones((), device=cuda) for name in ("loss", "kl")}, 5)
        strategy = SimpleNamespace(reduce=lambda rows, reduce_op: rows)
        assert resumed.interval.reduce_rows(SimpleNamespace(strategy=strategy)).shape == (2, 3)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_precision_is_that_of_convolutions_too(precision):
    set_float32_precision(precision)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision != "highest")
