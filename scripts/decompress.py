"""Decompress a file of images, bit for bit: `python scripts/decompress.py file=FILE.bvae out=FOLDER`."""

from pathlib import Path

from pydantic import Field

from betavae.runtime.cli import ModelSettings, gc_paused, script_command
from betavae.runtime.settings import PathStr


class Settings(ModelSettings):
    file: PathStr = Field("images.bvae", title="a file of compress.py; ckpt must be the checkpoint that compressed it")
    out: PathStr = Field("decompressed", title="folder for one PNG per image; or FILE.npy")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from betavae.applications.compression.archive import decompress_file
        from betavae.applications.compression.codec import check_model
        from betavae.applications.compression.file_format import output_paths, read_file, write_images
        from betavae.runtime import checkpoint

    run = checkpoint.load(settings.ckpt, settings.runs)
    file, out = Path(settings.file), Path(settings.out)
    compressed = read_file(file)
    check_model(run.vae, compressed)
    output_paths(compressed.names, compressed.count, out)
    images = decompress_file(run.vae, compressed)
    write_images(images, compressed.names, out)
    file_bytes = file.stat().st_size
    size = f"{file_bytes:,} bytes, {8 * file_bytes / images.numel():.4f} bits per dimension"
    print(f"{len(images):,} images decompressed from {file} ({size}), checksum correct, saved to {out}")


if __name__ == "__main__":
    main()
