import pytest
import torch

from betavae.data.image_set import ImageSet
from betavae.data.loader import BatchLoader, binarize_images, binarize_pixels
from tests.unit.data.conftest import numbered


def labels_of(batches):
    return torch.cat([label for _, label in batches])


def test_training_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch, reshuffle=True):
        return labels_of(BatchLoader(numbered(1000), 128, lambda: epoch, seed, reshuffle))

    assert torch.equal(order(0, 3).sort().values, torch.arange(1000))
    assert torch.equal(order(0, 3), order(0, 3))
    assert not torch.equal(order(0, 3), order(0, 4)) and not torch.equal(order(0, 3), order(1, 3))
    assert torch.equal(order(0, 3, False), order(0, 4, False)) and not torch.equal(order(0, 3, False), order(1, 3))
    assert torch.equal(order(0, 0, False), order(0, 0))


def test_evaluation_keeps_the_order_of_the_images():
    assert torch.equal(labels_of(BatchLoader(numbered(100), 16)), torch.arange(100))


def test_batches_are_floats_from_0_to_1():
    batches = BatchLoader(numbered(256, torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)), 100)
    x = torch.cat([x for x, _ in batches])
    assert x.dtype == torch.float32 and torch.equal(x.flatten(), torch.arange(256) / 255)
    assert [len(label) for _, label in batches] == [100, 100, 56] and len(batches) == 3


def test_a_loaded_state_continues_within_an_epoch():
    def make():
        return BatchLoader(numbered(100), 16, lambda: 2, seed=5)

    labels = [label for _, label in make()]
    stopped, resumed = make(), make()
    iterator = iter(stopped)
    next(iterator), next(iterator), next(iterator)
    resumed.load_state_dict(stopped.state_dict())
    rest = [label for _, label in resumed]
    assert len(rest) == len(labels) - 3 and all(map(torch.equal, rest, labels[3:]))


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
def test_images_on_the_host_are_prefetched_by_one_batch(binarize):
    images = ImageSet(torch.randint(256, (103, 1, 4, 4), dtype=torch.uint8), torch.arange(103))
    plain, prefetched = (BatchLoader(images, 10, lambda: 3, binarize=binarize) for _ in range(2))
    taken = []
    for batches, start in ((plain, plain.__iter__), (prefetched, prefetched.iter_from_host)):
        torch.manual_seed(0)
        iterator = start()
        taken.append([next(iterator) for _ in range(4)])
        assert batches.state_dict() == {"epoch": 3, "batches": 4}  # the prefetched batch does not count
        taken[-1] += list(start())  # resumed
        assert batches.state_dict() == {"epoch": 3, "batches": 11} and len(taken[-1]) == 11
    for (x, label), (other, other_label) in zip(*taken, strict=True):
        assert torch.equal(x, other) and torch.equal(label, other_label)
    plain.load_state_dict({"epoch": -1, "batches": 0})
    plain.device = torch.device("meta")
    assert {(x.device.type, x.dtype, label.device.type) for x, label in plain} == {("meta", torch.float32, "meta")}


@pytest.mark.parametrize("epoch", [None, lambda: 1])
def test_shards_do_not_overlap(epoch):
    shards = [BatchLoader(numbered(101), 8, epoch) for _ in range(2)]
    for rank, shard in enumerate(shards):
        shard.shard(rank, 2)
    seen = [labels_of(shard) for shard in shards]
    assert not set(seen[0].tolist()) & set(seen[1].tolist())
    assert len(seen[0]) + len(seen[1]) == (100 if epoch else 101)  # training drops an odd image, evaluation none
    assert [len(shard) for shard in shards] == [7, 7]


def test_the_shards_of_a_step_are_its_images_in_one_process():
    whole = next(iter(BatchLoader(numbered(103), 20, lambda: 3)))[1].tolist()
    halves = []
    for rank in (0, 1):
        half = BatchLoader(numbered(103), 10, lambda: 3)
        half.shard(rank, 2)
        halves.append(next(iter(half))[1])
    assert sorted(whole) == sorted(torch.cat(halves).tolist())


def test_threshold_sets_pixels_above_127():
    pixels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    assert binarize_pixels(pixels, "threshold").flatten().tolist() == [value > 127 for value in range(256)]
    x, _ = next(iter(BatchLoader(numbered(256, pixels), 256, binarize="threshold")))
    assert x.dtype == torch.float32 and x.flatten().tolist() == [float(value > 127) for value in range(256)]


def test_dynamic_binarization_draws_each_batch_afresh():
    ramp = numbered(4000, torch.arange(256, dtype=torch.uint8).repeat(4000, 1).view(4000, 1, 16, 16))
    x, other = (next(iter(BatchLoader(ramp, 4000, lambda: 0, binarize="dynamic")))[0] for _ in range(2))
    error = (x.mean(0).flatten() - torch.arange(256) / 255).abs().max()
    assert error < 0.04  # five standard errors of 4,000 draws
    assert set(x.unique().tolist()) == {0.0, 1.0} and not torch.equal(x, other)


def test_binarized_images_are_one_draw_for_all_seeds():
    pixels = torch.randint(256, (100, 1, 20, 20), dtype=torch.uint8)
    torch.manual_seed(1)
    first = binarize_images(numbered(100, pixels), "dynamic").pixels
    torch.manual_seed(2)
    assert torch.equal(first, binarize_images(numbered(100, pixels), "dynamic").pixels)
    assert set(first.unique().tolist()) == {0, 255} and not first[pixels == 0].any()
    assert (first[pixels == 255] == 255).all()
    assert first.float().mean().item() == pytest.approx(pixels.float().mean().item(), rel=0.02)
