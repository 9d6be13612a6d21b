"""Compare training speed with the tutorial: `python scripts/benchmarks/training.py [rounds=3]`.

Every round runs these in turn, each in its own process, so that a drift of the machine's speed affects all of them:

- floor: the matrix products of an epoch alone
- reference: the tutorial's own loop, one image at a time through ToTensor
- bare: the network and the batches of train.py in a plain in-memory loop
- train.py: the command with its logging and checkpoints, once per trainer preset

On a CUDA device, `trainer=cuda_graph` is among the presets, and 16 runs side by side are compared with one.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt

from betavae.errors import UserError, last_error_line
from betavae.runtime.cli import ScriptSettings, script_command

REPO = Path(__file__).parents[2]
CPU_PRESETS = ["default", "default trainer.steps_per_batch=10", "fast"]
CUDA_PRESETS = ["default", "fast", "cuda_graph", "cuda_graph trainer.compile=true"]
QUALITY_PARTS = ("reference, 10 epochs", "speedrun")
SWEEP_JOBS = 16
NUM_IMAGES, BATCH_SIZE, NUM_PIXELS, HIDDEN_DIM, LATENT_DIM = 60_000, 128, 784, 400, 20

Record = dict[str, Any]  # one measurement, as it is written to the JSON file


class Settings(ScriptSettings):
    rounds: PositiveInt = Field(3, title="number of rounds; medians and ranges are over rounds")
    epochs: PositiveInt = Field(5, title="epochs per training; the first is a warm-up if there are several")
    presets: list[str] | None = Field(None, title="trainer presets, each with its overrides; null: all for the device")
    quality: bool | None = Field(
        None, title="true: also the time to the tutorial's result (a minute per round); null: on a CPU only"
    )
    data_root: str = Field("data", title="the data folder")
    only: Literal["floor", "reference", "bare"] | None = Field(
        None, title="run one part in this process and print its numbers: floor, reference, bare"
    )
    out: str = Field("benchmark.png", title="the figure; the numbers go into a .json file beside it")


def run_floor(data_root: str, epochs: int) -> Record:
    """Time the 11 matrix products of a training step: forward, and backward to the weights and inputs."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def time_epoch(dtype: torch.dtype) -> float:
        layers = [
            (NUM_PIXELS, HIDDEN_DIM),
            (HIDDEN_DIM, 2 * LATENT_DIM),
            (LATENT_DIM, HIDDEN_DIM),
            (HIDDEN_DIM, NUM_PIXELS),
        ]
        products = []
        for number, (n_in, n_out) in enumerate(layers):
            x, weight, gradient = (
                torch.randn(shape, device=device, dtype=dtype)
                for shape in ((BATCH_SIZE, n_in), (n_out, n_in), (BATCH_SIZE, n_out))
            )
            products += [(x, weight.T), (gradient.T, x)]
            if number:  # the images need no gradient
                products.append((gradient, weight))
        started = time.perf_counter()
        for _ in range(NUM_IMAGES // BATCH_SIZE + 1):
            for left, right in products:
                left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    time_epoch(torch.bfloat16)
    seconds = {"float32": time_epoch(torch.float32), "bfloat16": time_epoch(torch.bfloat16)}
    torch.set_float32_matmul_precision("medium")
    return seconds | {"medium": time_epoch(torch.float32)}


def run_reference(data_root: str, epochs: int) -> Record:
    """Train with the loop of the tutorial.

    It uses DataLoader, ToTensor, sigmoid and BCE, plain Adam, and `.item()` at each step.
    """
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
        for x, _ in torch.utils.data.DataLoader(train, batch_size=BATCH_SIZE, shuffle=True):
            x = x.to(device)
            optimizer.zero_grad()
            recon_x, mu, logvar = model(x)
            loss = loss_function(recon_x, x, mu, logvar)
            loss.backward()
            total += loss.item()
            optimizer.step()
        seconds.append(time.perf_counter() - started)
    x = (test.data.float() / 255).to(device)
    with torch.no_grad():
        recon_x, mu, logvar = model(x)
        neg_elbo = loss_function(recon_x, x, mu, logvar).item() / len(x)
    return {"epoch_seconds": seconds, "neg_elbo": neg_elbo}


def run_bare(data_root: str, epochs: int) -> Record:
    """Train the network with the objective and batches of train.py in a plain loop.

    The steps are those of the default preset.
    """
    import torch

    from betavae.data.loader import BatchLoader
    from betavae.data.source import DataSource
    from betavae.models.vae import VAE
    from betavae.objectives import elbo

    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"  # train.py sets it too
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = DataSource("mnist", data_root, 0, "none").load_split("train").to(device)
    vae = VAE("mlp", [HIDDEN_DIM], LATENT_DIM, "relu", "bernoulli", [1, 28, 28]).to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
    seconds = []
    for epoch in range(epochs):
        started = time.perf_counter()
        total = torch.zeros((), device=device)
        for x, _ in BatchLoader(images, BATCH_SIZE, epoch=partial(int, epoch)):
            loss = elbo(vae, x, torch.randn(1, len(x), LATENT_DIM, device=device), 1.0).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        total.item()
        seconds.append(time.perf_counter() - started)
    return {"epoch_seconds": seconds}


PARTS = {"floor": run_floor, "reference": run_reference, "bare": run_bare}


def run_python(arguments: list[str], folder: Path) -> tuple[str, Record]:
    """Run `python ARGUMENTS` in `folder`.

    Returns:
        Its output, and a record of its seconds from start to exit and its peak memory in GB.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if status:
        raise UserError(f"{' '.join(arguments)} failed: {last_error_line(text)}")
    return text, {"process_seconds": seconds, "memory_gb": usage.ru_maxrss / 1e6}


class Runner:
    """Run the parts of the benchmark as processes in one temporary folder."""

    def __init__(self, settings: Settings, folder: Path):
        self.folder = folder
        self.epochs = settings.epochs
        self.data_root = Path(settings.data_root).absolute()

    def run_part(self, name: str, epochs: int) -> Record:
        script = str(Path(__file__).resolve())
        arguments = [script, f"only={name}", f"epochs={epochs}", f"data_root='{self.data_root}'"]
        text, usage = run_python(arguments, self.folder)
        return json.loads(text.splitlines()[-1]) | usage

    def run_training(self, *overrides: str) -> Record:
        run = self.folder / f"run_{time.time_ns()}"
        arguments = [*overrides, f"data.root='{self.data_root}'", f"hydra.run.dir='{run}'"]
        _, usage = run_python([str(REPO / "train.py"), *arguments], self.folder)
        return json.loads((run / "metrics.json").read_text()) | usage

    def run_preset(self, preset: str) -> Record:
        overrides = [*f"trainer={preset}".split(), f"trainer.max_epochs={self.epochs}"]
        return self.run_training("experiment=tutorial", *overrides)

    def run_sweep(self) -> Record:
        """Train `SWEEP_JOBS` runs side by side on one device."""
        training = ["experiment=tutorial", "trainer=cuda_graph", f"trainer.max_epochs={self.epochs}"]
        jobs = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={SWEEP_JOBS}", f"seed=range({SWEEP_JOBS})"]
        paths = [f"data.root='{self.data_root}'", "hydra.sweep.dir=sweep"]
        _, usage = run_python([str(REPO / "train.py"), "-m", *training, *jobs, *paths], self.folder)
        records = [json.loads(path.read_text()) for path in self.folder.glob("sweep/*/metrics.json")]
        shutil.rmtree(self.folder / "sweep")
        return usage | {"fit_seconds": [record["fit_seconds"] for record in records]}


class Report:
    """Medians and ranges over the rounds."""

    def __init__(self, settings: Settings, results: dict[str, list[Record]]):
        self.settings, self.results = settings, results
        self.loops = ["reference", "bare", *(name for name in results if name.startswith("train.py"))]
        warmup = 1 if settings.epochs > 1 else 0
        self.epoch_seconds = {
            name: [statistics.median(record["epoch_seconds"][warmup:]) for record in results[name]]
            for name in self.loops
        }

    def values(self, name: str, key: str) -> list[float]:
        return [record[key] for record in self.results[name]]

    def print_epochs(self) -> None:
        rounds, seconds = self.settings.rounds, self.epoch_seconds
        print(f"seconds per epoch of {NUM_IMAGES:,} images: median (range) of {rounds} rounds; ratios are per round\n")
        print(f"{'':52}{'seconds per epoch':24}{'images/s':>9}   {'times faster':22}{'of floor':>9}{'peak GB':>9}")
        for name in self.loops:
            precision = "bfloat16" if name.endswith("fast") else "float32" if name == "reference" else "medium"
            floor = statistics.median(divide(self.values("floor", precision), seconds[name]))
            speedup = format_range(divide(seconds["reference"], seconds[name]))
            rate = NUM_IMAGES / statistics.median(seconds[name])
            memory = max(self.values(name, "memory_gb"))
            print(f"{name:52}{format_range(seconds[name]):24}{rate:9,.0f}   {speedup:22}{floor:9.0%}{memory:9.2f}")
        for precision in ("float32", "medium", "bfloat16"):
            print(f"{'matrix products, ' + precision:52}{format_range(self.values('floor', precision))}")
        print()
        for name in self.loops[2:]:
            if not name.endswith("fast"):  # its products have another precision
                print(f"{name} over the bare loop: {format_range(divide(seconds[name], seconds['bare']))}")

    def print_quality(self) -> None:
        reference, speedrun = (self.results[name] for name in QUALITY_PARTS)
        print("\nto the tutorial's result after 10 epochs, reference against experiment=speedrun")
        tutorial = format_range([record["neg_elbo"] for record in reference])
        print(f"  test neg. ELBO     {tutorial}, {format_range([record['test']['neg_elbo'] for record in speedrun])}")
        fits = [[sum(record["epoch_seconds"], 0.0) for record in records] for records in (reference, speedrun)]
        self.print_speedup("training seconds", *fits)
        self.print_speedup("whole process", *(self.values(name, "process_seconds") for name in QUALITY_PARTS))

    def print_speedup(self, label: str, slow: list[float], quick: list[float]) -> None:
        speedup = format_range(divide(slow, quick))
        print(f"  {label:19}{format_range(slow)}, {format_range(quick)}: {speedup} times faster")

    def print_sweep(self) -> None:
        single = "train.py trainer=cuda_graph"
        print(f"\n{SWEEP_JOBS} runs side by side against one, trainer=cuda_graph, {self.settings.epochs} epochs")
        many, one = self.values("sweep", "process_seconds"), self.values(single, "process_seconds")
        ratio = format_range(divide(many, one))
        print(f"  whole commands     {format_range(many)} against {format_range(one)}: {ratio} times as long")
        fits = [seconds for record in self.results["sweep"] for seconds in record["fit_seconds"]]
        fit = format_range(self.values(single, "fit_seconds"))
        print(f"  training seconds   {format_range(fits)} each against {fit}")

    def save_figure(self) -> None:
        from betavae.plotting import create_figure, save_figure

        figure = create_figure(7, 0.5 * len(self.loops) + 1)
        axes = figure.add_subplot()
        names = self.loops[::-1]
        axes.barh(names, [statistics.median(self.epoch_seconds[name]) for name in names], color="tab:blue")
        for precision, style in (("float32", "-"), ("bfloat16", "--")):
            seconds = statistics.median(self.values("floor", precision))
            axes.axvline(seconds, color="black", linewidth=1, linestyle=style, label=f"matrix products, {precision}")
        axes.set_xlabel(f"seconds per epoch of {NUM_IMAGES:,} images")
        axes.legend(fontsize=8)
        save_figure(figure, self.settings.out)


def divide(numerators: list[float], denominators: list[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def format_range(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


@script_command(Settings)
def main(settings: Settings) -> None:
    if settings.only is not None:
        print(json.dumps(PARTS[settings.only](settings.data_root, settings.epochs)))
        return

    import torch
    from tqdm import tqdm

    from betavae.data.source import DataSource
    from betavae.storage.files import STAMP, atomic_path

    for split in ("train", "test"):  # unpacks the files, which the reference reads
        DataSource("mnist", settings.data_root, 0, "none").load_split(split)
    cuda = torch.cuda.is_available()
    presets = settings.presets or (CUDA_PRESETS if cuda else CPU_PRESETS)
    quality = settings.quality if settings.quality is not None else not cuda
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(settings, Path(folder))
        parts: dict[str, Callable[[], Record]] = {
            "floor": partial(runner.run_part, "floor", 1),
            "reference": partial(runner.run_part, "reference", settings.epochs),
            "bare": partial(runner.run_part, "bare", settings.epochs),
            **{f"train.py trainer={preset}": partial(runner.run_preset, preset) for preset in presets},
        }
        if quality:
            trainings = (partial(runner.run_part, "reference", 10), partial(runner.run_training, "experiment=speedrun"))
            parts |= zip(QUALITY_PARTS, trainings, strict=True)
        if cuda and "cuda_graph" in presets:
            parts["sweep"] = runner.run_sweep
        results: dict[str, list[Record]] = {name: [] for name in parts}
        numbers = Path(settings.out).with_suffix(".json")
        for name in tqdm([*parts] * settings.rounds, "benchmark", disable=None):
            results[name].append(parts[name]())
            with atomic_path(numbers) as path:  # after each part, in case that the process is stopped
                path.write_text(json.dumps({"made_by": STAMP} | results, indent=1) + "\n")

    report = Report(settings, results)
    report.print_epochs()
    if quality:
        report.print_quality()
    if "sweep" in results:
        report.print_sweep()
    report.save_figure()
    print(f"\nfigure in {settings.out}, numbers in {numbers}")


if __name__ == "__main__":
    main()
