"""Pictures to latents: `python scripts/encode.py images=PATH out=latents.npz [ckpt=PATH]`.

For each picture its name, posterior mean and log-variance, label (where there are labels), KL and neg. ELBO in nats.
"""

from pydantic import Field

from betavae.runtime.cli import DataSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import ImageSpec, NonEmptyStr


class Settings(DataSettings, SeedSettings):
    images: ImageSpec = Field("test", title="pictures (folder, file, list); .npy, .npz; test, train, ...; a data set")
    out: NonEmptyStr = Field("latents.npz", title="FILE.npz, FILE.csv or FILE.parquet")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from betavae.applications import latents
        from betavae.runtime import checkpoint
        from betavae.runtime.inputs import resolve_images

    run = checkpoint.load(settings.ckpt, settings.runs)
    found = resolve_images(run, settings.images, settings.data_root)
    table = latents.encode(run.vae, found.pixels, settings.seed)
    latents.save_latents(table, found.names, found.labels, settings.out)
    for note in found.notes:
        print(note)
    print(f"{len(found.names):,} images by {run.path}, {run.vae.latent_dim} latent dimensions each, in {settings.out}")


if __name__ == "__main__":
    main()
