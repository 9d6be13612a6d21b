import contextlib
import io
from dataclasses import replace

import pytest
import torch

from betavae.data.image_set import ImageSet
from betavae.errors import UserError
from betavae.metrics import features


def bars(n):
    """Draw n horizontal or vertical bars, the two classes, at random positions."""
    labels = torch.arange(n) % 2
    pixels = torch.zeros(n, 1, 12, 12, dtype=torch.uint8)
    for i in range(n):
        position = torch.randint(12, ()).item()
        pixels[i, 0, position] = 255
        if labels[i]:
            pixels[i, 0] = pixels[i, 0].T.clone()
    return ImageSet(pixels, labels)


@pytest.mark.forked
def test_a_classifier_is_cached_and_retrained_for_other_data(tmp_path):
    def load_or_train(train):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            return *features.load_or_train(tmp_path / "new" / "bars.pt", train, test), output.getvalue()

    train, test = bars(2000), bars(300)
    model, accuracy, output = load_or_train(train)
    assert accuracy > 0.97 and "once" in output
    assert not model.training and not any(weights.requires_grad for weights in model.parameters())
    x = test.pixels.float() / 255
    found = model.features(x)
    assert found.shape == (300, features.FEATURE_DIM)
    assert (model.classify(found) == test.labels).float().mean().item() == pytest.approx(accuracy)
    again, cached_accuracy, output = load_or_train(train)
    assert cached_accuracy == accuracy and torch.equal(again.features(x), found)
    assert "once" not in output and "once" in load_or_train(bars(200))[2]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 48), (3, 5, 9), (1, 1, 2000), (3, 1, 1)])
def test_a_classifier_accepts_any_shape(shape):
    assert features.Classifier(shape, torch.arange(7))(torch.rand(2, *shape)).shape == (2, 7)


def test_too_few_images_or_classes_train_no_classifier(tmp_path, capsys):
    with pytest.raises(UserError, match="150 images are too few to learn from: expected at least 200"):
        features.train_classifier(bars(150))
    one_class = replace(bars(200), labels=torch.zeros(200, dtype=torch.int64))
    for images, reason in ((bars(150), "150 training images are too few"), (one_class, "at least two classes")):
        assert features.load_or_train(tmp_path / "x.pt", images, images) == (None, 0.0)
        assert reason in capsys.readouterr().out
