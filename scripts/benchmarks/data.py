"""Batches out of a file that is mapped into memory, against memory: `python scripts/benchmark_data.py [n=400000]`.

A synthetic set of colour pictures of 64 x 64 as `data=arrays` reads it, through a small net, each way in a process of
its own: seconds until the first batch, seconds of an epoch, and memory of its own at the peak (RssAnon, without the
file's).
"""

# mypy: disable-error-code="valid-type"

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from betavae.errors import UserError, last_error_line
from betavae.runtime.cli import ScriptSettings, gc_paused, script_command
from betavae.runtime.settings import NonEmptyStr, PositiveInt, choice
from betavae.storage.files import atomic_path

WARM = 20  # batches that are not timed


class Settings(ScriptSettings):
    n: PositiveInt = Field(400_000, title="pictures, 12,288 bytes each")
    steps: PositiveInt = Field(600, title="of an epoch that are timed")
    folder: NonEmptyStr = Field("data", title="where the file is made; it is kept for the next time")
    only: choice(lambda: [None, "mapped", "memory"]) = Field(None, title="one way, in this process: mapped, memory")


def epoch(path: Path, mapped: bool, steps: int) -> dict[str, Any]:
    import numpy as np
    import torch

    from betavae.data.datamodule import ImageDataModule
    from betavae.data.image_set import ImageSet
    from betavae.models.cpu_kernels import use_fast_cpu_kernels
    from betavae.models.vae import VAE
    from betavae.objectives import elbo

    started = time.perf_counter()
    data = ImageDataModule("arrays", str(path), 0.05, 256, 1000, "none", 0)
    data.setup()
    if not mapped:
        pixels = torch.from_numpy(np.load(path))
        data.splits["train"] = ImageSet(pixels, torch.zeros(len(pixels)).long())
    vae = use_fast_cpu_kernels(VAE("mlp", [128], 16, "relu", "bernoulli", [3, 64, 64]))
    optimizer = torch.optim.Adam(vae.parameters(), 1e-3, fused=True)
    peak, first, at = 0, 0.0, 0.0
    for step, (x, _) in enumerate(data.train_dataloader()):
        if step == 0:
            first = time.perf_counter() - started
        if step == WARM:
            at = time.perf_counter()
        optimizer.zero_grad()
        elbo(vae, x, torch.randn(1, len(x), 16), 1.0).loss.backward()
        optimizer.step()
        peak = max(peak, own_memory()) if step % 20 == 0 else peak
        if step == steps + WARM - 1:
            break
    return {"first": first, "epoch": time.perf_counter() - at, "gb": peak / 1e6}


def own_memory() -> int:
    """kB that belong to this process alone, not to a file (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def make(path: Path, n: int) -> None:
    import numpy as np
    from tqdm import tqdm

    with atomic_path(path, "folder") as part:
        out = np.lib.format.open_memmap(part, "w+", np.uint8, (n, 3, 64, 64))
        rng = np.random.default_rng(0)
        for start in tqdm(range(0, n, 4000), "making pictures", disable=None):
            out[start : start + 4000] = rng.integers(0, 256, (min(4000, n - start), 3, 64, 64), np.uint8)
        out.flush()


@script_command(Settings)
def main(settings: Settings) -> None:
    path = Path(settings.folder) / f"benchmark-{settings.n}.npy"
    if settings.only:
        with gc_paused():
            print(json.dumps(epoch(path, settings.only == "mapped", settings.steps)))
        return
    if settings.n * 0.95 < 256 * (settings.steps + WARM):
        raise UserError(f"n={settings.n} is too few for steps={settings.steps} batches of 256, and {WARM} before them")
    if not path.exists():
        make(path, settings.n)
    found = {}
    for way in ("mapped", "memory", "mapped", "memory"):
        command = [sys.executable, __file__, f"only={way}", f"n={settings.n}", f"steps={settings.steps}"]
        done = subprocess.run([*command, f"folder={settings.folder}"], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the part only={way} failed: {last_error_line(done.stderr)}")
        # Of the second round, with the file in the page cache.
        found[way] = json.loads(done.stdout.splitlines()[-1])
    print(f"{settings.n:,} pictures, {path.stat().st_size / 1e9:.1f} GB; {settings.steps} batches of 256")
    for way, row in found.items():
        print(f"{way:8}  first batch after {row['first']:.1f} s, epoch {row['epoch']:.1f} s, own {row['gb']:.2f} GB")
    print(f"mapped over memory: {found['mapped']['epoch'] / found['memory']['epoch']:.2f}")


if __name__ == "__main__":
    main()
