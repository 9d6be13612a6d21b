"""What a trained VAE is worth on the test images: `python scripts/evaluate.py [ckpt=PATH k=5000 memory_mb=16]`."""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from betavae.cli import command, importing


def figure_of(result: dict[str, Any]) -> Any:
    from betavae.figures import new_figure

    figure = new_figure(9, 3)
    left, right = figure.subplots(1, 2)
    ks = result["k"]
    bounds = [result[f"nll_{k}"] for k in ks]
    left.errorbar(ks, [b["mean"] for b in bounds], [b["se"] for b in bounds], marker="o", capsize=3)
    left.set_xscale("log")
    left.set_xlabel("importance samples K")
    left.set_ylabel("bound on -log p(x) [nats]")
    kl = sorted(result["kl_per_dimension"], reverse=True)
    right.bar(range(1, len(kl) + 1), kl)
    right.set_xlabel(f"latent dimensions by their KL, {result['active_units']} of {len(kl)} active")
    right.set_ylabel("KL [nats]")
    return figure


def lines(result: dict[str, Any]) -> list[str]:
    """What is printed: each mean with its standard error over images."""

    def value(name: str) -> str:
        return f"{result[name]['mean']:8.3f} ± {result[name]['se']:.3f}"

    texts = [
        f"neg. ELBO       {value('neg_elbo')}   ({result['k'][-1]:,} posterior samples)",
        f"  distortion    {value('distortion')}",
        f"  rate          {value('rate')}",
        *(f"{'NLL' if not i else '   '} K={k:<9}{value(f'nll_{k}')}" for i, k in enumerate(result["k"])),
        f"active units    {result['active_units']} of {len(result['kl_per_dimension'])}",
    ]
    a = result["aggregate"]
    texts += [
        f"rate {a['mutual_information'] + a['marginal_kl']:.2f} = mutual information {a['mutual_information']:.2f} "
        f"(at most log {result['images']} = {a['mutual_information_limit']:.2f})",
        f"  + KL(aggregate posterior || prior) {a['marginal_kl']:.2f}, of which its mean and covariance make up "
        f"{a['moments_kl']:.2f}",
    ]
    if "knn_accuracy" in result:
        texts.append(
            f"digits from posterior means: 5 nearest neighbours {result['knn_accuracy']:.2%}, linear "
            f"{result['linear_accuracy']:.2%}"
        )
    return [*texts, f"note  {result['note']}"]


def unfinished(kept: Path, asked: dict[str, Any]) -> list[tuple]:
    """What an evaluation that was stopped has left, if it was asked the same."""
    import torch

    try:
        content = torch.load(kept, weights_only=True)
        return content["parts"] if content["asked"] == asked else []
    except Exception:  # there is none, or it is no such file
        return []


@command("evaluate")
def main(cfg: DictConfig) -> None:
    with importing():
        import torch
        from tqdm import tqdm

        from betavae import checkpoint, evaluation
        from betavae.data import test_set
        from betavae.errors import UserError
        from betavae.figures import save_figure, writing
        from betavae.likelihoods import meaning
        from betavae.rules import check

    check(cfg)
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    loaded = checkpoint.load(cfg.ckpt, cfg.runs)
    x, labels = (part[: cfg.first] for part in test_set(loaded.data, cfg.data_root))
    device = cfg.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        vae = loaded.vae.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device} cannot be: {str(error).splitlines()[0]}") from error

    home = loaded.path.parent.parent if loaded.path.parent.name == "checkpoints" else loaded.path.parent
    print(f"{loaded.path} on {len(x):,} test images, nats per image, ± standard error over images")
    ks = [10**power for power in range(20) if 10**power < cfg.k] + [cfg.k]
    started = time.perf_counter()
    folder = Path(cfg.folder) if cfg.folder else home
    asked = {"file": hashlib.md5(loaded.path.read_bytes()).hexdigest(), "images": len(x)}
    asked |= {"k": ks, "seed": cfg.seed, "matmul_precision": cfg.matmul_precision}
    kept = folder / "evaluation.part"
    parts = [evaluation.PerImage(*part) for part in unfinished(kept, asked)]
    if parts:
        print(f"going on after the {len(parts) * evaluation.GROUP:,} images that are in {kept}")

    def progress(groups: range) -> Iterator[int]:
        saved = -math.inf
        for first in tqdm(groups, "images / 32", len(parts) + len(groups), initial=len(parts), disable=None):
            yield first
            if time.monotonic() > saved + 5:
                checkpoint.save({"asked": asked, "parts": [tuple(part) for part in parts]}, kept)
                saved = time.monotonic()

    per_image = evaluation.importance_sample(vae, x, ks, cfg.seed, cfg.memory_mb, progress, parts)
    seconds = time.perf_counter() - started
    if not all(part.isfinite().all() for part in per_image):
        raise UserError(f"{loaded.path} gives numbers that are not finite, so there is nothing to evaluate")
    result: dict[str, Any] = {
        "checkpoint": str(loaded.path.relative_to(home)),
        "data": f"{loaded.data['name']}, binarize={loaded.data['binarize']}",
        "likelihood": loaded.settings["model"]["likelihood"],
        "note": meaning(loaded.settings["model"]["likelihood"], loaded.data["binarize"])[0],
        "images": len(x),
        "k": ks,
        "seed": cfg.seed,
        "matmul_precision": cfg.matmul_precision,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "sampling_seconds": round(seconds, 1),
    }
    result |= evaluation.summary(per_image, ks)
    if cfg.probes and find_spec("sklearn") is None:
        print('classification of the digits left out: it comes with `pip install -e ".[evaluation]"`')
    elif cfg.probes:
        train, train_labels = test_set(loaded.data, cfg.data_root, "train")
        means = evaluation.posterior_means(vae, train)
        result |= evaluation.probes(means, train_labels, per_image.mean.float(), labels)
    print("\n".join(lines(result)))

    with writing(folder / "evaluation.json") as path:
        path.write_text(json.dumps(result, indent=2) + "\n")
    kept.unlink(missing_ok=True)
    save_figure(figure_of(result), folder / "figures" / "evaluation.png")
    print(f"in {folder / 'evaluation.json'} and {folder / 'figures' / 'evaluation.png'}")


if __name__ == "__main__":
    main()
