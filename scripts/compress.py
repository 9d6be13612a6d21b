"""Compress images losslessly into one file: `python scripts/compress.py images=PATH out=FILE.bvae`.

The codec is bits-back coding with a model whose likelihood is discrete; see docs/compression.md.
"""

from pathlib import Path

from pydantic import Field

from betavae.errors import UserError
from betavae.runtime.cli import DataSettings, adapt_commands, argument, gc_paused, run_argument, script_command
from betavae.runtime.settings import ImageSpec, PathStr, PositiveInt


class Settings(DataSettings):
    images: ImageSpec = Field("test", title="images: a folder, file or list; .npy, .npz; test, train, ...; a data set")
    out: PathStr = Field("images.bvae", title="the compressed file")
    verify: bool = Field(True, title="decompress the file and compare the images before it replaces `out`")
    report: bool = Field(True, title="compare with other codecs, in a table and a figure")
    lanes: PositiveInt = Field(256, title="images side by side; more are faster and take more memory")


def is_among(figure: Path, images: str | list[str]) -> bool:
    """Return whether a figure would replace one of the images, or be in one of their folders."""
    sources = [Path(image).expanduser().resolve() for image in ([images] if isinstance(images, str) else images)]
    return any(source in (figure.resolve(), *figure.resolve().parents) for source in sources)


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from betavae import plotting
        from betavae.applications.compression import report
        from betavae.applications.compression.archive import compress_file
        from betavae.data.file_listing import index_names, png_filenames
        from betavae.runtime import checkpoint
        from betavae.runtime.inputs import resolve_images
        from betavae.storage.files import check_writable

    out = Path(settings.out)
    check_writable(out)
    figure = out.with_suffix(".png")
    if settings.report:
        if out == figure:
            raise UserError(f"out={out} is invalid: expected FILE.bvae, since the figure of the report is {figure}")
        check_writable(figure)
    run = checkpoint.load(settings.ckpt, settings.runs)
    run.require_images("compress.py")
    if not run.scaling.is_bytes:
        raise UserError(
            f"{run.path} was trained on {run.scaling.dtype} with data.scaling={run.scaling.mode}: expected a model of "
            "uint8 images with data.scaling=unit, which the codec compresses"
        )
    images = resolve_images(run, settings.images, settings.data_root)
    n = len(images.pixels)
    png_filenames(images.names, "the folder of decompressed images")
    names = None if images.names == index_names(n) else images.names
    if settings.report and names and is_among(figure, settings.images):
        raise UserError(f"out: the figure, {figure}, would be among the images; name a file elsewhere, or report=false")
    compressed = compress_file(run.vae, images.pixels, names, out, settings.lanes, settings.verify)
    size = out.stat().st_size
    rows = report.compute_model_bits(run.vae, images.pixels, size, compressed.initial_bits)
    for note in images.notes:
        print(note)
    if images.notes:
        print("the file has the images as changed by these steps, not the original files")
    remark = ""
    if settings.report:
        rows |= report.compute_baseline_bits(images.pixels)
        if n > report.MAX_SINGLE_IMAGES:
            remark = f"PNG and WebP, each alone: from the first {report.MAX_SINGLE_IMAGES:,} images"
        plotting.save_figure(plotting.plot_bits(rows, remark), figure)
        print(f"figure saved to {figure}")
    print(report.format_table(rows, remark))
    bits = f"{size:,} bytes, {rows['this file'][1]:.4f} bits per dimension"
    verified = ", decompressed and compared" if settings.verify else ""
    print(f"{n:,} images compressed to {out}: {bits}{verified}")
    command = f"python scripts/decompress.py {argument('file', out)} out=FOLDER {run_argument('ckpt', run.path)}"
    print(adapt_commands(f"next  {command}"))


if __name__ == "__main__":
    main()
