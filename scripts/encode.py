"""Encode images into a file of latents: `python scripts/encode.py images=PATH out=FILE.npz`.

The file has each image's name, posterior mean and log-variance, label (if there is one), KL and neg. ELBO in nats. With
tsne=true it also has a t-SNE of the posterior means.
"""

from pydantic import Field

from betavae.runtime.cli import DataSettings, LabelSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import ImageSpec, NonEmptyStr


class Settings(DataSettings, SeedSettings, LabelSettings):
    images: ImageSpec = Field("test", title="images: a folder, file or list; .npy, .npz; test, train, ...; a data set")
    out: NonEmptyStr = Field("latents.npz", title="FILE.npz, FILE.csv or FILE.parquet")
    tsne: bool = Field(False, title="also save a t-SNE of the posterior means, for at most 10,000 images")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from betavae.applications.latents import check_format, encode_images, save_latents
        from betavae.data.labels import name_labels
        from betavae.metrics.embedding import check_tsne, compute_tsne
        from betavae.runtime import checkpoint
        from betavae.runtime.inputs import resolve_images, resolve_labels

    run = checkpoint.load(settings.ckpt, settings.runs)
    images = resolve_images(run, settings.images, settings.data_root)
    labels = resolve_labels(run, settings.images, images, settings.label)
    check_format(settings.out)
    if settings.tsne:
        check_tsne(len(images.names))
    for note in images.notes:
        print(note)
    latents = encode_images(run.vae, images.pixels, settings.seed, run.scaling, labels)
    if settings.tsne:
        print(f"computing a t-SNE of {len(images.names):,} images; 10,000 take a few minutes", flush=True)
        latents = latents._replace(tsne=compute_tsne(latents.mean, settings.seed))
    named = name_labels(run.vae.classes, labels.tolist()) if run.vae.classes else images.labels
    save_latents(latents, images.names, named, settings.out)
    count, dimensions = len(images.names), run.vae.latent_dim
    print(f"{count:,} {run.item}s encoded by {run.path} to {dimensions} latent dimensions, saved to {settings.out}")


if __name__ == "__main__":
    main()
