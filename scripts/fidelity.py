"""Compare generated images with real ones: `python scripts/fidelity.py [ckpt=PATH sampler=knn]`."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from betavae.runtime.cli import DataSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import IntAtLeast2, PathStr, RegisteredName

BATCH_SIZE = 1000
MIN_IMAGES = 10  # in each repeat
COPIES = 12  # rows of figures/fidelity.png


class Settings(DataSettings, SeedSettings):
    sampler: Annotated[str, RegisteredName("betavae.applications.sampling", "SAMPLERS")] | None = Field(
        None, title="prior, gaussian, mixture, knn; null: all of them"
    )
    n: IntAtLeast2 = Field(2000, title="images in each repeat; fewer if there are too few test or training images")
    repeats: IntAtLeast2 = Field(5, title="repeats for the standard errors; no image is in two of them")
    reference: IntAtLeast2 = Field(60_000, title="maximum number of training images to compare with")
    out: PathStr | None = Field(None, title="folder of fidelity.json and figures/fidelity.png; null: the run's")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch

        from betavae import grids
        from betavae.applications.sampling import SAMPLERS, load_or_fit_sampler
        from betavae.errors import UserError
        from betavae.metrics.features import hash_weights, load_or_train
        from betavae.metrics.fidelity import Reference, find_likely_copies
        from betavae.runtime import checkpoint
        from betavae.runtime.run_folder import read_json
        from betavae.storage.files import STAMP, atomic_path, hash_file

    run = checkpoint.load(settings.ckpt, settings.runs)
    run.require_images("fidelity.py")
    if not run.scaling.is_bytes:
        raise UserError(
            f"{run.path} was trained on {run.scaling.dtype} with data.scaling={run.scaling.mode}: expected a model of "
            "uint8 images with data.scaling=unit, which the features are made for"
        )
    folder = Path(settings.out) if settings.out else run.folder
    # The mean of p(x|z) is the gray value of a pixel that training binarizes again for every batch.
    gray = run._replace(data=run.data | {"binarize": "none"}) if run.data.get("binarize") == "dynamic" else run
    train = gray.subset("train", settings.data_root, settings.reference)
    x, labels, test = train.tensor(), train.labels, gray.subset("test", settings.data_root)
    x_test = test.tensor()
    n = min(settings.n, len(x_test) // settings.repeats, len(x))
    if n < MIN_IMAGES:
        raise UserError(
            f"repeats={settings.repeats} reference={settings.reference} is invalid: expected at least {MIN_IMAGES} "
            f"images in each repeat ({len(x_test):,} test and {len(x):,} training images leave {n})"
        )
    total = n * settings.repeats
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = torch.randperm(len(x_test), generator=generator)[:total]
    x_test, test_labels = x_test[chosen], test.labels[chosen]
    order = torch.randperm(len(x), generator=generator)
    x, labels = x[order], labels[order]
    # A conditional model draws images of these labels, which are as frequent as in training.
    sampled_labels = labels[torch.arange(total) % len(labels)]

    made_with: dict[str, Any] = {
        "made_by": STAMP,
        "checkpoint": str(run.path.relative_to(run.folder)),
        "sha256": hash_file(run.path),
        "data": run.data["name"],
        **{"images": n, "repeats": settings.repeats, "reference": len(x), "seed": settings.seed},
    }
    source, path = gray.data_source(settings.data_root), Path(settings.runs) / "features" / f"{run.data['name']}.pt"
    classifier, accuracy = load_or_train(path, source.load_split("train"), source.load_split("test"))
    if classifier:
        made_with["features"] = {"sha256": hash_weights(classifier), "test_accuracy": accuracy}
    reference = Reference((batch.float() / 255 for batch in x.split(BATCH_SIZE)), labels, classifier)

    names = [settings.sampler] if settings.sampler else list(SAMPLERS)
    # All are fitted before the first is scored: a class may have too few images.
    samplers = {name: load_or_fit_sampler(name, run, settings.data_root, labels=sampled_labels) for name in names}
    result: dict[str, Any] = {}
    latents, features = {}, {}
    with atomic_path(folder / "fidelity.json") as path:
        for name in [*names, "reconstructions", "test images"]:
            batches = (batch.float() / 255 for batch in x_test.split(BATCH_SIZE))
            if name in SAMPLERS:
                latents[name] = samplers[name].sample(total, torch.Generator().manual_seed(settings.seed))
                pairs = zip(latents[name].split(BATCH_SIZE), sampled_labels.split(BATCH_SIZE), strict=True)
                batches = (run.vae.given(some).decode(z).clamp(0, 1) for z, some in pairs)
            elif name == "reconstructions":
                pairs = zip(batches, test_labels.split(BATCH_SIZE), strict=True)
                batches = (run.vae.given(some).reconstruct(batch).clamp(0, 1) for batch, some in pairs)
            wanted = sampled_labels if name in SAMPLERS else test_labels
            result[name], features[name] = reference.score(batches, n, wanted if run.vae.classes else None)
            if name == names[0]:
                print(f"{settings.repeats} repeats of {n:,} images, {len(x):,} training images; ± standard error")
                if n < settings.n:
                    few = f"{len(test):,} test and {len(x):,} training images"
                    print(f"n={settings.n} is too much for {settings.repeats} repeats with {few}")
                print(" " * 16 + "  ".join(f"{score:<16}" for score in result[name]).rstrip())
            cells = (format_score(cell["mean"], cell["se"]) for cell in result[name].values())
            print(f"{name:<16}" + "  ".join(f"{cell:<16}" for cell in cells).rstrip(), flush=True)
        # Earlier results of other samplers stay if they were made in the same way.
        earlier = read_json(folder / "fidelity.json")
        others = {name: earlier[name] for name in SAMPLERS if name in earlier and name not in result}
        if changed := [key for key, value in made_with.items() if earlier.get(key) != value]:
            if others:
                print(f"results of {', '.join(others)} are dropped: made with another {', '.join(changed)}")
            others = {}
        result |= others
        best = min((name for name in SAMPLERS if name in result), key=lambda name: result[name]["fid"]["mean"])
        path.write_text(json.dumps(made_with | result | {"best": best, "fid": result[best]["fid"]}, indent=2) + "\n")

    best = min(names, key=lambda name: result[name]["fid"]["mean"])
    rows, nearest = find_likely_copies(features[best], reference.features, COPIES)
    samples = run.vae.given(sampled_labels[rows]).decode(latents[best][rows]).clamp(0, 1)
    grid = torch.cat((samples[:, None], x[nearest].float() / 255), 1).flatten(0, 1)
    figure = folder / "figures" / "fidelity.png"
    ranks = ["sample", *(str(rank) for rank in range(1, 1 + nearest.shape[1]))]
    caption = f"samples of sampler={best} that may be copies, and their nearest training images; {run.caption}"
    grids.save_grids([grids.Grid(grid, len(ranks), column_labels=ranks)], figure, caption)
    print(f"wrote {folder / 'fidelity.json'} and {figure}")
    print(
        f"each row of the figure: a sample of sampler={best} that may be a copy, and its {nearest.shape[1]} nearest "
        "training images"
    )


def format_score(mean: float, se: float) -> str:
    """Return a score ± its standard error, with as many decimals as the error needs for two digits."""
    if not 0 < se < math.inf:
        return f"{mean:.4f} ± {se:.1g}"
    decimals = max(0, 1 - math.floor(math.log10(se)))
    return f"{mean:.{decimals}f} ± {se:.{decimals}f}"


if __name__ == "__main__":
    main()
