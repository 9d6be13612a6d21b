"""Whole commands on a CUDA GPU: `python -m pytest tests/gpu -n 0`, in at most four minutes on 16 cores.

This process must never initialize CUDA, since it forks the commands. It reads checkpoints with `map_location="cpu"`.
"""

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config
from lightning.pytorch.callbacks import Callback

import betavae
from betavae.applications.sampling import sample_posterior
from betavae.data import datamodule
from betavae.models.likelihoods import LIKELIHOODS
from betavae.models.priors import PRIORS
from betavae.models.vae import VAE
from betavae.module import VAEModule
from betavae.objectives import OBJECTIVES
from betavae.runtime.callbacks import CALLBACKS
from tests.commands import REPO, TINY
from tests.gpu.background import Command, Commands, has_cuda
from tests.gpu.comparisons import compare_objectives, compare_priors

ACCELERATOR, DEVICE = "gpu", "cuda"

if not has_cuda():
    pytest.skip("no GPU that torch can use through CUDA", allow_module_level=True)

SMALL = [*TINY, "trainer.max_epochs=2", "callbacks.figures_every_n_epochs=0", f"trainer.accelerator={ACCELERATOR}"]

LABELS = ["model.conditional=true", "prior=flow", "prior.transforms=2", "prior.hidden_dims=[8]"]
MIXTURE = ["model.conditional=true", "prior=mixture", "prior.components=5"]
VAMP = ["prior=vamp", "prior.components=5"]
COLORS = ["data=arrays", "data.root=colors.npy", "data.scaling=standardize", "model.likelihood=gaussian"]

GRAPH = ["trainer.cuda_graph=true", "trainer.steps_per_batch=10"]
# Each with what it must agree with up to rounding: the same settings without the graph. The last has a smaller batch at
# the end of its epochs.
GRAPHS = {
    "graph": [],
    "graph_clipped": ["trainer.gradient_clip_val=1.0", "optimizer=adamw"],
    "graph_scheduled": [
        *("data.binarize=dynamic", "objective=iwae", "beta_schedule=linear", "lr_schedule=cosine"),
        *("model=conv", "model.hidden_dims=[4,8]", "trainer.max_steps=45"),
    ],
    "graph_tc": ["objective=beta_tcvae", "model.likelihood=logistic_mixture", "trainer.precision=64-true"],
    "graph_fast": ["trainer.precision=bf16-mixed"],
    "graph_last_batch": ["data.batch_size=10000", "trainer.limit_train_batches=1.0", "trainer.max_epochs=4"],
}
COMPILED = {
    "compiled": ["trainer.compile=true"],
    "reduce_overhead": ["trainer.compile=reduce-overhead"],
    "max_autotune": ["trainer.compile=max-autotune"],
    "compiled_conv": ["trainer.compile=true", "model=conv", "model.hidden_dims=[4,8]"],
    "compiled_labels": ["trainer.compile=true", *LABELS],
    "fast": ["trainer=[smoke,fast]"],
    "graph_compiled": [*GRAPH, "trainer.compile=true"],
}
# What each of them must agree with, up to rounding.
EAGER = {
    "compiled": "plain",
    "reduce_overhead": "plain",
    "max_autotune": "plain",
    "compiled_conv": "conv",
    "compiled_labels": "labels",
    "fast": "bf16_ten_steps",
    "graph_compiled": "eager_graph",
}
PRECISIONS = {
    "64-true": torch.float64,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "16-mixed": torch.float32,
}
TRAININGS = {
    "plain": [],
    "accumulated": ["trainer.accumulate_grad_batches=2"],
    "bf16_ten_steps": ["trainer.precision=bf16-mixed", "trainer.steps_per_batch=10"],
    "fifty_steps": ["trainer.steps_per_batch=50", "lr_schedule=cosine"],
    "clipped": [
        *("trainer.precision=16-mixed", "trainer.gradient_clip_val=1.0", "trainer.accumulate_grad_batches=2"),
        "trainer.limit_train_batches=16",
    ],
    "ddp": ["trainer.strategy=ddp", "trainer.devices=1"],
    "on_the_cpu": ["trainer.accelerator=cpu"],
    "conv": ["model=conv", "model.hidden_dims=[4,8]"],
    "dip": ["objective=dip_vae", "model=conv", "model.hidden_dims=[4,8]", "model.likelihood=gaussian"],
    "iwae": ["objective=iwae", "model=resnet", "model.hidden_dims=[4,8]", "model.likelihood=continuous_bernoulli"],
    "dreg": ["objective=dreg", "objective.resample=2", "model.likelihood=logistic_mixture", "optimizer=adamw"],
    "tc": ["objective=beta_tcvae", "model=conv", "model.hidden_dims=[4,8]", "optimizer=muon"],
    "capacity": ["objective=capacity_vae", "beta=25", "beta_schedule=linear", "optimizer=sgd", "init=data"],
    "free_bits": [
        *("objective.free_bits=0.1", "objective.kl_decomposition=true", "data.binarize=dynamic"),
        *("model.latent_dim=2", "model.activation=tanh"),
    ],
    "binary": ["data.binarize=threshold", "lr_schedule=cosine"],
    "labels": LABELS,
    "mixture": [*MIXTURE, "objective=piwae", "objective.k=4", "objective.groups=2", "trainer.precision=bf16-mixed"],
    "vamp": [*VAMP, "model=conv", "model.hidden_dims=[4,8]"],
    "mmd": ["objective=mmd_vae", "model.likelihood=laplace"],
    "colors": [*COLORS, "model=conv", "model.hidden_dims=[4,8]"],
}
# Each is run to its end twice, and once with a SIGKILL in its second epoch and a SIGTERM in its third, at `STOPS`.
RESUMED = {
    "exact": [
        *("data.binarize=dynamic", "beta_schedule=linear", "lr_schedule=cosine", "lr_schedule.warmup=0.1"),
        *("model=conv", "model.hidden_dims=[4,8]", "callbacks.figures_every_n_epochs=2"),
    ],
    "exact_mixed": [
        *("trainer.precision=16-mixed", "objective=iwae", "trainer.steps_per_batch=2", "trainer.limit_train_batches=4"),
    ],
    "exact_graph": [
        *("data.binarize=dynamic", "beta_schedule=linear", "lr_schedule=cosine"),
        *("trainer.cuda_graph=true", "trainer.steps_per_batch=12", "trainer.limit_train_batches=2"),
    ],
}
STOPS = {"exact": (12, 20), "exact_mixed": (12, 20), "exact_graph": (36, 60)}  # steps
NO_SYNCHRONIZATION = {
    "steps_plain": [],
    "steps_mixed": ["trainer.precision=16-mixed", "model=conv", "model.hidden_dims=[4,8]", "lr_schedule=cosine"],
    "steps_muon": ["optimizer=muon", "trainer.gradient_clip_val=1.0", "trainer.accumulate_grad_batches=2"],
    "steps_dip": ["objective=dip_vae", "beta_schedule=linear"],
    "steps_labels": LABELS,
    "steps_mixture": [*MIXTURE, "objective=dreg"],
    "steps_vamp": VAMP,
    "steps_colors": COLORS,
    "steps_fast": ["trainer=[smoke,fast]", "trainer.limit_train_batches=8"],  # of ten steps
}


def commands_for(data_root: str) -> dict[str, Command]:
    """All commands by their names; a training's run folder has its name."""
    found: dict[str, Command] = {}

    def train(name: str, *args: str, **how: Any) -> None:
        folder = how.pop("folder", name)
        after = "saved_colors" if "data=arrays" in args else None
        how = {"after": after} | how
        found[name] = Command([*SMALL, f"data.root={data_root}", f"hydra.run.dir={folder}", *args], **how)

    def resume(name: str, folder: str, *args: str, **how: Any) -> None:
        found[name] = Command([f"resume={folder}", *args], **how)

    def script(name: str, file: str, ckpt: str, *args: str, after: str | None = None) -> None:
        found[name] = Command([f"ckpt={ckpt}", *args], f"scripts/{file}.py", after or ckpt)

    for name, args in COMPILED.items():  # these take longest
        train(name, *args, prepare=few_workers)
    for name, args in RESUMED.items():
        exact = ["trainer.deterministic=true", "trainer.max_epochs=4", *args]
        killed, stopped = STOPS[name]
        train(f"{name}_killed", *exact, folder=name, prepare=at_step(killed, signal.SIGKILL), code=-signal.SIGKILL)
        asked = {"prepare": at_step(stopped, signal.SIGTERM), "code": 128 + signal.SIGTERM}
        resume(f"{name}_stopped", name, after=f"{name}_killed", **asked)
        resume(f"{name}_resumed", name, after=f"{name}_stopped")
        train(f"{name}_whole", *exact)
        train(f"{name}_again", *exact)
    for name, other in (("gpu", "cpu"), ("cpu", "gpu")):
        first, second = (ACCELERATOR if device == "gpu" else "cpu" for device in (name, other))
        args = ["trainer.max_epochs=3", f"trainer.accelerator={first}"]
        asked = {"prepare": at_step(12, signal.SIGTERM), "code": 128 + signal.SIGTERM}
        train(f"from_{name}_stopped", *args, folder=f"from_{name}", **asked)
        resume(f"from_{name}", f"from_{name}", f"trainer.accelerator={second}", after=f"from_{name}_stopped")
    train("rejected", "trainer.compile=reduce-overhead", "trainer.accumulate_grad_batches=2", code=1)
    for name, args in TRAININGS.items():
        train(name, *args)
    for name, args in GRAPHS.items():
        train(name, *GRAPH, *args, "+callbacks.custom.graphs={}", prepare=watch_steps)
        train(f"eager_{name}", GRAPH[1], *args)
    for precision in PRECISIONS:
        # The squares of small gradients are 0 in float16.
        eps = ["optimizer.eps=1e-4"] if precision == "16-true" else []
        train(precision, f"trainer.precision={precision}", *eps)
    for name, args in NO_SYNCHRONIZATION.items():
        first, last = (2, 6) if "fast" in name else (5, 54)
        watch = f"+callbacks.custom.watch={{first: {first}, last: {last}}}"
        long = ["trainer.max_epochs=1", "trainer.limit_train_batches=60", "trainer.log_every_n_steps=1000"]
        train(name, *long, watch, *args, prepare=watch_steps)
    train("from_memory", prepare=lambda: setattr(datamodule, "MAX_DEVICE_BYTES", 0))
    train("sprites", "data=sprites", "data.image_size=32", "data.root=none", "model=conv", "model.hidden_dims=[4,8]")
    found["saved_colors"] = Command([], prepare=only(save_colors))
    found["numbers"] = Command([], prepare=only(lambda: write_errors("numbers", compare_objectives(DEVICE))))
    found["priors"] = Command([], prepare=only(lambda: write_errors("priors", compare_priors(DEVICE))))
    found["samples"] = Command([], prepare=only(compare_samples), after="plain")
    few = ["k=100", "max_images=64"]
    script("evaluated_on_gpu", "evaluate", "plain", *few, f"device={DEVICE}", "out=evaluated_on_gpu", "probes=false")
    script("evaluated_on_cpu", "evaluate", "plain", *few, "device=cpu", "out=evaluated_on_cpu", "probes=false")
    script("evaluated", "evaluate", "conv", "k=10", "max_images=64")
    script("evaluated_labels", "evaluate", "labels", "k=10", "max_images=64", f"device={DEVICE}", "probes=false")
    script("sampled_labels", "sample", "labels", "label=7", "out=sevens.png")
    script("encoded", "encode", "bf16-true", "out=latents.npz", "images=test")
    script("decoded", "decode", "plain", "latents=z.npy", "out=decoded", after="samples")
    script("compressed", "compress", "dreg", "images=pixels.npy", "out=a.bvae", "report=false", after="dreg")
    script("decompressed", "decompress", "dreg", "file=a.bvae", "out=back.npy", after="compressed")
    found["compressed"] = found["compressed"]._replace(prepare=lambda: np.save("pixels.npy", some_pixels()))
    script("disentangled", "disentanglement", "sprites", "max_images=600")
    script("exported", "export", "plain", "format=onnx", "out=exported")
    script("shared", "export", "plain", "format=folder", "out=shared")
    sweep = ["-m", *SMALL, f"data.root={data_root}", "seed=1,2"]
    found["sweep"] = Command([*sweep, "hydra.sweep.dir=sweep"])
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=joblib"]
    found["joblib"] = Command([*sweep, *joblib], prepare=begin_again)
    return found


def at_step(step: int, number: int) -> Callable[[], None]:
    """Send the process a signal before the optimizer step after `step`."""

    def prepare() -> None:
        def on_train_batch_start(self: VAEModule, batch: Any, batch_idx: int) -> None:
            if self.global_step == step:
                os.kill(os.getpid(), number)

        VAEModule.on_train_batch_start = on_train_batch_start  # type: ignore[method-assign]

    return prepare


class Watch(Callback):
    """Make each synchronization with the GPU from batch `first` to batch `last` an error."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.last:
            torch.cuda.set_sync_debug_mode("default")
            print("watched")


class Graphs(Callback):
    """Print the lengths of the CUDA graphs that were captured."""

    def on_train_end(self, trainer: Any, module: Any) -> None:
        print("graphs", sorted(module.cuda_graph.graphs))


def watch_steps() -> None:
    CALLBACKS["watch"], CALLBACKS["graphs"] = Watch, Graphs
    few_workers()


def few_workers() -> None:
    """Compile with few processes for each command, since several compile at once."""
    torch._inductor.config.compile_threads = 4  # type: ignore[attr-defined]


def only(work: Callable[[], None]) -> Callable[[], None]:
    """Do nothing but `work` in a child."""

    def prepare() -> None:
        work()
        sys.exit(0)

    return prepare


def begin_again() -> None:
    """Become a fresh process, which joblib needs."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO / "src"), os.environ.get("PYTHONPATH", "")])
    os.execv(sys.executable, [sys.executable, str(REPO / "train.py"), *sys.argv[1:]])


def save_colors() -> None:
    np.save("colors.npy", np.random.default_rng(0).normal(3, 2, size=(20_000, 8, 8, 3)).astype(np.float32))


def some_pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(20, 28, 28), dtype=np.uint8)


def write_errors(name: str, errors: dict[str, list[str]]) -> None:
    Path(f"{name}.json").write_text(json.dumps(errors))


def compare_samples() -> None:
    """Sample, encode and decode on both devices, and draw pixels on the GPU."""
    vae = betavae.load("plain").vae
    x = torch.rand(32, 1, 28, 28)

    def everything() -> list[torch.Tensor]:
        z = vae.sample(8, generator=torch.Generator().manual_seed(3))
        device = next(vae.parameters()).device
        return [z, vae.reconstruct(x.to(device)), sample_posterior(vae, x)]

    on_cpu = everything()
    vae.to(DEVICE)
    for wanted, found in zip(on_cpu, everything(), strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-4)
    for name in LIKELIHOODS:
        model = VAE("mlp", [8], 2, "relu", name, [1, 4, 4]).to(DEVICE)
        params = model.decode_params(torch.zeros(500, 2, device=DEVICE)).detach()
        drawn = model.likelihood.sample(params, torch.Generator(DEVICE).manual_seed(0))
        assert (drawn.mean(0) - model.likelihood.mean(params)[0]).abs().mean() < 0.1, name
    np.save("z.npy", sample_posterior(vae, x).numpy())


@pytest.fixture(scope="module")
def commands(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data_root: str
) -> Iterator[Commands]:
    """Start what the selected tests need."""
    known = commands_for(data_root)
    names = [name for item in request.session.items for mark in item.iter_markers("needs") for name in mark.args]
    wanted = {name: known[name] for name in names}
    while more := {command.after for command in wanted.values() if command.after} - wanted.keys():
        wanted |= {name: known[name] for name in more}
    running = Commands({name: known[name] for name in known if name in wanted}, tmp_path_factory.mktemp("gpu"))
    running.advance()
    yield running
    running.stop()


@pytest.fixture
def folder(request: pytest.FixtureRequest, commands: Commands) -> Path:
    """The folder that holds all run folders, once the commands that the test needs have succeeded."""
    for mark in request.node.iter_markers("needs"):
        for name in mark.args:
            commands.wait(name)
    return commands.folder


def needs(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.needs(*names)


def each(names: Any) -> pytest.MarkDecorator:
    """Parametrize a test by commands, each of which it needs."""
    return pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in names])


def record(run: Path) -> dict[str, Any]:
    found = json.loads((run / "metrics.json").read_text())
    assert found["status"] == "finished" and all(math.isfinite(value) for value in found["test"].values())
    return found


def content(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", map_location="cpu", weights_only=True)


def outcome(run: Path) -> dict[str, Any]:
    """All that must be equal, bit for bit, in two runs."""
    found = {key: record(run)[key] for key in ("test", "validation", "epochs", "steps")}
    for name in ("best", "last"):
        kept = content(run, name)
        found[f"{name} moments"] = kept["optimizer_states"][0]["state"]
        for key in ("state_dict", "random_state", "cuda_random_state", "batches", "global_step"):
            if key in kept:
                found[f"{name} {key}"] = kept[key]
    return found


@each(TRAININGS)
def test_training(folder: Path, name: str) -> None:
    found = record(folder / name)
    assert name == "on_the_cpu" or not found["machine"].endswith(", cpu")
    assert (folder / name / "figures" / "samples.png").exists()


@needs("plain", "on_the_cpu", "ddp", "from_memory")
@pytest.mark.parametrize("name", ["on_the_cpu", "ddp", "from_memory"])
def test_training_in_another_way_gives_the_same_numbers(folder: Path, name: str) -> None:
    """From the same initial weights and batches, and on the CPU other noise."""
    wanted = record(folder / "plain")["test"]["neg_elbo"]
    rel = 0.02 if name == "on_the_cpu" else 1e-3
    assert record(folder / name)["test"]["neg_elbo"] == pytest.approx(wanted, rel=rel)


@each(PRECISIONS)
@needs("plain")
def test_precision(folder: Path, name: str) -> None:
    dtypes = {value.dtype for value in content(folder / name)["state_dict"].values()}
    assert dtypes == {PRECISIONS[name]}
    wanted = record(folder / "plain")["test"]["neg_elbo"]
    assert record(folder / name)["test"]["neg_elbo"] == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(f"{name}_whole", f"{name}_again")) for name in RESUMED]
)
def test_a_deterministic_run_gives_the_same_weights_twice(folder: Path, name: str) -> None:
    torch.testing.assert_close(outcome(folder / f"{name}_again"), outcome(folder / f"{name}_whole"), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(f"{name}_whole", f"{name}_resumed")) for name in RESUMED]
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(folder: Path, name: str) -> None:
    torch.testing.assert_close(outcome(folder / name), outcome(folder / f"{name}_whole"), rtol=0, atol=0)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name, f"eager_{name}")) for name in GRAPHS])
def test_a_cuda_graph_computes_what_eager_steps_compute(folder: Path, commands: Commands, name: str) -> None:
    assert f"graphs {[1] if name == 'graph_last_batch' else [1, 10]}" in commands.texts[name]
    found, wanted = record(folder / name), record(folder / f"eager_{name}")
    assert found["steps"] == wanted["steps"] and found["epochs"] == wanted["epochs"]
    rel = 1e-2 if name == "graph_fast" else 1e-3
    assert found["test"] == pytest.approx(wanted["test"], rel=rel)
    for key in ("random_state", "cuda_random_state", "batches"):
        torch.testing.assert_close(content(folder / name)[key], content(folder / f"eager_{name}")[key], rtol=0, atol=0)


@each(["from_gpu", "from_cpu"])
def test_a_run_resumes_on_another_device(folder: Path, name: str) -> None:
    assert record(folder / name)["steps"] == 24
    states = content(folder / name)["optimizer_states"][0]["state"].values()
    assert [int(state["step"]) for state in states] == [24] * len(states)


@each(NO_SYNCHRONIZATION)
def test_no_synchronization_in_a_step(folder: Path, commands: Commands, name: str) -> None:
    assert "watched" in commands.texts[name]


@needs("rejected")
def test_gradients_are_not_accumulated_in_a_replay(commands: Commands, folder: Path) -> None:
    text = commands.texts["rejected"]
    assert text.startswith("error: trainer.compile=reduce-overhead is invalid with") and len(text.splitlines()) == 1


@needs("numbers")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_the_same_on_both_devices(folder: Path, name: str) -> None:
    errors = json.loads((folder / "numbers.json").read_text())[name]
    assert not errors, "\n\n".join(errors)


@needs("priors")
@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_is_the_same_on_both_devices(folder: Path, name: str) -> None:
    errors = json.loads((folder / "priors.json").read_text())[name]
    assert not errors, "\n\n".join(errors)


@needs("evaluated_labels", "sampled_labels")
def test_a_conditional_model_is_evaluated_and_sampled(folder: Path) -> None:
    found = json.loads((folder / "labels" / "evaluation.json").read_text())
    assert found["aggregate"]["by_class"] and math.isfinite(found["nll_10"]["mean"])
    assert (folder / "sevens.png").exists()


@needs("samples", "decoded")
def test_samples_and_codes_are_the_same_on_both_devices(folder: Path) -> None:
    assert len(list((folder / "decoded").iterdir())) == 32


@needs("evaluated_on_gpu", "evaluated_on_cpu")
def test_an_evaluation_is_the_same_on_both_devices(folder: Path) -> None:
    gpu, cpu = (json.loads((folder / f"evaluated_on_{d}" / "evaluation.json").read_text()) for d in ("gpu", "cpu"))
    for key in ("neg_elbo", "recon", "kl", "nll_1", "nll_10", "nll_100"):
        assert gpu[key]["mean"] == pytest.approx(cpu[key]["mean"], rel=1e-4)
    assert gpu["kl_per_dimension"] == pytest.approx(cpu["kl_per_dimension"], rel=1e-3, abs=1e-5)


@needs("evaluated", "encoded", "disentangled", "exported", "shared")
def test_scripts_read_what_a_gpu_has_trained(folder: Path) -> None:
    assert 0 < json.loads((folder / "conv" / "evaluation.json").read_text())["knn_accuracy"] <= 1
    assert np.isfinite(np.load(folder / "latents.npz")["mean"]).all()
    assert json.loads((folder / "sprites" / "disentanglement.json").read_text())["images"] == 600
    assert (folder / "exported" / "decoder.onnx").exists()
    assert betavae.load(folder / "shared").vae.sample(2).shape == (2, 1, 28, 28)


@needs("decompressed")
def test_compressed_images_come_back(folder: Path) -> None:
    assert (np.load(folder / "back.npy").squeeze() == some_pixels()).all()


@each(["sweep", "joblib"])
def test_a_sweep_on_one_gpu(folder: Path, name: str) -> None:
    jobs = [path.parent for path in (folder / name).glob("*/metrics.json")]
    assert len(jobs) == 2
    assert not any(record(job)["machine"].endswith(", cpu") for job in jobs)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name, EAGER[name])) for name in COMPILED])
def test_a_compiled_run_computes_what_it_computes_uncompiled(folder: Path, name: str) -> None:
    wanted, rel = record(folder / EAGER[name])["test"]["neg_elbo"], 0.01 if name == "fast" else 2e-3
    assert record(folder / name)["test"]["neg_elbo"] == pytest.approx(wanted, rel=rel)
