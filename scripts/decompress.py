"""The images of a compressed file, bit for bit: `python scripts/decompress.py file=FILE.bvae out=FOLDER|FILE.npy`."""

from pathlib import Path

from pydantic import Field

from betavae.runtime.cli import ModelSettings, gc_paused, script_command
from betavae.runtime.settings import PathStr


class Settings(ModelSettings):
    file: PathStr = Field("images.bvae", title="what compress.py wrote; ckpt must be the checkpoint that it used")
    out: PathStr = Field("decompressed", title="a folder, for a PNG of each by its name; or FILE.npy")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from tqdm import tqdm

        from betavae.applications.compression.codec import check_model, decompress
        from betavae.applications.compression.file_format import output_paths, read_file, write_images
        from betavae.runtime import checkpoint

    run = checkpoint.load(settings.ckpt, settings.runs)
    compressed, out = read_file(Path(settings.file)), Path(settings.out)
    check_model(run.vae, compressed)
    output_paths(compressed.names, compressed.count, out)
    with tqdm(total=compressed.count, desc="decompressing", unit=" images", disable=None) as bar:
        images = decompress(run.vae, compressed, bar.update)
    write_images(images, compressed.names, out)
    print(f"{len(images):,} images, as they were, in {settings.out}")


if __name__ == "__main__":
    main()
