"""Images into a file that gives them back bit for bit: `python scripts/compress.py images=PATH|test out=FILE.bvae`.

Bits-back coding by a model whose likelihood is a probability of what the images are; see docs/compression.md.
"""

from pathlib import Path

from pydantic import Field

from betavae.runtime.cli import DataSettings, argument, gc_paused, script_command
from betavae.runtime.settings import ImageSpec, PathStr, PositiveInt


class Settings(DataSettings):
    images: ImageSpec = Field("test", title="pictures (folder, file, list); .npy, .npz; test, train, ...; a data set")
    out: PathStr = Field("images.bvae", title="the file")
    verify: bool = Field(True, title="decode what was written, and compare, before success is claimed")
    report: bool = Field(True, title="what other compressors make of the same images, and a picture of it")
    lanes: PositiveInt = Field(256, title="images side by side; more are faster, and take more memory")


def among(picture: Path, images: str | list[str]) -> bool:
    """Whether it is one of the images, or in one of their folders, whose picture it would be the next time."""
    places = [Path(entry).expanduser().resolve() for entry in ([images] if isinstance(images, str) else images)]
    return any(place in (picture.resolve(), *picture.resolve().parents) for place in places)


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch
        from tqdm import tqdm

        from betavae import plotting
        from betavae.applications.compression.codec import compress, decompress
        from betavae.applications.compression.file_format import read_file, write_file
        from betavae.applications.compression.report import PICTURES, baseline_sizes, neg_elbo_bits
        from betavae.data.file_listing import index_names, png_filenames
        from betavae.errors import UserError
        from betavae.runtime import checkpoint
        from betavae.runtime.inputs import resolve_images
        from betavae.storage.files import atomic_path, check_writable

    out = Path(settings.out)
    check_writable(out)
    picture = out.with_suffix(".png")
    if settings.report and out == picture:
        raise UserError(f"out: a picture of the table would be {picture} too; name FILE.bvae")
    if settings.report:
        check_writable(picture)
    run = checkpoint.load(settings.ckpt, settings.runs)
    found = resolve_images(run, settings.images, settings.data_root)
    n, size = len(found.pixels), found.pixels.numel()
    png_filenames(found.names, "the folder that they will come back to")
    names = None if found.names == index_names(n) else found.names
    if settings.report and names and among(picture, settings.images):
        raise UserError(
            f"out: the table's picture, {picture}, would lie among the images: name a file elsewhere, or report=false"
        )
    with tqdm(total=n, desc="compressing", unit=" images", disable=None) as bar:
        compressed = compress(run.vae, found.pixels, settings.lanes, names, bar.update)
    # What lies at `out` stays there until what replaces it is known to give its images back.
    with atomic_path(out) as path:
        write_file(path, compressed)
        if settings.verify:
            with tqdm(total=n, desc="verifying", unit=" images", disable=None) as bar:
                again = decompress(run.vae, read_file(path), bar.update)
            if not torch.equal(again, found.pixels):
                raise UserError(f"{out} would not give the images back, so it was not written")
    for note in found.notes:
        print(note)
    rows: dict[str, tuple[float | None, float]] = {
        "this file": (None, 8 * out.stat().st_size / size),
        "without its initial bits": (None, (8 * out.stat().st_size - compressed.initial_bits) / size),
        "neg. ELBO": (None, neg_elbo_bits(run.vae, found.pixels)),
    }
    remark = f"PNG and WebP, each alone: by the first {PICTURES:,} images" if settings.report and n > PICTURES else ""
    if settings.report:
        rows |= baseline_sizes(found.pixels)
        plotting.save_figure(plotting.plot_bits(rows, remark), picture)
    print(f"{'bits per pixel and channel':28}{'each alone':>12}{'all in one':>12}")
    for name, (alone, together) in rows.items():
        print(f"{name:28}{'' if alone is None else format(alone, '.4f'):>12}{together:12.4f}")
    if remark:
        print(remark)
    print(f"{n:,} images in {out}, {out.stat().st_size:,} bytes{', decoded and compared' if settings.verify else ''}")
    if found.notes:
        print("what comes back, bit for bit, is these images as the lines above have changed them, not their files")
    if settings.report:
        print(f"a picture of this table in {picture}")
    print(f"next  python scripts/decompress.py {argument('file', out)} out=FOLDER {argument('ckpt', run.path)}")


if __name__ == "__main__":
    main()
