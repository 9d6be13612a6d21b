"""How good new images are, beside real ones: `python scripts/fidelity.py [ckpt=PATH sampler=mixture n=2000]`."""

# mypy: disable-error-code="valid-type"

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from betavae.runtime.cli import DataSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import IntAtLeast2, OptionalPathStr, choice

PART = 1000  # images at once


def samplers() -> list[str | None]:
    from betavae.applications.sampling import SAMPLERS

    return [None, *SAMPLERS]


class Settings(DataSettings, SeedSettings):
    sampler: choice(samplers) = Field(None, title="prior, gaussian, mixture, knn; null: all of them")
    n: IntAtLeast2 = Field(2000, title="images in each repeat; fewer, if there are not so many of test or training")
    repeats: IntAtLeast2 = Field(5, title="repeats, of which the standard error is, no image in two of them")
    reference: IntAtLeast2 = Field(60_000, title="training images at most, that samples are compared with")
    folder: OptionalPathStr = Field(None, title="for fidelity.json and figures/fidelity.png; null: the run's")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch
        from torch import Tensor

        from betavae import plotting
        from betavae.applications.sampling import MOST_IMAGES, SAMPLERS, load_or_fit_sampler
        from betavae.errors import UserError
        from betavae.metrics import features, fidelity
        from betavae.runtime import checkpoint
        from betavae.runtime.run_folder import read_json
        from betavae.storage.cache import file_hash
        from betavae.storage.files import STAMP, atomic_path

    run = checkpoint.load(settings.ckpt, settings.runs)
    folder = Path(settings.folder) if settings.folder else run.folder
    # A mean of p(x|z) is the grey value of a pixel that was drawn afresh for every batch.
    shown = run._replace(data=run.data | {"binarize": "none"}) if run.data.get("binarize") == "dynamic" else run
    source = shown.data_source(settings.data_root)
    train = shown.subset("train", settings.data_root, settings.reference)
    x, labels, x_test = train.tensor(), train.labels, shown.subset("test", settings.data_root).tensor()
    n = min(settings.n, len(x_test) // settings.repeats, len(x))
    if n < 10:
        raise UserError(
            f"repeats={settings.repeats} and reference={settings.reference} leave {n} images for each repeat, of "
            f"{len(x_test):,} test images and beside {len(x):,} training images; 10 are the least"
        )
    total = n * settings.repeats
    generator = torch.Generator().manual_seed(settings.seed)
    x_test = x_test[torch.randperm(len(x_test), generator=generator)[:total]]
    order = torch.randperm(len(x), generator=generator)
    x, labels = x[order], labels[order]

    made_with: dict[str, Any] = {
        "made_by": STAMP,
        "checkpoint": str(run.path.relative_to(run.folder)),
        "sha256": file_hash(run.path),
        "data": run.data["name"],
        **{"images": n, "repeats": settings.repeats, "reference": len(x), "seed": settings.seed},
    }
    classifier: features.Classifier | None = None
    space: Callable[[Tensor], Tensor] = fidelity.pixel_features
    everything = source.load_split("train")
    if labels.ndim == 1 and len(labels.unique()) > 1 and len(everything) >= features.MIN_IMAGES:
        path = Path(settings.runs) / "features" / f"{run.data['name']}.pt"
        classifier, accuracy = features.load_or_train(path, everything, source.load_split("test"))
        space = classifier.features
        made_with["features"] = {"sha256": file_hash(path), "test_accuracy": accuracy}
        print(f"features of a classifier with test accuracy {accuracy:.2%}, {path}")
    elif len(everything) < features.MIN_IMAGES:
        print(f"{len(everything)} training images are too few to learn features from: all numbers are of pixels")
    else:
        print("no labels, one for each image, to learn features from: all numbers are of pixels")
    del everything

    def floats(pixels: Tensor) -> Iterator[Tensor]:
        return (part.float() / 255 for part in pixels.split(PART))

    def seen(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Features and pixels of images that come a part at a time, so that they are never all in memory."""
        both = ((space(part), fidelity.pixel_features(part)) for part in parts)
        return tuple(torch.cat(rows) for rows in zip(*both, strict=True))  # type: ignore[return-value]

    def decoded(z: Tensor) -> Iterator[Tensor]:
        return (run.vae.decode(part).clamp(0, 1) for part in z.split(PART))

    reference, reference_pixels = seen(floats(x))
    wanted = fidelity.moments(reference_pixels)
    names = [settings.sampler] if settings.sampler else list(SAMPLERS)
    training = lambda: run.images("train", settings.data_root, MOST_IMAGES)  # noqa: E731
    width = 14
    with atomic_path(folder / "fidelity.json", "folder") as path:
        measured: dict[str, Any] = {}
        latents, found = {}, {}
        for name in [*names, "reconstructions", "test images"]:
            parts = floats(x_test)
            if name in SAMPLERS:
                sampler = load_or_fit_sampler(name, run.vae, training, run.path, run.folder)
                latents[name] = sampler.sample(total, torch.Generator().manual_seed(settings.seed))
                parts = decoded(latents[name])
            elif name == "reconstructions":
                parts = (run.vae.reconstruct(part).clamp(0, 1) for part in parts)
            found[name], found_pixels = seen(parts)
            rows = fidelity.scores(reference, found[name], n)
            for row, own, own_pixels in zip(rows, found[name].split(n), found_pixels.split(n), strict=True):
                row["pixel_fid"] = fidelity.frechet_distance(wanted, fidelity.moments(own_pixels))
                if classifier:
                    row["imbalance"] = fidelity.label_tv_distance(classifier.classify(own), labels)
            measured[name] = fidelity.mean_and_se(rows)
            if name == names[0]:
                print(f"{n:,} images, {settings.repeats} times, beside {len(x):,} training images; ± standard error")
                print(" " * width + "".join(f"{key:>17}" for key in measured[name]))
            cells = (f"{cell['mean']:.4g} ± {cell['se']:.1g}" for cell in measured[name].values())
            print(f"{name:<{width}}" + "".join(f"{cell:>17}" for cell in cells), flush=True)
        # Other samplers' numbers from before stay, if they were made in the same way.
        before = read_json(folder / "fidelity.json")
        others = {name: before[name] for name in SAMPLERS if name in before and name not in measured}
        if differ := [key for key, value in made_with.items() if before.get(key) != value]:
            if others:
                print(f"numbers of {', '.join(others)} are dropped: made with another {', '.join(differ)}")
            others = {}
        scored = {name: (measured | others)[name] for name in SAMPLERS if name in measured | others}
        best = min(scored, key=lambda name: scored[name]["fid"]["mean"])
        result = made_with | measured | others | {"best": best, "fid": scored[best]["fid"]}
        path.write_text(json.dumps(result, indent=2) + "\n")
    # Those samples that come nearest to a training image, beside how near that image has another: were there copies,
    # they would be among them.
    best = min(names, key=lambda name: measured[name]["fid"]["mean"])
    distance, place = fidelity.nearest(found[best], reference, 7)
    usual = fidelity.nearest(reference[place[:, 0]], reference, 2)[0][:, 1]
    closest = (distance[:, 0] / usual).argsort()[:12]
    (samples,) = decoded(latents[best][closest])
    neighbours = (x[place[i]].float() / 255 for i in closest.tolist())
    shown_rows = torch.cat([torch.cat((sample[None], near)) for sample, near in zip(samples, neighbours, strict=True)])
    plotting.save_image(plotting.make_grid(shown_rows, 8), folder / "figures" / "fidelity.png")
    print(
        f"in {folder / 'fidelity.json'}; in {folder / 'figures' / 'fidelity.png'} samples of sampler={best}, those that"
    )
    print("come nearest to a training image for how near others are, one a row, each before its seven nearest")


if __name__ == "__main__":
    main()
