"""How good new images are, beside real ones: `python scripts/fidelity.py [ckpt=PATH sampler=mixture n=2000]`."""

# mypy: disable-error-code="valid-type"

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from betavae.running.cli import DataSettings, Seeded, importing, script
from betavae.running.settings import Several, TextOrNull, one_of


def samplers() -> list[str | None]:
    from betavae.uses.sampling import SAMPLERS

    return [None, *SAMPLERS]


class Settings(DataSettings, Seeded):
    sampler: one_of(samplers) = Field(None, title="prior, gaussian, mixture, knn; null: all of them")
    n: Several = Field(2000, title="images in each repeat; fewer, if there are not so many test images")
    repeats: Several = Field(5, title="repeats, of which the standard error is, no image in two of them")
    reference: Several = Field(60_000, title="training images at most, that samples are compared with")
    folder: TextOrNull = Field(None, title="for fidelity.json and figures/fidelity.png; null: the run's")


@script(Settings)
def main(settings: Settings) -> None:
    with importing():
        import torch

        from betavae import pictures
        from betavae.errors import UserError
        from betavae.files import STAMP, writing
        from betavae.kept import digest
        from betavae.measures import features, fidelity
        from betavae.running import checkpoint
        from betavae.uses.sampling import MOST_IMAGES, SAMPLERS, fitted

    run = checkpoint.load(settings.ckpt, settings.runs)
    folder = Path(settings.folder) if settings.folder else run.folder
    # A mean of p(x|z) is the grey value of a pixel that was drawn afresh for every batch.
    shown = run._replace(data=run.data | {"binarize": "none"}) if run.data.get("binarize") == "dynamic" else run
    datamodule = shown.datamodule(settings.data_root)
    datamodule.setup()
    x, labels = shown.images("train", settings.data_root, settings.reference)
    x_test, _ = shown.images("test", settings.data_root)
    n = min(settings.n, len(x_test) // settings.repeats)
    if n < 10:
        raise UserError(f"repeats={settings.repeats} leaves {n} of {len(x_test)} test images for each; it must be less")
    total = n * settings.repeats
    generator = torch.Generator().manual_seed(settings.seed)
    x_test = x_test[torch.randperm(len(x_test), generator=generator)[:total]]
    order = torch.randperm(len(x), generator=generator)
    x, labels = x[order], labels[order]

    classifier: features.Classifier | None = None
    space: Callable[[torch.Tensor], torch.Tensor] = fidelity.pixels
    result: dict[str, Any] = {
        "made_by": STAMP,
        "checkpoint": str(run.path.relative_to(run.folder)),
        "data": f"{run.data['name']}, binarize={run.data['binarize']}",
        **{"images": n, "repeats": settings.repeats, "reference": len(x), "seed": settings.seed},
    }
    if labels.ndim == 1 and len(labels.unique()) > 1:
        which = {key: v for key, v in run.data.items() if key not in features.INCIDENTAL}
        which["images"] = len(datamodule.sets["train"])
        if run.data["name"] in ("folder", "arrays"):  # whose name does not say which they are
            which["root"] = str(datamodule.root.resolve())
        path = Path(settings.runs) / "features" / f"{run.data['name']}.pt"
        classifier, accuracy = features.trained(path, which, datamodule.load("train"), datamodule.load("test"))
        space = classifier.features
        result["features"] = {"file": str(path), "sha256": digest(path), "test_accuracy": accuracy}
        print(f"features of a classifier with test accuracy {accuracy:.2%}, {path}")
    else:
        print("no labels, one for each image, to learn features from: all numbers are of pixels")
    reference, wanted = space(x), fidelity.moments(fidelity.pixels(x))

    def scores(images: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
        found = space(images)
        rows = fidelity.scores(reference, found, n)
        for row, own, own_pixels in zip(rows, found.split(n), fidelity.pixels(images).split(n), strict=True):
            row["pixel_fid"] = fidelity.frechet(wanted, fidelity.moments(own_pixels))
            if classifier:
                row["imbalance"] = fidelity.imbalance(classifier.classify(own), labels)
        return fidelity.summary(rows), found

    names = [settings.sampler] if settings.sampler else list(SAMPLERS)
    training = lambda: run.images("train", settings.data_root, MOST_IMAGES)  # noqa: E731
    width = 14
    with writing(folder / "fidelity.json", "folder") as path:
        images, found = {}, {}
        for name in [*names, "reconstructions", "test images"]:
            if name in SAMPLERS:
                latents = fitted(name, run.vae, training, run.path, run.folder)
                with torch.no_grad():
                    z = latents.sample(total, torch.Generator().manual_seed(settings.seed))
                    images[name] = torch.cat([run.vae.decode(part) for part in z.split(1000)]).clamp(0, 1)
            elif name == "reconstructions":
                images[name] = run.vae.reconstruct(x_test).clamp(0, 1)
            else:
                images[name] = x_test
            result[name], found[name] = scores(images[name])
            if name == names[0]:
                print(f"{n:,} images, {settings.repeats} times, beside {len(x):,} training images; ± standard error")
                print(" " * width + "".join(f"{key:>17}" for key in result[name]))
            cells = (f"{cell['mean']:.4g} ± {cell['se']:.1g}" for cell in result[name].values())
            print(f"{name:<{width}}" + "".join(f"{cell:>17}" for cell in cells), flush=True)
        result["best"] = best = min(names, key=lambda name: result[name]["fid"]["mean"])
        result["fid"] = result[best]["fid"]
        path.write_text(json.dumps(result, indent=2) + "\n")
    # Those samples that come nearest to a training image, beside how near that image has another: were there copies,
    # they would be among them.
    distance, place = fidelity.nearest(found[best], reference, 7)
    usual = fidelity.nearest(reference[place[:, 0]], reference, 2)[0][:, 1]
    closest = (distance[:, 0] / usual).argsort()[:12]
    rows = torch.cat([torch.cat((images[best][[i]], x[place[i]])) for i in closest.tolist()])
    pictures.save_picture(pictures.grid(rows, 8), folder / "figures" / "fidelity.png")
    print(
        f"in {folder / 'fidelity.json'}; in {folder / 'figures' / 'fidelity.png'} samples of sampler={best}, those that"
    )
    print("come nearest to a training image for how near others are, one a row, each before its seven nearest")


if __name__ == "__main__":
    main()
