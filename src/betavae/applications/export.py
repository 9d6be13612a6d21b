"""A trained VAE for programs that know nothing of this project: graphs with a free batch, or its weights.

Three graphs, float32 in and out, B images of `(C, H, W)` and D latent dimensions:

- encoder: image `(B, C, H, W)` in [0, 1] -> mean, logvar of q(z|x), both `(B, D)`.
- decoder: z `(B, D)` -> image `(B, C, H, W)`, the mean of p(x|z), in [0, 1]. Decode z from N(0, I) to sample.
- score: image, noise `(B, D)` from N(0, I) -> distortion -log p(x|z) at z = mean + std * noise, and rate KL(q(z|x) ||
  N(0, I)), both `(B,)` in nats. Their sum is the negative ELBO by one sample.
"""

import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from betavae.errors import UserError
from betavae.models.vae import VAE
from betavae.objectives.elbo import gaussian_kl
from betavae.storage.files import STAMP, atomic_dir

BATCHES = (1, 2, 7)  # that a written file is checked with
TOLERANCE = 1e-4  # of outputs, beside 1 or the output's size, whichever is larger

LICENCES = {
    "mnist": "MNIST by Yann LeCun, Corinna Cortes and Christopher J. C. Burges, CC BY-SA 3.0",
    "sprites": "sprites drawn by betavae; free of rights of others",
    "fashion_mnist": "Fashion-MNIST by Zalando SE, MIT licence",
    "kmnist": "KMNIST by the Center for Open Data in the Humanities, CC BY-SA 4.0",
    "dsprites": "dSprites by Loic Matthey, Irina Higgins, Demis Hassabis and Alexander Lerchner, Apache License 2.0",
}


class Graph(nn.Module):
    """A function of tensors with names."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae: VAE = vae


class Encoder(Graph):
    inputs, outputs = ("image",), ("mean", "logvar")

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(image)
        return posterior.mean, posterior.logvar


class Decoder(Graph):
    inputs, outputs = ("z",), ("image",)

    def forward(self, z: Tensor) -> tuple[Tensor]:
        return (self.vae.decode(z).clamp(0, 1),)


class Score(Graph):
    inputs, outputs = ("image", "noise"), ("distortion", "rate")

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(image)
        params = self.vae.decode_params(posterior.rsample(noise))
        return -self.vae.likelihood.log_prob(image, params), gaussian_kl(posterior).sum(1)


GRAPHS: dict[str, type[Graph]] = {"encoder": Encoder, "decoder": Decoder, "score": Score}
TENSOR_DOCS: dict[str, dict[str, Any]] = {
    "image": {"shape": "C, H, W", "range": [0, 1], "unit": "grey value or colour, byte / 255"},
    "mean": {"shape": "D", "unit": "latent space, in which the prior is N(0, I)"},
    "logvar": {"shape": "D", "unit": "log of the variance in latent space"},
    "z": {"shape": "D", "unit": "latent space, in which the prior is N(0, I)"},
    "noise": {"shape": "D", "unit": "draws from N(0, I)"},
    "distortion": {"shape": "", "unit": "nats per image, summed over pixels"},
    "rate": {"shape": "", "range": [0, None], "unit": "nats per image, summed over latent dimensions"},
}


def inputs_of(graph: Graph, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Random images or latents, as `graph` takes them."""
    generator, vae = torch.Generator().manual_seed(seed), graph.vae
    return tuple(
        torch.rand(batch, *vae.image_shape, generator=generator)
        if name == "image"
        else torch.randn(batch, vae.latent_dim, generator=generator)
        for name in graph.inputs
    )


Runner = Callable[..., Any]  # tensors in, a list of tensors out


def onnx(graph: Graph, path: Path) -> Runner:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch asks for it
    except ImportError as error:
        raise UserError(f'format=onnx needs {error.name}: pip install -e ".[export]"') from None
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell of every rewriting
    # Decomposed by torch: onnxscript's log-sigmoid is log(sigmoid(x)), which is -inf from x = -88 down (0.7).
    program: Any = torch.onnx.export(
        exported(graph).run_decompositions(),
        input_names=list(graph.inputs),
        output_names=list(graph.outputs),
        dynamo=True,
        verbose=False,
    )
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> list[Tensor]:
        fed = {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, fed)]

    return run


def exported(graph: Graph) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    dynamic = {name: {0: batch} for name in graph.inputs}
    # Two of everything: with one, torch would take the batch for fixed.
    program = torch.export.export(graph, inputs_of(graph, 2), dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names files of this machine
    return program


def pt2(graph: Graph, path: Path) -> Runner:
    torch.export.save(exported(graph), path)
    return torch.export.load(path).module()


def torchscript(graph: Graph, path: Path) -> Runner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch would rather have pt2
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of checks of shapes inside torch
        torch.jit.save(torch.jit.trace(graph, inputs_of(graph, 2)), path)
        return torch.jit.load(path)


FORMATS: dict[str, tuple[str, Callable[[Graph, Path], Runner]]] = {
    "onnx": (".onnx", onnx),
    "torchscript": (".ts", torchscript),
    "pt2": (".pt2", pt2),
}


def rebuild(vae: VAE, settings: dict[str, Any]) -> VAE:
    """The same VAE, made of `settings` as its class makes it: what is quicker in ours need not be exportable."""
    fresh = VAE(**settings)
    fresh.load_state_dict(vae.state_dict())
    return fresh.eval().requires_grad_(False)


def max_error(graph: Graph, run: Runner) -> float:
    """The largest difference of any output from what `graph` gives, in parts of 1 or of the output, if that is larger.

    Raises UserError where it is above `TOLERANCE`.
    """
    worst = 0.0
    for batch in BATCHES:
        inputs = inputs_of(graph, batch, seed=batch)
        for name, wanted, found in zip(graph.outputs, graph(*inputs), run(*inputs), strict=True):
            if found.shape != wanted.shape:
                raise UserError(f"{name} of {batch} images came out as {tuple(found.shape)}, not {tuple(wanted.shape)}")
            off = ((found - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
            worst = max(worst, math.inf if math.isnan(off) else off)
    if not worst <= TOLERANCE:
        raise UserError(f"the exported {type(graph).__name__.lower()} is off by {worst:.1e}, more than {TOLERANCE:.0e}")
    return worst


@torch.no_grad()
def export_graphs(vae: VAE, settings: dict[str, Any], form: str, out: str | Path) -> dict[str, Any]:
    """The three graphs as files in the new folder `out`, each read back and compared, and `model.json`, whose content
    is returned.

    `settings` are the arguments of `VAE` that `vae` was made from, `form` a name in `FORMATS`. Raises UserError where
    something is at `out`, and for a graph that cannot be written or is off.
    """
    suffix, write = FORMATS[form]
    channels, *size = vae.image_shape
    shapes = {"C, H, W": [channels, *size], "D": [vae.latent_dim], "": []}

    def tensors(names: tuple[str, ...]) -> dict[str, Any]:
        said = {name: dict(TENSOR_DOCS[name]) for name in names}
        return {name: {**s, "shape": ["batch", *shapes[s["shape"]]], "dtype": "float32"} for name, s in said.items()}

    result: dict[str, Any] = metadata(vae, settings, form)
    result["difference"] = {"of": "outputs from torch's, in parts of 1 or of the output, if that is larger"}
    result["graphs"] = {}
    with atomic_dir(out) as folder:
        for name, make in GRAPHS.items():
            graph, path = make(rebuild(vae, settings)), folder / f"{name}{suffix}"
            try:
                run = write(graph, path)
            except (RuntimeError, ValueError, TypeError) as error:  # of a network of one's own
                reason = (str(error).splitlines() or [""])[0]
                raise UserError(f"format={form} cannot hold the {name} ({reason})") from error
            result["difference"][name] = max_error(graph, run)
            result["graphs"][name] = {
                "file": path.name,
                "inputs": tensors(make.inputs),
                "outputs": tensors(make.outputs),
            }
        write_metadata(result, folder)
    return result


def metadata(vae: VAE, settings: dict[str, Any], form: str) -> dict[str, Any]:
    said = {"made_by": STAMP, "format": form, "torch": torch.__version__, "model": settings}
    return said | {"image_shape": list(vae.image_shape), "latent_dim": vae.latent_dim}


def write_metadata(result: dict[str, Any], folder: Path) -> None:
    (folder / "model.json").write_text(json.dumps(result, indent=2) + "\n")


def export_weights(vae: VAE, settings: dict[str, Any], out: str | Path) -> dict[str, Any]:
    """In the new folder `out` `model.safetensors`, the weights by their names in `VAE`, and in its metadata and
    `model.json` the recipe. Raises UserError where something is at `out`."""
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError:
        raise UserError('format=safetensors needs safetensors: pip install -e ".[export]"') from None
    state, name = vae.state_dict(), "model.safetensors"
    result = metadata(vae, settings, "safetensors")
    result |= {"file": name, "tensors": {k: list(v.shape) for k, v in state.items()}}
    with atomic_dir(out) as folder:
        header = {"made_by": STAMP, "model": json.dumps(settings)}
        save_file({k: v.contiguous() for k, v in state.items()}, folder / name, header)
        with safe_open(folder / name, "pt") as file:
            if set(file.keys()) != set(state) or not all(torch.equal(file.get_tensor(k), v) for k, v in state.items()):
                raise UserError(f"{name} does not hold the weights that were written; try again")
        write_metadata(result, folder)
    return result


def model_card(name: str, settings: dict[str, Any], data: dict[str, Any], numbers: dict[str, Any]) -> str:
    """What a person who gets the folder should know, in Markdown. `numbers` are the contents of a run's JSON files by
    their name."""
    model, licence = settings["model"], LICENCES.get(data.get("name", ""), "unknown: find out before you pass it on")
    evaluation, fidelity = numbers.get("evaluation", {}), numbers.get("fidelity", {})
    lines = [f"# {name}", "", f"A variational autoencoder of betavae, beta = {settings['beta']:g}.", ""]
    lines += [
        "```python",
        "import betavae",
        "",
        'vae = betavae.load("THIS_FOLDER").vae',
        "images = vae.sample(64)",
        "```",
        "",
    ]
    lines += ["![samples](samples.png)", "", "## Numbers", ""]
    for key, value in numbers.get("metrics", {}).get("test", {}).items():
        lines.append(f"- test {key}: {value:.4g}")
    for key in ("neg_elbo", *(key for key in evaluation if key.startswith("nll_"))):
        if key in evaluation:
            value = evaluation[key]
            lines.append(
                f"- {key} of {evaluation['images']:,} test images: {value['mean']:.3f} ± {value['se']:.3f} nats"
            )
    if fidelity:
        fid = fidelity["fid"]
        lines.append(f"- Fréchet distance of {fidelity['best']} samples: {fid['mean']:.3f} ± {fid['se']:.3f}")
    if note := evaluation.get("note") or numbers.get("metrics", {}).get("note"):
        lines.append(f"- note: {note}")
    if lines[-1] == "":
        lines.append("None were found beside the checkpoint.")
    lines += ["", "## Settings", "", "| setting | value |", "|---|---|"]
    for group, values in {"model": model, **{k: v for k, v in settings.items() if k != "model"}, "data": data}.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            lines.append(f"| {group}{'.' if key else ''}{key} | {value} |")
    lines += ["", "## Data", "", f"Licence: {licence}.", ""]
    return "\n".join(lines)
