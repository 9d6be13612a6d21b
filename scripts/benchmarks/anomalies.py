"""How well each score tells strange images from ordinary ones: `python scripts/anomaly_benchmark.py [data_root=data]`.

Trains the tutorial's net (784-400-20, six epochs, Muon, grey Bernoulli) on MNIST, on FashionMNIST, and on MNIST without
each of its ten digits, for each seed, and prints the AUROC of every score for every kind of outlier, from test images,
and the share of ordinary test images that are flagged, as they are and as they come another way.
The default score and its constants were chosen by seed 0; the tables are of other seeds.
"""

# mypy: disable-error-code="valid-type"

import json
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from betavae.applications.anomalies.detector import (
    DEFAULT_SCORE,
    FAST_SCORES,
    SLOW_SCORES,
    Detector,
    false_alarm_rate,
    p_values,
)
from betavae.data import DATASETS
from betavae.models.vae import VAE
from betavae.objectives import elbo
from betavae.optim import MuonAdam
from betavae.runtime.cli import ScriptSettings, script_command
from betavae.runtime.settings import NonEmptyStr, NonNegativeInt, constrained
from betavae.storage.cache import load_or_compute
from betavae.storage.files import STAMP, atomic_path

VALIDATION = 5_000
ALARM = 0.01


class Settings(ScriptSettings):
    seeds: constrained(list[int], "a list of seeds", min_length=1) = Field([1, 2, 3], title="of the models")
    data_root: NonEmptyStr = Field("data", title="where MNIST and FashionMNIST are")
    keep: NonEmptyStr = Field("runs/anomaly_benchmark", title="for models, which are not trained twice, and results")
    slow: NonNegativeInt = Field(0, title="so many images of a kind for nll and regret too")


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


def trained(path: Path, x: Tensor, seed: int) -> VAE:
    """The VAE that was kept in `path`, or a new one."""
    state = load_or_compute(path, {"seed": seed, "images": len(x)}, lambda: dict(train(x, seed).state_dict()))
    vae = VAE("mlp", [400], 20, "relu", "bernoulli", x.shape[1:]).requires_grad_(False)
    vae.load_state_dict(state)
    return vae


def made(x: Tensor) -> dict[str, Tensor]:
    """Outliers made of test images, or of nothing."""
    levels = torch.linspace(0, 255, len(x)).round().byte().view(-1, 1, 1, 1)
    noise = torch.randint(0, 256, x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return {
        "noise": noise,
        "constant": levels.expand(x.shape).contiguous(),
        "inverted": 255 - x,
        "shifted 5, 5": torch.roll(x, (5, 5), (2, 3)),
        "rotated 90": torch.rot90(x, 1, (2, 3)),
    }


def drifted(x: Tensor) -> dict[str, Tensor]:
    """Ordinary images that came another way."""

    def through(size: int) -> Tensor:
        there = F.interpolate(x.float(), (size, size), mode="bicubic", antialias=True)
        return F.interpolate(there, x.shape[2:], mode="bicubic", antialias=True).round().clamp(0, 255).byte()

    return {
        "as they are": x,
        "enlarged from 20 x 20": through(20),
        "enlarged from 14 x 14": through(14),
        "enlarged to 56 x 56, and back": through(56),
        "JPEG of quality 50": torch.stack([decode_jpeg(encode_jpeg(one, 50)) for one in x]),
    }


@script_command(Settings)
def main(settings: Settings) -> None:
    keep = Path(settings.keep)
    images = {}
    for name in ("mnist", "fashion_mnist"):
        sets = [DATASETS[name](Path(settings.data_root), split) for split in ("train", "test")]
        images[name] = [(part.pixels, part.labels) for part in sets if part is not None]
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    alarms: dict[str, list[float]] = defaultdict(list)
    drifts: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    rate = 0.0
    models: list[tuple[str, int | None]] = [
        ("mnist", None),
        ("fashion_mnist", None),
        *(("mnist", d) for d in range(10)),
    ]
    for seed in settings.seeds:
        for name, held in models:
            (x, labels), (test, test_labels) = images[name]
            ordinary = test if held is None else test[test_labels != held]
            parts = [part if held is None else part[labels[part] != held] for part in order.split([VALIDATION, 55_000])]
            validation, fitted = (x[part] for part in parts)
            vae = trained(keep / f"{name}_{held}_{seed}.pt", fitted, seed)
            detector = Detector.fit(vae, fitted, validation)
            if held is None:
                for sort, changed in drifted(ordinary).items():
                    for score, values in detector.scores(changed).items():
                        share = (p_values(values, detector.state["calibration"][score]) <= ALARM).double().mean().item()
                        drifts[f"{name}: {sort}"][score].append(share)
                other = "mnist" if name == "fashion_mnist" else "fashion_mnist"
                outliers = {other: images[other][1][0], **made(test)}
            else:
                outliers = {f"digit {held}": test[test_labels == held]}
            started = time.perf_counter()
            detector.scores(ordinary, (DEFAULT_SCORE,))
            rate = max(rate, len(ordinary) / (time.perf_counter() - started))
            for names in (FAST_SCORES, SLOW_SCORES) if settings.slow else (FAST_SCORES,):
                first = settings.slow if names == SLOW_SCORES else None
                inside = detector.scores(ordinary[:first], names)
                for sort, strange in outliers.items():
                    for score, values in detector.scores(strange[:first], names).items():
                        both = torch.cat((inside[score], values))
                        truth = [0] * len(inside[score]) + [1] * len(values)
                        row = f"{name}: {sort}" if held is None else "digits held out"
                        rows[row][score].append(roc_auc_score(truth, both.numpy()))
                        if held is not None:
                            rows[f"mnist without {held}"][score].append(rows[row][score][-1])
            alarms[name if held is None else "mnist without a digit"].append(
                (detector.p_values(ordinary) <= ALARM).double().mean().item()
            )
            print(f"seed {seed} {name} {held}", flush=True)

    scores = [*FAST_SCORES, *(SLOW_SCORES if settings.slow else ())]
    for title, table, columns in (("AUROC", rows, scores), (f"flagged at alarm={ALARM}", drifts, list(FAST_SCORES))):
        print(f"\n{title}, mean over {len(settings.seeds)} seeds\n| images | {' | '.join(columns)} |")
        print("|---" * (1 + len(columns)) + "|")
        for row, found in table.items():
            print(f"| {row} | {' | '.join(f'{sum(found[s]) / len(found[s]):.4f}' for s in columns)} |")
    expected = false_alarm_rate(ALARM, VALIDATION, 10_000)
    print(f"\nFalse alarms among test images at alarm={ALARM} ({DEFAULT_SCORE}); 95 % of the times between", end=" ")
    print(f"{expected.low:.4f} and {expected.high:.4f}, mean {expected.mean:.4f}")
    for name, shares in alarms.items():
        print(f"{name}: {' '.join(f'{share:.4f}' for share in shares)}")
    print(f"\n{DEFAULT_SCORE}: {rate:,.0f} images/s")
    with atomic_path(keep / "results.json", "keep") as path:
        content = {"made_by": STAMP, "auroc": rows, "drift": drifts, "false_alarms": alarms}
        path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
