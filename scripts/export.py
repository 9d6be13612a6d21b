"""A trained VAE for others: `python scripts/export.py [ckpt=PATH format=onnx out=export]`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from betavae.runtime.cli import ModelSettings, SeedSettings, gc_paused, script_command
from betavae.runtime.settings import PathStr


class Settings(ModelSettings, SeedSettings):
    format: Literal["onnx", "torchscript", "pt2", "safetensors", "folder"] = Field(
        "onnx", title="onnx, torchscript, pt2, safetensors; folder: for betavae.load"
    )
    out: PathStr = Field("export", title="a folder")


@script_command(Settings)
def main(settings: Settings) -> None:
    with gc_paused():
        import torch

        from betavae import plotting
        from betavae.applications import export
        from betavae.data.file_listing import as_text
        from betavae.runtime import checkpoint
        from betavae.runtime.run_folder import read_json
        from betavae.storage.cache import hash_file
        from betavae.storage.files import atomic_dir

    run = checkpoint.load(settings.ckpt, settings.runs)
    out = Path(settings.out)
    result: dict[str, Any]
    if settings.format == "folder":
        # Where data lie, and what is kept of them, is of this machine alone.
        data = {key: value for key, value in run.data.items() if key not in ("root", "cache")}
        name = as_text(run.folder.resolve().name if run.path.parent.name == "checkpoints" else run.path.stem)
        state = {f"vae.{key}": value for key, value in run.vae.state_dict().items()}
        content = {"betavae_format": checkpoint.FORMAT, "hyper_parameters": run.settings, "state_dict": state}
        if data:
            content |= {"datamodule_hyper_parameters": data | {"root": "data"}, "fingerprints": run.fingerprints}
        found = {name: read_json(run.folder / f"{name}.json") for name in ("metrics", "evaluation", "fidelity")}
        own = str(run.path.relative_to(run.folder))
        # Of this checkpoint, and not of one that had its name before.
        mine = {"checkpoint": own, "sha256": hash_file(run.path)}
        numbers = {k: v for k, v in found.items() if all(v.get(key, value) == value for key, value in mine.items())}
        images = run.vae.sample(64, 1.0, torch.Generator().manual_seed(settings.seed))
        with atomic_dir(out) as folder:
            checkpoint.save_checkpoint(content, folder / "checkpoints" / "best.ckpt")
            (folder / "README.md").write_text(export.model_card(name, run.settings, data, numbers))
            plotting.save_image(plotting.make_grid(images, 8), folder / "samples.png")
            theirs = checkpoint.load(folder).vae.state_dict()
            if not all(torch.equal(theirs[key], value) for key, value in run.vae.state_dict().items()):
                raise RuntimeError(f"{out} does not hold the model that was written to it")
        print(f"{out}/ is a model of its own, with a card in {out / 'README.md'}: betavae.load({str(out)!r})")
    elif settings.format == "safetensors":
        result = export.export_weights(run.vae, run.settings["model"], out)
        print(f"{len(result['tensors'])} tensors in {out / result['file']}, what they are in {out / 'model.json'}")
    else:
        result = export.export_graphs(run.vae, run.settings["model"], settings.format, out)
        for name, graph in result["graphs"].items():
            print(f"{out / graph['file']}  differs from torch by at most {result['difference'][name]:.1e}")
        print(f"shapes, ranges and units in {out / 'model.json'}")


if __name__ == "__main__":
    main()
