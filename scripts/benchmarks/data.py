"""Compare memory-mapped with in-memory images: `python scripts/benchmarks/data.py [n=400000]`.

Trains a small network on synthetic color images of 64 x 64, read by `data=arrays`. Each way runs in its own process
and reports the seconds to the first batch, the seconds of an epoch and the peak memory of the process without the
mapped file (RssAnon).
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from betavae.errors import UserError, last_error_line
from betavae.runtime.cli import ScriptSettings, script_command
from betavae.storage.files import atomic_path

BATCH_SIZE = 256
WARMUP_STEPS = 20  # not timed


class Settings(ScriptSettings):
    n: PositiveInt = Field(400_000, title="number of images, 12,288 bytes each")
    steps: PositiveInt = Field(600, title="timed steps of an epoch")
    folder: str = Field("data", title="the folder for the file of images, which later runs use again")
    only: Literal["mapped", "memory"] | None = Field(None, title="run one way in this process: mapped, memory")


def time_epoch(path: Path, mapped: bool, steps: int) -> dict[str, float]:
    import numpy as np
    import torch

    from betavae.data.datamodule import ImageDataModule
    from betavae.data.image_set import ImageSet
    from betavae.models.vae import VAE
    from betavae.objectives import elbo

    started = time.perf_counter()
    data = ImageDataModule("arrays", str(path), 0.05, BATCH_SIZE, 1000, "none", 0)
    data.setup()
    if not mapped:
        pixels = torch.from_numpy(np.load(path))
        data.splits["train"] = ImageSet(pixels, torch.zeros(len(pixels)).long())
    vae = VAE("mlp", [128], 16, "relu", "bernoulli", [3, 64, 64])
    optimizer = torch.optim.Adam(vae.parameters(), 1e-3, fused=True)
    peak_kb, first_batch, epoch_started = 0, 0.0, 0.0
    for step, (x, _) in enumerate(data.train_dataloader()):
        if step == 0:
            first_batch = time.perf_counter() - started
        if step == WARMUP_STEPS:
            epoch_started = time.perf_counter()
        optimizer.zero_grad()
        elbo(vae, x, torch.randn(1, len(x), 16), 1.0).loss.backward()
        optimizer.step()
        if step % 20 == 0:
            peak_kb = max(peak_kb, read_private_memory())
        if step == steps + WARMUP_STEPS - 1:
            break
    return {"first": first_batch, "epoch": time.perf_counter() - epoch_started, "gb": peak_kb / 1e6}


def read_private_memory() -> int:
    """Return the kB of memory of this process that no file backs (Linux only)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def write_random_images(path: Path, n: int) -> None:
    import numpy as np
    from tqdm import tqdm

    with atomic_path(path, "folder") as part:
        out = np.lib.format.open_memmap(part, "w+", np.uint8, (n, 3, 64, 64))
        rng = np.random.default_rng(0)
        for start in tqdm(range(0, n, 4000), "making images", disable=None):
            out[start : start + 4000] = rng.integers(0, 256, (min(4000, n - start), 3, 64, 64), np.uint8)
        out.flush()


@script_command(Settings)
def main(settings: Settings) -> None:
    path = Path(settings.folder) / f"benchmark-{settings.n}.npy"
    if settings.only:
        print(json.dumps(time_epoch(path, settings.only == "mapped", settings.steps)))
        return
    needed = BATCH_SIZE * (settings.steps + WARMUP_STEPS)
    if 0.95 * settings.n < needed:
        expected = f"at least {math.ceil(needed / 0.95):,} for steps={settings.steps} and {WARMUP_STEPS} warm-up steps"
        raise UserError(f"n={settings.n} is invalid: expected {expected}")
    if not path.exists():
        write_random_images(path, settings.n)
    results = {}
    # The first round brings the file into the page cache; the second is reported.
    for way in ("mapped", "memory", "mapped", "memory"):
        command = [sys.executable, __file__, f"only={way}", f"n={settings.n}", f"steps={settings.steps}"]
        process = subprocess.run([*command, f"folder={settings.folder}"], capture_output=True, text=True)
        if process.returncode:
            raise UserError(f"the process with only={way} failed: {last_error_line(process.stderr)}")
        results[way] = json.loads(process.stdout.splitlines()[-1])
    print(f"{settings.n:,} images, {path.stat().st_size / 1e9:.1f} GB; {settings.steps} batches of {BATCH_SIZE}")
    for way, row in results.items():
        print(f"{way:8}  first batch {row['first']:.1f} s, epoch {row['epoch']:.1f} s, own memory {row['gb']:.2f} GB")
    print(f"mapped over memory: {results['mapped']['epoch'] / results['memory']['epoch']:.2f}")


if __name__ == "__main__":
    main()
