"""Latents to pictures: `python scripts/decode.py latents=latents.npz out=FOLDER [ckpt=PATH]`."""

from pathlib import Path

from pydantic import Field

from betavae.runtime.cli import ModelSettings, gc_paused, script_command
from betavae.runtime.settings import PathStr


class Settings(ModelSettings):
    latents: PathStr = Field(
        "latents.npz", title="FILE.npz or .csv of encode.py, or FILE.npy of latents (N, latent_dim)"
    )
    out: PathStr = Field("decoded", title="a folder, for a PNG of each")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from tqdm import tqdm

        from betavae import plotting
        from betavae.applications import latents
        from betavae.data.file_listing import png_filenames
        from betavae.runtime import checkpoint

    run = checkpoint.load(settings.ckpt, settings.runs)
    names, z = latents.load_latents(Path(settings.latents), run.vae.latent_dim)
    files = png_filenames(names, settings.out)
    done = tqdm(total=len(z), desc="decoding", unit="", disable=None)
    for part_names, part in zip(latents.chunks(files), z.split(latents.CHUNK), strict=True):
        for file, image in zip(part_names, run.vae.decode(part), strict=True):
            plotting.save_image(image, Path(settings.out) / file, scale=1)
        done.update(len(part))
    done.close()
    print(f"{len(z):,} pictures by {run.path} in {settings.out}/")


if __name__ == "__main__":
    main()
