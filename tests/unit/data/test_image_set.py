import pytest
import torch

from betavae.data import image_set
from betavae.data.datasets.sprites import Sprites
from betavae.data.image_set import ImageSet, LazySubset
from betavae.errors import UserError

NUMBERS, NAMES = ["10", "20", "30"], ["cat", "dog", "fox"]


def test_subsets_of_subsets_have_the_right_images():
    pixels = torch.arange(12, dtype=torch.uint8).view(6, 2, 1, 1)
    inner = LazySubset(pixels, torch.tensor([5, 3, 1, 0]))
    outer = LazySubset(inner, torch.tensor([2, 0]))
    assert len(outer) == 2 and outer.shape == (2, 2, 1, 1)
    assert torch.equal(outer.index_select(0, torch.tensor([1, 0, 1])), pixels[[5, 1, 5]])


def test_a_subset_is_copied_to_a_device_but_not_to_the_cpu():
    drawn, stored = LazySubset(Sprites(32), torch.arange(3)), LazySubset(torch.zeros(9, 1, 2, 2), torch.arange(3))
    assert isinstance(drawn.to("meta").pixels, Sprites) and drawn.to("meta").index.device.type == "meta"
    assert isinstance(stored.to("meta"), torch.Tensor) and stored.to("meta").shape == (3, 1, 2, 2)
    assert stored.to("cpu") is stored


def test_labels_are_found_by_the_name_of_their_class():
    numbered, named = (ImageSet(torch.zeros(3, 1, 1, 1), torch.arange(3), classes) for classes in (NUMBERS, NAMES))
    assert numbered.find_label(20) == numbered.find_label("20") == named.find_label("dog") == named.find_label(1) == 1
    for images, label, expected in ((numbered, 1, "one of 10, 20, 30"), (named, 3, "one of cat, dog, fox")):
        with pytest.raises(UserError, match=f"label={label} is invalid: expected {expected}"):
            images.find_label(label)


def test_selected_images_keep_their_labels_and_names(monkeypatch):
    images = ImageSet(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.arange(4), names=list("abcd"))
    for limit in (4, 3):
        monkeypatch.setattr(image_set, "MAX_COPY_BYTES", limit)
        some = images.select(torch.tensor([3, 1]))
        assert isinstance(some.pixels, LazySubset) == (limit == 3)
        assert some.tensor().flatten().tolist() == some.labels.tolist() == [3, 1] and some.names == ["d", "b"]
