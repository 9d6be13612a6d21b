"""Measure the AUROC of each anomaly score: `python scripts/benchmarks/anomalies.py [data_root=data]`.

For each seed, trains the tutorial's network (784-400-20, six epochs, Muon, Bernoulli on gray pixels) on MNIST, on
FashionMNIST, and on MNIST without each of its ten digits. Prints the AUROC of every score for every kind of outlier
and the share of ordinary test images that are flagged, both unchanged and after a change of their processing.
The default score and its constants were chosen on seed 0; the tables are of other seeds.
"""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from betavae.applications.anomalies.detector import (
    DEFAULT_SCORE,
    FAST_SCORES,
    SLOW_SCORES,
    Detector,
    compute_p_values,
    false_alarm_rate,
)
from betavae.data.source import DataSource
from betavae.models.vae import VAE
from betavae.objectives import elbo
from betavae.optim import MuonAdam
from betavae.runtime.cli import ScriptSettings, script_command
from betavae.storage.cache import load_or_compute
from betavae.storage.files import STAMP, atomic_path

NUM_VALIDATION = 5_000
ALPHA = 0.01
# The data set and the digit that is left out of it.
MODELS: list[tuple[str, int | None]] = [
    ("mnist", None),
    ("fashion_mnist", None),
    *(("mnist", digit) for digit in range(10)),
]

Table = dict[str, dict[str, list[float]]]  # row, score, one value per model


class Settings(ScriptSettings):
    seeds: Annotated[list[int], Field(min_length=1)] = Field([1, 2, 3], title="a list of seeds of the models")
    data_root: str = Field("data", title="the data folder, for MNIST and FashionMNIST")
    out: str = Field("runs/anomaly_benchmark", title="the folder for results.json and the models, which are used again")
    slow_images: NonNegativeInt = Field(0, title="images of each kind for the slow scores nll and regret; 0: none")


def train(x: Tensor, seed: int, epochs: int = 6, batch_size: int = 512) -> VAE:
    torch.manual_seed(seed)
    vae = VAE("mlp", [400], 20, "relu", "bernoulli", x.shape[1:])
    vae.init_from_mean_image(x.float().mean(0) / 255)
    optimizer = MuonAdam(vae.parameters(), 0.06, 0.9, 0.0, 5e-3, (0.9, 0.999), 1e-8)
    steps = epochs * (len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for index in torch.randperm(len(x))[: len(x) // batch_size * batch_size].split(batch_size):
            batch = x.index_select(0, index).float() / 255
            optimizer.zero_grad()
            elbo(vae, batch, torch.randn(1, batch_size, 20), 1.0).loss.backward()
            optimizer.step()
            schedule.step()
    return vae.requires_grad_(False)


def load_or_train(path: Path, x: Tensor, seed: int) -> VAE:
    state = load_or_compute(path, {"seed": seed, "images": len(x)}, lambda: dict(train(x, seed).state_dict()))
    vae = VAE("mlp", [400], 20, "relu", "bernoulli", x.shape[1:]).requires_grad_(False)
    vae.load_state_dict(state)
    return vae


def make_outliers(x: Tensor) -> dict[str, Tensor]:
    """Make outliers from test images, and from noise and constants of their shape."""
    levels = torch.linspace(0, 255, len(x)).round().byte().view(-1, 1, 1, 1)
    noise = torch.randint(0, 256, x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return {
        "noise": noise,
        "constant": levels.expand(x.shape).contiguous(),
        "inverted": 255 - x,
        "shifted 5, 5": torch.roll(x, (5, 5), (2, 3)),
        "rotated 90": torch.rot90(x, 1, (2, 3)),
    }


def change_processing(x: Tensor) -> dict[str, Tensor]:
    """Return ordinary images unchanged, resampled through another size, and after JPEG compression."""

    def resample(size: int) -> Tensor:
        resized = F.interpolate(x.float(), (size, size), mode="bicubic", antialias=True)
        return F.interpolate(resized, x.shape[2:], mode="bicubic", antialias=True).round().clamp(0, 255).byte()

    return {
        "unchanged": x,
        "enlarged from 20 x 20": resample(20),
        "enlarged from 14 x 14": resample(14),
        "enlarged to 56 x 56 and back": resample(56),
        "JPEG of quality 50": torch.stack([decode_jpeg(encode_jpeg(image, 50)) for image in x]),
    }


class Benchmark:
    """The results over all models."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.out = Path(settings.out)
        self.images = {}
        for name in ("mnist", "fashion_mnist"):
            source = DataSource(name, settings.data_root, 0, "none")
            sets = [source.load_split(split) for split in ("train", "test")]
            self.images[name] = [(images.pixels, images.labels) for images in sets]
        self.order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
        self.auroc: Table = defaultdict(lambda: defaultdict(list))
        self.flagged: Table = defaultdict(lambda: defaultdict(list))
        self.false_alarms: dict[str, list[float]] = defaultdict(list)
        self.images_per_second = 0.0

    def measure(self, name: str, left_out: int | None, seed: int) -> None:
        """Train or load one model, fit its detector and record the results."""
        (x, labels), (test, test_labels) = self.images[name]
        validation, fitted = (
            x[part if left_out is None else part[labels[part] != left_out]]
            for part in self.order.split([NUM_VALIDATION, 60_000 - NUM_VALIDATION])
        )
        vae = load_or_train(self.out / f"{name}_{left_out}_{seed}.pt", fitted, seed)
        detector = Detector.fit(vae, fitted, validation)
        if left_out is None:
            ordinary, group = test, name
            self.record_flagged(detector, name, ordinary)
            other = "mnist" if name == "fashion_mnist" else "fashion_mnist"
            outliers = {f"{name}: {other}": self.images[other][1][0]}
            outliers |= {f"{name}: {kind}": images for kind, images in make_outliers(test).items()}
        else:
            ordinary, group = test[test_labels != left_out], "mnist without a digit"
            outliers = {f"mnist without {left_out}": test[test_labels == left_out]}
        started = time.perf_counter()
        detector.compute_scores(ordinary, (DEFAULT_SCORE,))
        self.images_per_second = max(self.images_per_second, len(ordinary) / (time.perf_counter() - started))
        for kind, scores in self.score_outliers(detector, ordinary, outliers).items():
            rows = [kind] if left_out is None else ["digits left out", kind]
            for row in rows:
                for score, auroc in scores.items():
                    self.auroc[row][score].append(auroc)
        share = (detector.compute_p_values(ordinary) <= ALPHA).double().mean().item()
        self.false_alarms[group].append(share)

    def record_flagged(self, detector: Detector, name: str, ordinary: Tensor) -> None:
        for change, changed in change_processing(ordinary).items():
            for score, values in detector.compute_scores(changed).items():
                share = (compute_p_values(values, detector.state["calibration"][score]) <= ALPHA).double().mean().item()
                self.flagged[f"{name}: {change}"][score].append(share)

    def score_outliers(
        self, detector: Detector, ordinary: Tensor, outliers: dict[str, Tensor]
    ) -> dict[str, dict[str, float]]:
        """Return the AUROC of each score for each kind of outlier."""
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for names in (FAST_SCORES, SLOW_SCORES) if self.settings.slow_images else (FAST_SCORES,):
            limit = self.settings.slow_images if names == SLOW_SCORES else None
            inside = detector.compute_scores(ordinary[:limit], names)
            for row, images in outliers.items():
                for score, values in detector.compute_scores(images[:limit], names).items():
                    truth = [0] * len(inside[score]) + [1] * len(values)
                    found[row][score] = roc_auc_score(truth, torch.cat((inside[score], values)).numpy())
        return found

    def print_results(self) -> None:
        scores = [*FAST_SCORES, *(SLOW_SCORES if self.settings.slow_images else ())]
        tables = (("AUROC", self.auroc, scores), (f"flagged at alpha={ALPHA}", self.flagged, list(FAST_SCORES)))
        for title, table, columns in tables:
            print(f"\n{title}, mean over {len(self.settings.seeds)} seeds\n| images | {' | '.join(columns)} |")
            print("|---" * (1 + len(columns)) + "|")
            for row, values in table.items():
                print(f"| {row} | {' | '.join(f'{sum(values[s]) / len(values[s]):.4f}' for s in columns)} |")
        rate = false_alarm_rate(ALPHA, NUM_VALIDATION, 10_000)
        print(f"\nfalse alarms among test images at alpha={ALPHA} ({DEFAULT_SCORE}): expected mean {rate.mean:.4f},")
        print(f"and {rate.low:.4f} to {rate.high:.4f} for 95 % of calibration sets")
        for group, shares in self.false_alarms.items():
            print(f"{group}: {' '.join(f'{share:.4f}' for share in shares)}")
        print(f"\n{DEFAULT_SCORE}: {self.images_per_second:,.0f} images/s")

    def save_results(self) -> None:
        results = {"auroc": self.auroc, "flagged": self.flagged, "false_alarms": self.false_alarms}
        with atomic_path(self.out / "results.json") as path:
            path.write_text(json.dumps({"made_by": STAMP} | results, indent=2) + "\n")


@script_command(Settings)
def main(settings: Settings) -> None:
    benchmark = Benchmark(settings)
    for seed in settings.seeds:
        for name, left_out in MODELS:
            benchmark.measure(name, left_out, seed)
            print(f"seed {seed}, {name}" + (f" without {left_out}" if left_out is not None else ""), flush=True)
    benchmark.print_results()
    benchmark.save_results()


if __name__ == "__main__":
    main()
