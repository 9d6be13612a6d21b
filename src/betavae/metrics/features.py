"""A small classifier, whose last hidden layer says what two pictures have in common better than their pixels do.

Inception's features, of photographs of 299 x 299 pixels, tell little of 28 x 28 digits.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from betavae.data.fingerprint import fingerprint
from betavae.data.image_set import ImageSet
from betavae.errors import UserError
from betavae.storage.cache import load_or_compute

FEATURE_DIM = 64  # of the features
EPOCHS = 4
MIN_IMAGES = 200  # images to learn from


class Classifier(nn.Module):
    """Images `(B, C, H, W)` in [0, 1] -> logits `(B, K)`. Convolutions and pooling down to 7 pixels, or less.

    `labels` `(K,)` are the distinct labels, any integers.
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
        """`(B, WIDTH)`, not negative."""
        return torch.cat([self.body(part) for part in x.split(500)])

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """The likeliest label of each image, `(B,)`."""
        return self.labels[self.head(features).argmax(1)]


def train(images: ImageSet, seed: int = 0, epochs: int = EPOCHS, batch: int = MIN_IMAGES) -> Classifier:
    """A classifier of these images, shifted by up to two pixels each time. A minute on two cores for MNIST. Raises
    UserError for fewer than `batch` of them."""
    if len(images) < batch:
        raise UserError(f"{len(images)} images are too few to learn from: {batch} are the least")
    shape = tuple(images.pixels.shape[1:])
    labels, places = images.labels.unique(return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(shape, labels)
        optimizer = torch.optim.Adam(model.parameters())
        steps = epochs * (len(images) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(2, steps))
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for index in order[: len(order) // batch * batch].split(batch):
                x = images.pixels.index_select(0, index).float() / 255
                down, right = torch.randint(5, (2,), generator=generator).tolist()
                x = F.pad(x, (2, 2, 2, 2))[:, :, down : down + shape[1], right : right + shape[2]]
                optimizer.zero_grad()
                F.cross_entropy(model(x), places[index]).backward()
                optimizer.step()
                schedule.step()
    return model.eval().requires_grad_(False)


def load_or_train(path: Path, train_set: ImageSet, test_set: ImageSet) -> tuple[Classifier, float]:
    """The classifier of `train_set`, kept in the file `path`, and its accuracy on `test_set`."""
    shape, labels = tuple(train_set.pixels.shape[1:]), train_set.labels.unique()

    def make() -> dict[str, Any]:
        print(f"training the classifier whose features tell images apart, once, for {path} ...", flush=True)
        model = train(train_set)
        found = model.classify(model.features(test_set.tensor().float() / 255))
        return {"state": model.state_dict(), "accuracy": (found == test_set.labels).float().mean().item()}

    data = [fingerprint(images, labels=True) for images in (train_set, test_set)]
    made = load_or_compute(path, {"data": data, "shape": list(shape), "version": 2}, make)
    model = Classifier(shape, labels)
    model.load_state_dict(made["state"])
    return model.eval().requires_grad_(False), made["accuracy"]
