"""Export a trained VAE for programs without betavae: graphs with a dynamic batch size, or its weights.

The graphs take and return float32, for B images of `(C, H, W)` and D latent dimensions:

- encoder: image `(B, C, H, W)` -> mean, logvar of q(z|x), both `(B, D)`.
- decoder: z `(B, D)` -> image `(B, C, H, W)`, the mean of p(x|z). To sample, decode z from N(0, I), or for a learned
  prior from the graph `prior`.
- prior, of a model with a learned prior: noise `(B, D)` from N(0, I), and for a mixture uniform `(B,)` in [0, 1) -> z.
- score: image, noise `(B, D)` from N(0, I) -> recon, which is -log p(x|z) at z = mean + std * noise, and kl, which is
  KL(q(z|x) || p(z)), both `(B,)` in nats. Their sum is the negative ELBO from one sample.

Images are in the units of the data, or with `data.scaling=unit` in [0, 1]: see `Scaling.to_data_units`. For a
conditional model, each graph also takes label `(B,)`, int64, the number of each image's class.
"""

import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from betavae.data.loader import BYTES
from betavae.data.scaling import Scaling
from betavae.errors import UserError
from betavae.models.priors import StandardNormal
from betavae.models.vae import VAE
from betavae.storage.files import STAMP, atomic_dir

CHECKED_BATCH_SIZES = (1, 2, 7)
TOLERANCE = 1e-4  # of outputs, relative to the larger of 1 and the output

LICENSES = {
    "mnist": "MNIST by Yann LeCun, Corinna Cortes and Christopher J. C. Burges, CC BY-SA 3.0",
    "sprites": "sprites drawn by betavae; no rights reserved by others",
    "fashion_mnist": "Fashion-MNIST by Zalando SE, MIT License",
    "kmnist": "KMNIST by the Center for Open Data in the Humanities, CC BY-SA 4.0",
    "dsprites": "dSprites by Loic Matthey, Irina Higgins, Demis Hassabis and Alexander Lerchner, Apache License 2.0",
}


class Graph(nn.Module):
    """A function of named tensors, computed by a VAE."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(self, vae: VAE, scaling: Scaling = BYTES):
        super().__init__()
        self.vae: VAE = vae
        self.scaling = scaling
        if vae.classes:
            self.inputs = (*self.inputs, "label")


class Encoder(Graph):
    """Images to posteriors."""

    inputs, outputs = ("image",), ("mean", "logvar")

    def forward(self, image: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        posterior = self.vae.given(label).encode(self.scaling.from_data_units(image))
        return posterior.mean, posterior.logvar


class Decoder(Graph):
    """Latents to images."""

    inputs, outputs = ("z",), ("image",)

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor]:
        x = self.vae.given(label).decode(z)
        return (x.clamp(0, 1) if self.scaling.mode == "unit" else self.scaling.invert(x).float(),)


class Prior(Graph):
    """Noise to samples of a learned prior."""

    inputs, outputs = ("noise",), ("z",)

    def forward(self, noise: Tensor, label: Tensor | None = None) -> tuple[Tensor]:
        return (self.vae.given(label).prior.transform(noise),)


class MixturePrior(Graph):
    """Noise to samples of a learned mixture, whose components are chosen by uniform numbers."""

    inputs, outputs = ("noise", "uniform"), ("z",)

    def forward(self, noise: Tensor, uniform: Tensor, label: Tensor | None = None) -> tuple[Tensor]:
        return (self.vae.given(label).prior.transform(noise, uniform),)


class Score(Graph):
    """Images to the terms of their negative ELBO."""

    inputs, outputs = ("image", "noise"), ("recon", "kl")

    def forward(self, image: Tensor, noise: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, vae = self.scaling.from_data_units(image), self.vae.given(label)
        posterior = vae.encode(x)
        z = posterior.rsample(noise)
        log_px = vae.likelihood.log_prob(x, vae.decode_params(z))
        return -log_px, vae.kl(posterior, z).sum(1)


def make_prior(vae: VAE, scaling: Scaling) -> Graph:
    """Return the graph of a learned prior."""
    return (MixturePrior if vae.prior.has_components else Prior)(vae, scaling)


GRAPHS = {"encoder": Encoder, "decoder": Decoder, "score": Score, "prior": make_prior}
TENSOR_DOCS: dict[str, dict[str, Any]] = {
    "image": {"shape": "C, H, W", "range": [0, 1], "unit": "gray value or color, byte / 255"},
    "mean": {"shape": "D", "unit": "mean of q(z|x)"},
    "logvar": {"shape": "D", "unit": "log-variance of q(z|x)"},
    "z": {"shape": "D", "unit": "a sample of q(z|x), or of the prior: {prior}"},
    "noise": {"shape": "D", "unit": "samples of N(0, I)"},
    "recon": {"shape": "", "unit": "nats per image, summed over pixels, of the scaled values that the network sees"},
    "kl": {"shape": "", "range": [0, None], "unit": "nats per image, summed over latent dimensions"},
    "uniform": {"shape": "", "range": [0, 1], "unit": "uniform samples below 1, which choose components of the prior"},
    "label": {"shape": "", "unit": "number of the image's class in model.classes"},
}


def make_inputs(graph: Graph, batch_size: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Draw random inputs of a graph."""
    generator, vae = torch.Generator().manual_seed(seed), graph.vae

    def draw(name: str) -> Tensor:
        if name == "image":
            x = torch.rand(batch_size, *vae.image_shape, generator=generator)
            return graph.scaling.to_data_units(x).float()
        if name == "uniform":
            return torch.rand(batch_size, generator=generator)
        if name == "label":
            return torch.randint(len(vae.classes), (batch_size,), generator=generator)
        return torch.randn(batch_size, vae.latent_dim, generator=generator)

    return tuple(map(draw, graph.inputs))


Runner = Callable[..., Any]  # tensors -> a sequence of tensors


def write_onnx(graph: Graph, path: Path) -> Runner:
    """Write an ONNX file and return a function that runs it with onnxruntime."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it.
    except ImportError as error:
        raise UserError(f'format=onnx needs {error.name}: pip install -e ".[export]"') from None
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)  # They log every rewriting.
    # Decomposed by torch, since onnxscript's log-sigmoid is log(sigmoid(x)), which is -inf below x = -88 (0.7).
    program: Any = torch.onnx.export(
        export_program(graph).run_decompositions(),
        input_names=list(graph.inputs),
        output_names=list(graph.outputs),
        dynamo=True,
        verbose=False,
    )
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> list[Tensor]:
        arrays = {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, arrays)]

    return run


def export_program(graph: Graph) -> torch.export.ExportedProgram:
    """Export a graph with a dynamic batch size, without the paths of this machine."""
    batch = torch.export.Dim("batch", min=1)
    dynamic = {name: {0: batch} for name in graph.inputs}
    # torch would treat a batch size of 1 as constant.
    program = torch.export.export(graph, make_inputs(graph, 2), dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def write_pt2(graph: Graph, path: Path) -> Runner:
    """Write a torch.export file and return a function that runs it."""
    torch.export.save(export_program(graph), path)
    return torch.export.load(path).module()


def write_torchscript(graph: Graph, path: Path) -> Runner:
    """Write a TorchScript file and return a function that runs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch recommends pt2 instead.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # Shapes except the batch size are constants.
        torch.jit.save(torch.jit.trace(graph, make_inputs(graph, 2)), path)
        return torch.jit.load(path)


FORMATS: dict[str, tuple[str, Callable[[Graph, Path], Runner]]] = {
    "onnx": (".onnx", write_onnx),
    "torchscript": (".ts", write_torchscript),
    "pt2": (".pt2", write_pt2),
}


def measure_error(graph: Graph, run: Runner, graph_name: str) -> float:
    """Measure the largest output error of an exported graph.

    The error is relative to the larger of 1 and the output.

    Raises:
        UserError: If it is above `TOLERANCE`, or a shape differs.
    """
    largest = 0.0
    for batch_size in CHECKED_BATCH_SIZES:
        inputs = make_inputs(graph, batch_size, seed=batch_size)
        for name, expected, found in zip(graph.outputs, graph(*inputs), run(*inputs), strict=True):
            if found.shape != expected.shape:
                shapes = f"{tuple(found.shape)}, not {tuple(expected.shape)}"
                raise UserError(f"the exported {name} of {batch_size} images has shape {shapes}")
            error = ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()
            largest = max(largest, math.inf if math.isnan(error) else error)
    if largest > TOLERANCE:
        raise UserError(
            f"the exported {graph_name} differs from torch by {largest:.1e}; expected at most {TOLERANCE:.0e}"
        )
    return largest


@torch.no_grad()
def export_graphs(
    vae: VAE, settings: Mapping[str, Any], form: str, out: str | Path, scaling: Scaling = BYTES
) -> dict[str, Any]:
    """Write the graphs to a new folder, with their description in `model.json`.

    Each file is read back and compared with the VAE.

    Args:
        vae: The VAE.
        settings: Its arguments, for the description.
        form: A key of `FORMATS`.
        out: The folder.
        scaling: From the values of the data to those that the VAE sees.

    Returns:
        The content of `model.json`.

    Raises:
        UserError: If `out` exists, or the format does not support a graph or changes its outputs.
    """
    suffix, write = FORMATS[form]
    result: dict[str, Any] = build_metadata(vae, settings, form, scaling)
    result["difference"] = {"of": "outputs from torch, relative to the larger of 1 and the output"}
    result["graphs"] = {}
    with atomic_dir(out) as folder:
        for name, make in GRAPHS.items():
            if name == "prior" and isinstance(vae.prior, StandardNormal):
                continue
            graph, path = make(vae, scaling), folder / f"{name}{suffix}"
            try:
                run = write(graph, path)
            except (RuntimeError, ValueError, TypeError) as error:  # raised for some custom networks and likelihoods
                reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
                raise UserError(f"format={form} does not support the {name} of this model ({reason})") from error
            result["difference"][name] = measure_error(graph, run, name)
            inputs, outputs = (describe_tensors(names, vae, scaling) for names in (graph.inputs, graph.outputs))
            result["graphs"][name] = {"file": path.name, "inputs": inputs, "outputs": outputs}
        write_metadata(result, folder)
    return result


def describe_tensors(names: tuple[str, ...], vae: VAE, scaling: Scaling) -> dict[str, dict[str, Any]]:
    """Describe inputs or outputs of a graph: shape, dtype, range and unit."""
    docs = dict(TENSOR_DOCS)
    if not scaling.is_bytes:
        unit = f"of the type's range ({scaling.dtype})" if scaling.mode == "unit" else f"as stored ({scaling.dtype})"
        span = [0, 1] if scaling.mode == "unit" else [None, None]
        docs["image"] = {"shape": "C, H, W", "range": span, "unit": f"values {unit}"}
    shapes = {"C, H, W": vae.image_shape, "D": (vae.latent_dim,), "": ()}
    prior = "N(0, I)" if isinstance(vae.prior, StandardNormal) else "an output of the graph `prior`"
    described = {}
    for name in names:
        about = docs[name] | {"unit": docs[name]["unit"].format(prior=prior)}
        about |= {"shape": ["batch", *shapes[about["shape"]]], "dtype": "int64" if name == "label" else "float32"}
        if name == "kl" and not isinstance(vae.prior, StandardNormal):
            del about["range"]  # an estimate from one sample may be negative
            about["unit"] = "nats per image, log q(z|x) - log p(z) with the exact entropy of q(z|x)"
        if name == "label":
            about["range"] = [0, len(vae.classes) - 1]
        described[name] = about
    return described


def build_metadata(vae: VAE, settings: Mapping[str, Any], form: str, scaling: Scaling) -> dict[str, Any]:
    """Build the part of `model.json` that all formats share."""
    return {
        "made_by": STAMP,
        "format": form,
        "torch": torch.__version__,
        "model": dict(settings),
        "image_shape": list(vae.image_shape),
        "latent_dim": vae.latent_dim,
        "scaling": asdict(scaling),
    }


def write_metadata(metadata: dict[str, Any], folder: Path) -> None:
    """Write `model.json`."""
    (folder / "model.json").write_text(json.dumps(metadata, indent=2) + "\n")


def export_weights(vae: VAE, settings: Mapping[str, Any], out: str | Path, scaling: Scaling = BYTES) -> dict[str, Any]:
    """Write the weights to `model.safetensors` in a new folder.

    The settings are in its metadata and in `model.json`, whose content is returned.

    Raises:
        UserError: If `out` exists.
    """
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError:
        raise UserError('format=safetensors needs safetensors: pip install -e ".[export]"') from None
    weights, name = {key: value.contiguous() for key, value in vae.state_dict().items()}, "model.safetensors"
    result = build_metadata(vae, settings, "safetensors", scaling)
    result |= {"file": name, "tensors": {key: list(value.shape) for key, value in weights.items()}}
    with atomic_dir(out) as folder:
        save_file(weights, folder / name, {"made_by": STAMP, "model": json.dumps(dict(settings))})
        with safe_open(folder / name, "pt") as file:
            saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if set(saved) != set(weights) or not all(torch.equal(saved[key], weights[key]) for key in weights):
            raise UserError(f"{name} does not contain the weights that were written; try again")
        write_metadata(result, folder)
    return result


def format_model_card(
    name: str, settings: Mapping[str, Any], data: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]
) -> str:
    """Format the README of an exported folder in Markdown.

    Args:
        name: The title.
        settings: The arguments of `VAEModule`.
        data: The arguments of `ImageDataModule`.
        results: The contents of the run's JSON files by name: "metrics", "evaluation" and "fidelity".
    """
    license_ = LICENSES.get(data.get("name", ""), "unknown; find out before you share the model")
    rows = []
    for group, values in {"model": settings["model"], **settings, "data": data}.items():
        if isinstance(values, Mapping):
            rows += [f"| {group}.{key} | {value} |" for key, value in values.items()]
        else:
            rows.append(f"| {group} | {values} |")
    numbers = "\n".join(list_numbers(results)) or "None were found in the run folder."
    table = "\n".join(rows)
    prior, classes = settings["model"].get("prior", {"name": "standard"})["name"], settings["model"].get("classes")
    latents = "N(0, I)" if prior == "standard" else f"a learned prior ({prior})"
    kind, imports, sample = "A", "import betavae", "vae.sample(64)"
    if classes:
        kind, imports = "A conditional", "import betavae\nimport torch"
        sample = f"vae.given(torch.tensor([0])).sample(64)  # of the class {classes[0]}"
    return f"""# {name}

{kind} variational autoencoder of betavae, beta = {settings["beta"]:g}, with the prior {latents}.

```python
{imports}

vae = betavae.load("THIS_FOLDER").vae
samples = {sample}
```

![samples](samples.png)

## Numbers

{numbers}

## Settings

| setting | value |
|---|---|
{table}

## Data

License: {license_}.
"""


def list_numbers(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List the results of a run as Markdown items."""
    metrics, evaluation, fidelity = (results.get(name, {}) for name in ("metrics", "evaluation", "fidelity"))
    lines = [f"- test {key}: {value:.4g}" for key, value in metrics.get("test", {}).items()]
    for key, value in evaluation.items():
        if key == "neg_elbo" or key.startswith("nll_"):
            images = f"{evaluation['images']:,} test images"
            lines.append(f"- {key} of {images}: {value['mean']:.3f} ± {value['se']:.3f} nats")
    if fidelity:
        fid = fidelity["fid"]
        lines.append(f"- Fréchet distance of {fidelity['best']} samples: {fid['mean']:.3f} ± {fid['se']:.3f}")
    if note := evaluation.get("note") or metrics.get("note"):
        lines.append(f"- note: {note}")
    return lines
