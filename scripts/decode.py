"""Decode a file of latents into images: `python scripts/decode.py latents=FILE.npz out=FOLDER`."""

from pathlib import Path

from pydantic import Field

from betavae.runtime.cli import LabelSettings, ModelSettings, gc_paused, script_command
from betavae.runtime.settings import PathStr


class Settings(ModelSettings, LabelSettings):
    latents: PathStr = Field("latents.npz", title="a file of encode.py, or FILE.npy of latents (N, latent_dim)")
    out: PathStr = Field("decoded", title="folder for one PNG per image; or FILE.npy; or FILE.csv of a table")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import numpy as np
        import torch
        from tqdm import tqdm

        from betavae import plotting
        from betavae.applications.latents import BATCH_SIZE, load_latents
        from betavae.data.file_listing import png_filenames
        from betavae.data.labels import match_labels
        from betavae.runtime import checkpoint
        from betavae.runtime.outputs import save_rows
        from betavae.storage.files import atomic_path

    run = checkpoint.load(settings.ckpt, settings.runs)
    names, z, own = load_latents(Path(settings.latents), run.vae.latent_dim)
    labels = match_labels(run.vae.classes, len(z), settings.label, own, settings.latents)
    batches = [slice(start, start + BATCH_SIZE) for start in range(0, len(z), BATCH_SIZE)]
    if settings.out.endswith(".npy") or run.columns is not None:
        x = torch.cat([run.vae.given(labels[batch]).decode(z[batch]) for batch in batches])
        if settings.out.endswith(".npy"):
            with atomic_path(settings.out) as path, open(path, "wb") as array:
                np.save(array, run.scaling.to_stored(x).numpy())
        else:
            save_rows(run, x, settings.out, names, labels)
        print(f"{len(z):,} {run.item}s decoded by {run.path}, saved to {settings.out} as {run.scaling.dtype}")
        return
    files = png_filenames(names, settings.out)
    with tqdm(total=len(z), desc="decoding", unit=" images", disable=None) as bar:
        for batch in batches:
            for file, image in zip(files[batch], run.vae.given(labels[batch]).decode(z[batch]), strict=True):
                plotting.save_image(run.scaling.to_picture(image), Path(settings.out) / file, scale=1)
                bar.update()
    print(f"{len(z):,} images decoded by {run.path}, saved to {settings.out}/")


if __name__ == "__main__":
    main()
