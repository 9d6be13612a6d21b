"""Seconds per epoch of the tutorial's training, side by side: `python scripts/benchmark.py [rounds=3 quality=false]`.

reference: the tutorial's own loop, an item at a time through ToTensor. bare: the same net and batches as ours in a
plain in-memory loop. train.py: the real command, logging and checkpoints on, in the trainer's presets. floor: the
matrix products of an epoch alone. Each runs in a process of its own, in turn, so that a machine whose speed drifts
treats all alike. On a CUDA device, `trainer=cuda_graph` is among the presets, and sixteen runs side by side are
compared with one.
"""

# mypy: disable-error-code="valid-type"

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from betavae.errors import UserError, last_error_line
from betavae.runtime.cli import ScriptSettings, script_command
from betavae.runtime.settings import NonEmptyStr, PositiveInt, choice, constrained

REPO = Path(__file__).parents[1]
PRESETS = ["default", "default trainer.steps_per_batch=10", "fast"]
CUDA_PRESETS = ["default", "fast", "cuda_graph", "cuda_graph trainer.compile=true"]
SWEEP_JOBS = 16
IMAGES, BATCH, HIDDEN, LATENT, PIXELS = 60_000, 128, 400, 20, 784


class Settings(ScriptSettings):
    rounds: PositiveInt = Field(3, title="of everything in turn; medians and ranges are over rounds")
    epochs: PositiveInt = Field(5, title="of each training in a round; the first is warm-up where there are more")
    presets: constrained(list[str] | None, "null or a list of presets of the trainer") = Field(
        None, title="presets of the trainer, each with its changes; null: all that the device has"
    )
    quality: constrained(bool | None, "null, true or false") = Field(
        None, title="also the time to the tutorial's result (a minute per round); null: only on a CPU"
    )
    data_root: NonEmptyStr = Field("data", title="the data folder")
    only: choice(lambda: [None, "reference", "bare", "floor"]) = Field(
        None, title="run one part in this process and print its numbers: reference, bare, floor"
    )
    out: NonEmptyStr = Field("benchmark.png", title="the figure; its numbers go beside it, as .json")


def reference(data_root: str, epochs: int) -> dict[str, Any]:
    """The tutorial, line by line: DataLoader, ToTensor, sigmoid and BCE, plain Adam, `.item()` at each step."""
    import torch
    from torch import nn
    from torchvision import datasets, transforms

    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc21, self.fc22 = nn.Linear(784, 400), nn.Linear(400, 20), nn.Linear(400, 20)
            self.fc3, self.fc4 = nn.Linear(20, 400), nn.Linear(400, 784)

        def forward(self, x):
            h1 = torch.relu(self.fc1(x.view(-1, 784)))
            mu, logvar = self.fc21(h1), self.fc22(h1)
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
            return torch.sigmoid(self.fc4(torch.relu(self.fc3(z)))), mu, logvar

    def loss_function(recon_x, x, mu, logvar):
        bce = nn.functional.binary_cross_entropy(recon_x, x.view(-1, 784), reduction="sum")
        return bce - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())

    torch.manual_seed(0)
    train, test = (datasets.MNIST(data_root, train=t, transform=transforms.ToTensor()) for t in (True, False))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = VAE().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seconds = []
    for _ in range(epochs):
        started = time.perf_counter()
        total = 0.0
        for x, _ in torch.utils.data.DataLoader(train, batch_size=BATCH, shuffle=True):
            x = x.to(device)
            optimizer.zero_grad()
            loss = loss_function(x=x, **dict(zip(("recon_x", "mu", "logvar"), model(x), strict=True)))
            loss.backward()
            total += loss.item()
            optimizer.step()
        seconds.append(time.perf_counter() - started)
    x = (test.data.float() / 255).to(device)
    with torch.no_grad():
        recon_x, mu, logvar = model(x)
        neg_elbo = loss_function(recon_x, x, mu, logvar).item() / len(x)
    return {"epoch_seconds": seconds, "neg_elbo": neg_elbo}


def bare(data_root: str, epochs: int) -> dict[str, Any]:
    """Our net, objective and batches in a plain loop, with the default preset's settings."""
    import torch

    from betavae.data.datasets.mnist import mnist
    from betavae.data.loader import BatchLoader
    from betavae.models.cpu_kernels import use_fast_cpu_kernels
    from betavae.models.vae import VAE
    from betavae.objectives import elbo

    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"  # as in running/lightning.py
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = mnist(Path(data_root), "train").to(device)  # type: ignore[union-attr]
    vae = use_fast_cpu_kernels(VAE("mlp", [HIDDEN], LATENT, "relu", "bernoulli", [1, 28, 28])).to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
    seconds = []
    for epoch in range(epochs):
        started = time.perf_counter()
        total = torch.zeros((), device=device)
        for x, _ in BatchLoader(images, BATCH, epoch=partial(int, epoch)):
            loss = elbo(vae, x, torch.randn(1, len(x), LATENT, device=device), 1.0).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        total.item()
        seconds.append(time.perf_counter() - started)
    return {"epoch_seconds": seconds}


def floor(data_root: str, epochs: int) -> dict[str, Any]:
    """The 11 matrix products of a training step (forward, and backward to weights and to inputs), nothing else."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def epoch(dtype: torch.dtype) -> float:
        layers = [(PIXELS, HIDDEN), (HIDDEN, 2 * LATENT), (LATENT, HIDDEN), (HIDDEN, PIXELS)]
        pairs = []
        for number, (n_in, n_out) in enumerate(layers):
            x, w, g = (
                torch.randn(shape, device=device, dtype=dtype)
                for shape in ((BATCH, n_in), (n_out, n_in), (BATCH, n_out))
            )
            pairs += [(x, w.T), (g.T, x)] + ([(g, w)] if number else [])
        started = time.perf_counter()
        for _ in range(IMAGES // BATCH + 1):
            for left, right in pairs:
                left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    epoch(torch.bfloat16)
    seconds = {"float32": epoch(torch.float32), "bfloat16": epoch(torch.bfloat16)}
    torch.set_float32_matmul_precision("medium")
    return seconds | {"medium": epoch(torch.float32)}


def measured(arguments: list[str], folder: Path) -> tuple[str, float, float]:
    """Standard output, seconds from start to exit, and peak memory in GB of `python ARGUMENTS` in `folder`."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if status:
        raise UserError(f"{' '.join(arguments)} failed: {last_error_line(text)}")
    return text, seconds, usage.ru_maxrss / 1e6


def part(name: str, settings: Settings, folder: Path, epochs: int) -> dict[str, Any]:
    script = str(Path(__file__).resolve())
    root = Path(settings.data_root).absolute()
    text, seconds, memory = measured([script, f"only={name}", f"epochs={epochs}", f"data_root='{root}'"], folder)
    return json.loads(text.splitlines()[-1]) | {"process_seconds": seconds, "memory_gb": memory}


def train(overrides: list[str], settings: Settings, folder: Path) -> dict[str, Any]:
    run = folder / f"run_{time.time_ns()}"
    root = Path(settings.data_root).absolute()
    arguments = [str(REPO / "train.py"), *overrides, f"data.root='{root}'", f"hydra.run.dir='{run}'"]
    _, seconds, memory = measured(arguments, folder)
    return json.loads((run / "metrics.json").read_text()) | {"process_seconds": seconds, "memory_gb": memory}


def sweep(settings: Settings, folder: Path) -> dict[str, Any]:
    """Train `SWEEP_JOBS` runs side by side on one device."""
    root = Path(settings.data_root).absolute()
    words = ["experiment=tutorial", "trainer=cuda_graph", f"trainer.max_epochs={settings.epochs}"]
    jobs = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={SWEEP_JOBS}", f"seed=range({SWEEP_JOBS})"]
    places = [f"data.root='{root}'", "hydra.sweep.dir=sweep"]
    _, seconds, _ = measured([str(REPO / "train.py"), "-m", *words, *jobs, *places], folder)
    records = [json.loads(path.read_text()) for path in folder.glob("sweep/*/metrics.json")]
    shutil.rmtree(folder / "sweep")
    return {"process_seconds": seconds, "fit_seconds": [record["fit_seconds"] for record in records]}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


@script_command(Settings)
def main(settings: Settings) -> None:
    if settings.only is not None:
        loop = {"reference": reference, "bare": bare, "floor": floor}[settings.only]
        print(json.dumps(loop(settings.data_root, settings.epochs)))
        return

    import torch
    from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

    from betavae.data.datasets.mnist import mnist
    from betavae.plotting import new_figure, save_figure
    from betavae.storage.files import STAMP, atomic_path

    root = Path(settings.data_root)
    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        mnist(root, split)  # unpacked
    cuda = torch.cuda.is_available()
    presets = settings.presets or (CUDA_PRESETS if cuda else PRESETS)
    quality = settings.quality if settings.quality is not None else not cuda
    warm = slice(1 if settings.epochs > 1 else 0, None)
    results: dict[str, list[Any]] = {}
    cuda = cuda and "cuda_graph" in presets
    steps = 3 + len(presets) + 2 * quality + cuda
    bar = Tqdm(total=settings.rounds * steps, desc="benchmark", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def note(name: str, result: dict[str, Any]) -> None:
            results.setdefault(name, []).append(result)
            with atomic_path(Path(settings.out).with_suffix(".json")) as path:  # now: a limit may stop the rest
                path.write_text(json.dumps({"made_by": STAMP} | results, indent=1) + "\n")
            bar.update()

        for _ in range(settings.rounds):
            note("floor", part("floor", settings, folder, 1))
            note("reference", part("reference", settings, folder, settings.epochs))
            note("bare", part("bare", settings, folder, settings.epochs))
            for preset in presets:
                epochs = f"trainer.max_epochs={settings.epochs}"
                overrides = ["experiment=tutorial", *f"trainer={preset}".split(), epochs]
                note(f"train.py trainer={preset}", train(overrides, settings, folder))
            if quality:
                note("reference, 10 epochs", part("reference", settings, folder, 10))
                note("speedrun", train(["experiment=speedrun"], settings, folder))
            if cuda:
                note("sweep", sweep(settings, folder))
    bar.close()

    loops = ["reference", "bare", *(f"train.py trainer={preset}" for preset in presets)]
    epoch = {name: [statistics.median(r["epoch_seconds"][warm]) for r in results[name]] for name in loops}
    rounds = settings.rounds
    print(f"seconds per epoch of {IMAGES:,} images: median (range) of {rounds} rounds; ratios are within a round\n")
    print(f"{'':52}{'seconds per epoch':24}{'images/s':>9}   {'times faster':22}{'of floor':>9}{'peak GB':>9}")
    for name in loops:
        ratios = [a / b for a, b in zip(epoch["reference"], epoch[name], strict=True)]
        key = "bfloat16" if name.endswith("fast") else "float32" if name == "reference" else "medium"
        share = statistics.median(f[key] / s for f, s in zip(results["floor"], epoch[name], strict=True))
        memory = max(result["memory_gb"] for result in results[name])
        rate = IMAGES / statistics.median(epoch[name])
        print(f"{name:52}{spread(epoch[name]):24}{rate:9,.0f}   {spread(ratios):22}{share:9.0%}{memory:9.2f}")
    for key in ("float32", "medium", "bfloat16"):
        print(f"{'matrix products, ' + key:52}{spread([result[key] for result in results['floor']])}")
    print()
    for name in loops[2:]:
        if not name.endswith("fast"):  # which multiplies in another precision
            ratios = [a / b for a, b in zip(epoch[name], epoch["bare"], strict=True)]
            print(f"{name} over the bare loop: {spread(ratios)}")
    if quality:
        slow, quick = results["reference, 10 epochs"], results["speedrun"]
        fits = [sum(a["epoch_seconds"]) / sum(b["epoch_seconds"]) for a, b in zip(slow, quick, strict=True)]
        processes = [a["process_seconds"] / b["process_seconds"] for a, b in zip(slow, quick, strict=True)]
        print("\nto the tutorial's result after 10 epochs, reference against experiment=speedrun")
        results_of = [r["neg_elbo"] for r in slow], [r["test"]["neg_elbo"] for r in quick]
        print(f"  test neg. ELBO     {spread(results_of[0])}, {spread(results_of[1])}")
        print(
            f"  training seconds   {spread([sum(r['epoch_seconds']) for r in slow])}, "
            f"{spread([sum(r['epoch_seconds']) for r in quick])}: {spread(fits)} times sooner"
        )
        print(
            f"  whole process      {spread([r['process_seconds'] for r in slow])}, "
            f"{spread([r['process_seconds'] for r in quick])}: {spread(processes)} times sooner"
        )

    if cuda:
        alone, many = results["train.py trainer=cuda_graph"], results["sweep"]
        ratios = [b["process_seconds"] / a["process_seconds"] for a, b in zip(alone, many, strict=True)]
        print(f"\n{SWEEP_JOBS} runs side by side against one, trainer=cuda_graph, {settings.epochs} epochs")
        sides = (spread([r["process_seconds"] for r in side]) for side in (many, alone))
        print(f"  whole commands     {' against '.join(sides)}: {spread(ratios)} times as long")
        beside = spread([seconds for r in many for seconds in r["fit_seconds"]])
        print(f"  training seconds   {beside} each against {spread([r['fit_seconds'] for r in alone])}")

    figure = new_figure(7, 0.5 * len(loops) + 1)
    axes = figure.add_subplot()
    axes.barh(loops[::-1], [statistics.median(epoch[name]) for name in loops[::-1]], color="tab:blue")
    for name, style in (("float32", "-"), ("bfloat16", "--")):
        products = statistics.median(result[name] for result in results["floor"])
        axes.axvline(products, color="black", linewidth=1, linestyle=style, label=f"matrix products, {name}")
    axes.set_xlabel(f"seconds per epoch of {IMAGES:,} images")
    axes.legend(fontsize=8)
    save_figure(figure, settings.out)
    print(f"\nfigure in {settings.out}, numbers in {Path(settings.out).with_suffix('.json')}")


if __name__ == "__main__":
    main()
