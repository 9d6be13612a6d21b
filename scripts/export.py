"""Export a trained VAE for other programs and people: `python scripts/export.py [format=onnx]`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from betavae.runtime.cli import ModelSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import PathStr

if TYPE_CHECKING:
    from betavae.runtime.checkpoint import TrainedRun


class Settings(ModelSettings, SeedSettings):
    format: Literal["onnx", "torchscript", "pt2", "safetensors", "folder"] = Field(
        "onnx", title="onnx, torchscript, pt2: graphs; safetensors: weights; folder: a model for betavae.load"
    )
    out: PathStr = Field("export", title="new folder for the files")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        from betavae.applications.export import export_graphs, export_weights
        from betavae.runtime import checkpoint

    run = checkpoint.load(settings.ckpt, settings.runs)
    out, model = Path(settings.out), run.settings["model"]
    if settings.format == "folder":
        export_folder(run, out, settings.seed)
        print(f"the model and its card, README.md, saved to {out}/; load it by betavae.load({str(out)!r})")
    elif settings.format == "safetensors":
        result = export_weights(run.vae, model, out, run.scaling)
        print(f"{len(result['tensors'])} tensors saved to {out / result['file']}, described in {out / 'model.json'}")
    else:
        result = export_graphs(run.vae, model, settings.format, out, run.scaling)
        for name, graph in result["graphs"].items():
            print(f"{out / graph['file']}  differs from torch by at most {result['difference'][name]:.1e}")
        print(f"shapes, ranges and units are in {out / 'model.json'}")


def export_folder(run: "TrainedRun", out: Path, seed: int) -> None:
    """Write a checkpoint without the paths of this machine, samples, and a model card to a new folder."""
    import torch

    from betavae import grids
    from betavae.applications.export import format_model_card
    from betavae.data.file_listing import as_text
    from betavae.data.labels import count_columns, cycle_labels
    from betavae.runtime import checkpoint, plugins
    from betavae.runtime.run_folder import read_measurement
    from betavae.storage.files import atomic_dir, hash_file

    weights = run.vae.state_dict()
    content = {"betavae_format": checkpoint.FORMAT, "hyper_parameters": run.settings}
    content["state_dict"] = {f"vae.{key}": value for key, value in weights.items()}
    data = {key: value for key, value in run.data.items() if key not in ("root", "cache")}
    if plugins.LOADED:
        content["plugins"] = dict(plugins.LOADED)
    if data:
        content |= {"datamodule_hyper_parameters": data | {"root": "data"}, "fingerprints": run.fingerprints}
        content |= {"scaling": asdict(run.scaling), "columns": run.columns}
    results = {name: read_measurement(run.folder / f"{name}.json") for name in ("metrics", "evaluation", "fidelity")}
    # Results of another checkpoint, or of an earlier file with this name, are left out.
    source = {"checkpoint": str(run.path.relative_to(run.folder)), "sha256": hash_file(run.path)}
    results = {k: v for k, v in results.items() if all(v.get(key, value) == value for key, value in source.items())}
    name = as_text(run.folder.resolve().name if run.path.parent.name == "checkpoints" else run.path.stem)
    columns = count_columns(run.vae.classes, 8)
    vae = run.vae.given(cycle_labels(run.vae.classes[:columns], 8 * columns))
    images = run.scaling.to_picture(vae.sample(8 * columns, 1.0, torch.Generator().manual_seed(seed)))
    samples = grids.Grid(images, columns, column_labels=run.vae.classes[:columns])
    card = format_model_card(name, run.settings, data, results)
    with atomic_dir(out) as folder:
        checkpoint.save_checkpoint(content, folder / "checkpoints" / "best.ckpt")
        if run.columns is None:
            grids.save_grids([samples], folder / "samples.png", f"{len(images)} samples; {run.caption}")
        else:
            card = card.replace("![samples](samples.png)\n\n", "")
        (folder / "README.md").write_text(card)
        saved = checkpoint.load(folder).vae.state_dict()
        if not all(torch.equal(saved[key], value) for key, value in weights.items()):
            raise RuntimeError(f"{out} does not contain the weights that were written to it")


if __name__ == "__main__":
    main()
