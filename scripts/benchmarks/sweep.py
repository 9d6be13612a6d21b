"""Compare a sweep on all cores with a serial one: `python scripts/benchmarks/sweep.py [jobs=6]`."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from pydantic import Field, PositiveInt

from betavae.errors import UserError, last_error_line
from betavae.runtime.cli import ScriptSettings, script_command

TRAIN = Path(__file__).parents[2] / "train.py"
LAUNCHERS = {"one at a time": "basic", "on all cores": "joblib"}


class Settings(ScriptSettings):
    jobs: PositiveInt = Field(6, title="number of jobs, which differ in their seed")
    epochs: PositiveInt = Field(5, title="epochs per job")
    rounds: PositiveInt = Field(3, title="number of rounds, each with both launchers in turn")
    settings: str = Field("model=mlp", title="overrides of every job, as on the command line of train.py")


def run_training(*arguments: str) -> None:
    process = subprocess.run([sys.executable, TRAIN, *arguments], capture_output=True, text=True)
    if process.returncode:
        raise UserError(f"train.py {' '.join(arguments)} failed: {last_error_line(process.stderr)}")


@script_command(Settings)
def main(settings: Settings) -> None:
    from joblib import cpu_count

    seconds: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
    seeds = f"seed={','.join(map(str, range(settings.jobs)))}"
    with tempfile.TemporaryDirectory() as folder:
        common = [f"data.root={folder}/data", f"runs={folder}", *settings.settings.split()]
        # The first run unpacks the data. It is not timed.
        run_training(*common, "trainer.max_epochs=1", "trainer.limit_train_batches=1")
        for number in range(settings.rounds):  # a busy minute of the machine then affects both launchers
            for name, launcher in LAUNCHERS.items():
                sweep = [f"hydra/launcher={launcher}", f"hydra.sweep.dir={folder}/{launcher}{number}", seeds]
                started = time.perf_counter()
                run_training("-m", *sweep, *common, f"trainer.max_epochs={settings.epochs}")
                seconds[name].append(time.perf_counter() - started)
                print(f"round {number + 1}: {settings.jobs} jobs {name}: {seconds[name][-1]:.1f} s", flush=True)
    slow, fast = (median(seconds[name]) for name in LAUNCHERS)
    print(f"median: {slow:.1f} s one at a time, {fast:.1f} s on {cpu_count()} cores: {fast / slow:.2f} of the time")


if __name__ == "__main__":
    main()
