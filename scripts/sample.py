"""Sample images from a trained VAE: `python scripts/sample.py [ckpt=PATH sampler=mixture n=64]`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from betavae.runtime.cli import DataSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import Label, NonNegativeFloat, PathStr, PositiveInt, RegisteredName


class Settings(DataSettings, SeedSettings):
    n: PositiveInt = Field(64, title="number of images")
    sampler: Annotated[str, RegisteredName("betavae.applications.sampling", "SAMPLERS")] = Field(
        "prior", title="prior; or fitted to the training images: gaussian, mixture, knn"
    )
    label: Label | None = Field(
        None, title="only images with this label; needs a fitted sampler or a conditional model"
    )
    temperature: NonNegativeFloat = Field(1.0, title="factor of the prior's noise")
    columns: PositiveInt | None = Field(None, title="images per row; null: 8, or one column per class")
    out: PathStr = Field("samples.png", title="image file for the grid; FILE.csv for a model of a table")
    save_images: bool = Field(False, title="also save each image, in a folder named like `out`")
    save_tensor: bool = Field(False, title="also save a tensor (n, C, H, W), in a .pt file named like `out`")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch

        from betavae import grids, plotting
        from betavae.applications.sampling import load_or_fit_sampler
        from betavae.data.labels import count_columns, cycle_labels, find_class
        from betavae.errors import UserError
        from betavae.runtime import checkpoint
        from betavae.runtime.outputs import save_rows

    run = checkpoint.load(settings.ckpt, settings.runs)
    if settings.save_images:
        run.require_images("save_images=true")
    generator, classes, label = torch.Generator().manual_seed(settings.seed), run.vae.classes, settings.label
    labels = cycle_labels(classes, settings.n)
    if classes and label is not None:
        labels = torch.tensor([find_class(label, classes)])
    vae = run.vae.given(labels)
    if settings.sampler == "prior" and (label is None or classes):
        images = vae.sample(settings.n, settings.temperature, generator)
    elif settings.temperature != 1:
        raise UserError(f"temperature={settings.temperature:g} is invalid: expected 1 with a fitted sampler or a label")
    else:
        sampler = load_or_fit_sampler(settings.sampler, run, settings.data_root, label, labels)
        images = vae.decode(sampler.sample(settings.n, generator))
    columns = settings.columns or (8 if label is not None else count_columns(classes, 8))
    out = Path(settings.out)
    shown = "" if settings.label is None else f", label {settings.label}"
    heat = "" if settings.temperature == 1 else f", temperature {settings.temperature:g}"
    caption = f"{settings.n} samples, sampler={settings.sampler}{shown}{heat}; {run.caption}"
    pictures = run.scaling.to_picture(images)
    names = classes if label is None and columns == len(classes) else ()
    if run.columns is None:
        grids.save_grids([grids.Grid(pictures, min(columns, settings.n), column_labels=names)], out, caption)
    else:
        save_rows(run, images, out, labels=labels.expand(settings.n))
    print(f"{settings.n} samples of {run.path}, sampler={settings.sampler}{shown}, saved to {out}")
    if settings.save_images:
        folder, digits = out.with_suffix(""), len(str(settings.n - 1))
        files = [f"{number:0{digits}d}.png" for number in range(settings.n)]
        for name, picture in zip(files, pictures, strict=True):
            plotting.save_image(picture, folder / name, scale=1)
        others = len(set(folder.iterdir()) - {folder / name for name in files})
        print(f"each image saved to {folder}/" + f" (which also holds {others} older files)" * (others > 0))
    if settings.save_tensor:
        path = plotting.save_tensor(run.scaling.to_data_units(images), out.with_suffix(".pt"))
        print(f"a tensor {tuple(images.shape)} saved to {path}")


if __name__ == "__main__":
    main()
