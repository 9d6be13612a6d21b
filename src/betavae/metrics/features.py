"""A small classifier whose last hidden layer compares images better than their pixels do.

Inception's features are made for photographs of 299 x 299 pixels and tell little about 28 x 28 digits.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from betavae.data.fingerprint import fingerprint
from betavae.data.image_set import ImageSet
from betavae.errors import UserError
from betavae.storage.cache import load_or_compute

FEATURE_DIM = 64
EPOCHS = 4
MIN_IMAGES = 200  # for training, and the batch size


class Classifier(nn.Module):
    """A convolutional classifier of images `(B, C, H, W)` in [0, 1] with logits `(B, K)`.

    It pools down to at most 7 by 7 pixels. `labels` `(K,)` are the distinct labels, any integers.
    """

    labels: Tensor

    def __init__(self, image_shape: tuple[int, ...], labels: Tensor):
        super().__init__()
        self.register_buffer("labels", labels)
        channels, height, width = image_shape
        layers: list[nn.Module] = []
        for out in (32, 64, 64, 64, 64, 64):
            if layers and max(height, width) <= 7:
                break
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            channels, height, width = out, (height + 1) // 2, (width + 1) // 2
        hidden = [nn.Flatten(), nn.Linear(channels * height * width, FEATURE_DIM), nn.ReLU()]
        self.body = nn.Sequential(*layers, *hidden)
        self.head = nn.Linear(FEATURE_DIM, len(labels))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.body(x), 0.2, self.training))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Return the non-negative features `(B, FEATURE_DIM)` of images."""
        return torch.cat([self.body(batch) for batch in x.split(500)])

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Return the likeliest label of each image `(B,)` from its features."""
        return self.labels[self.head(features).argmax(1)]


def train_classifier(images: ImageSet, seed: int = 0, epochs: int = EPOCHS, batch_size: int = MIN_IMAGES) -> Classifier:
    """Train a classifier on images that are shifted by up to two pixels (for MNIST a minute on two cores).

    Raises:
        UserError: For fewer than `batch_size` images.
    """
    if len(images) < batch_size:
        raise UserError(f"{len(images)} images are too few to learn from: expected at least {batch_size}")
    shape = tuple(images.pixels.shape[1:])
    labels, classes = images.labels.unique(return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(shape, labels)
        optimizer = torch.optim.Adam(model.parameters())
        steps = epochs * (len(images) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(2, steps))
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for rows in order[: len(order) // batch_size * batch_size].split(batch_size):
                x = images.pixels.index_select(0, rows).float() / 255
                down, right = torch.randint(5, (2,), generator=generator).tolist()
                x = F.pad(x, (2, 2, 2, 2))[:, :, down : down + shape[1], right : right + shape[2]]
                optimizer.zero_grad()
                F.cross_entropy(model(x), classes[rows]).backward()
                optimizer.step()
                schedule.step()
    return model.eval().requires_grad_(False)


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 of the weights of a model.

    It tells classifiers apart with and without a cache file.
    """
    digest = hashlib.sha256()
    for weights in model.state_dict().values():
        digest.update(weights.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_or_train(path: Path, train_set: ImageSet, test_set: ImageSet) -> tuple[Classifier | None, float]:
    """Load the classifier of `train_set` from a cache file, or train it, and print the kind of features.

    Returns:
        The classifier in evaluation mode and its accuracy on `test_set`; None if `train_set` is too small or has not
        one label per image of at least two classes.
    """
    shape, labels = tuple(train_set.pixels.shape[1:]), train_set.labels.unique()
    if len(train_set) < MIN_IMAGES:
        print(f"features are pixels: {len(train_set)} training images are too few to learn features from")
        return None, 0.0
    if train_set.labels.ndim > 1 or len(labels) < 2:
        print("features are pixels: a classifier needs one label per image and at least two classes")
        return None, 0.0

    def compute() -> dict[str, Any]:
        print(f"training the classifier that computes features, once, for {path} ...", flush=True)
        model = train_classifier(train_set)
        predicted = model.classify(model.features(test_set.tensor().float() / 255))
        return {"state": model.state_dict(), "accuracy": (predicted == test_set.labels).float().mean().item()}

    data = [fingerprint(images, labels=True) for images in (train_set, test_set)]
    cached = load_or_compute(path, {"data": data, "shape": list(shape), "version": 2}, compute)
    model = Classifier(shape, labels)
    model.load_state_dict(cached["state"])
    print(f"features are those of a classifier with test accuracy {cached['accuracy']:.2%}, {path}")
    return model.eval().requires_grad_(False), cached["accuracy"]
