"""Encode images into a file of latents: `python scripts/encode.py images=PATH out=latents.npz [ckpt=PATH]`.

The file has each image's name, posterior mean and log-variance, label (if there is one), KL and neg. ELBO in nats.
"""

from pydantic import Field

from betavae.runtime.cli import DataSettings, LabelSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import ImageSpec, NonEmptyStr


class Settings(DataSettings, SeedSettings, LabelSettings):
    images: ImageSpec = Field("test", title="images: a folder, file or list; .npy, .npz; test, train, ...; a data set")
    out: NonEmptyStr = Field("latents.npz", title="FILE.npz, FILE.csv or FILE.parquet")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from betavae.applications.latents import encode_images, save_latents
        from betavae.runtime import checkpoint
        from betavae.runtime.inputs import resolve_images, resolve_labels

    run = checkpoint.load(settings.ckpt, settings.runs)
    images = resolve_images(run, settings.images, settings.data_root)
    labels = resolve_labels(run, settings.images, images, settings.label)
    latents = encode_images(run.vae, images.pixels, settings.seed, labels)
    names = images.labels if settings.label is None else [run.vae.classes[number] for number in labels]
    save_latents(latents, images.names, names, settings.out)
    for note in images.notes:
        print(note)
    count, dimensions = len(images.names), run.vae.latent_dim
    print(f"{count:,} images encoded by {run.path} to {dimensions} latent dimensions, saved to {settings.out}")


if __name__ == "__main__":
    main()
