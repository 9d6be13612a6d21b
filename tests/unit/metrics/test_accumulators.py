"""Sums over images, on devices that the test machine lacks (by torch's fake tensors)."""

import multiprocessing

import pytest
import torch
from torch._subclasses import FakeTensorMode

from betavae.metrics.accumulators import BatchSums, Totals


def resume_on_a_fake_gpu():
    saved = BatchSums()
    saved.add({"loss": torch.ones(()), "kl": torch.ones(())}, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        resumed, cuda = BatchSums(), torch.device("cuda:0")
        resumed.load_state_dict(saved.state_dict(), cuda)
        resumed.add({name: torch.ones((), device=cuda) for name in ("loss", "kl")}, 5)
        names, rows = resumed.rows(lambda rows: rows)
        assert names == ["loss", "kl"] and rows.shape == (2, 3)


def test_batch_sums_resume_on_the_device_of_the_module():
    # A fake GPU makes autograd start threads, after which no process forked from this one could train.
    process = multiprocessing.get_context("fork").Process(target=resume_on_a_fake_gpu)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_batch_sums_give_rows_and_the_mean_of_the_last_batches():
    sums = BatchSums()
    for images in (2, 3, 5):
        sums.add({"loss": torch.tensor(float(images**2)), "kl": torch.tensor(1.0)}, images)
    names, rows = sums.rows(lambda rows: 2 * rows)
    assert names == ["loss", "kl"] and rows.dtype == torch.float64
    assert rows.tolist() == [[4, 8, 2], [6, 18, 2], [10, 50, 2]]
    assert sums.mean("loss", 1).item() == pytest.approx(34 / 8)


def test_totals_are_means_over_images_in_float64():
    totals = Totals()
    totals.add({"loss": torch.tensor(3.0), "mean": torch.ones(2)}, 1)
    totals.add({"loss": torch.tensor(5.0), "mean": torch.zeros(2)}, 3)
    means = totals.gather(1).means()
    assert means["loss"].item() == 2 and means["mean"].tolist() == [0.25, 0.25]
    assert all(mean.dtype == torch.float64 for mean in means.values())
