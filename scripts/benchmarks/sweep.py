"""How much faster a sweep is on all cores: `python scripts/benchmark_sweep.py [jobs=6 epochs=5 rounds=3]`."""

# mypy: disable-error-code="valid-type"

from pydantic import Field

from betavae.errors import UserError, last_error_line
from betavae.runtime.cli import ScriptSettings, script_command
from betavae.runtime.settings import NonEmptyStr, PositiveInt


class Settings(ScriptSettings):
    jobs: PositiveInt = Field(6, title="runs, which differ by their seed")
    epochs: PositiveInt = Field(5, title="of each job")
    rounds: PositiveInt = Field(3, title="of both ways, by turns")
    settings: NonEmptyStr = Field("model=mlp", title="of every job, as on the command line of train.py")


@script_command(Settings)
def main(settings: Settings) -> None:
    import subprocess
    import sys
    import tempfile
    import time
    from pathlib import Path
    from statistics import median

    from joblib import cpu_count

    train = Path(__file__).parents[1] / "train.py"
    seconds: dict[str, list[float]] = {"in a row": [], "on all cores": []}
    with tempfile.TemporaryDirectory() as folder:
        common = [
            f"trainer.max_epochs={settings.epochs}",
            f"data.root={folder}/data",
            f"runs={folder}",
            *settings.settings.split(),
        ]

        def run(*arguments: str) -> None:
            done = subprocess.run([sys.executable, train, *arguments], capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"train.py {' '.join(arguments)} failed: {last_error_line(done.stderr)}")

        # Unpacks the data, and is not counted.
        run(*common, "trainer.max_epochs=1", "trainer.limit_train_batches=1")
        seeds = f"seed={','.join(map(str, range(settings.jobs)))}"
        for number in range(settings.rounds):  # by turns, so that a busy minute of the machine hits both
            for name, launcher in (("in a row", "basic"), ("on all cores", "joblib")):
                sweep = f"hydra.sweep.dir={folder}/{launcher}{number}"
                arguments = ["-m", f"hydra/launcher={launcher}", seeds, *common, sweep]
                started = time.perf_counter()
                run(*arguments)
                seconds[name].append(time.perf_counter() - started)
                print(f"round {number + 1}: {settings.jobs} jobs {name}: {seconds[name][-1]:.1f} s", flush=True)
    slow, fast = (median(seconds[name]) for name in seconds)
    print(f"median: {slow:.1f} s in a row, {fast:.1f} s on {cpu_count()} cores: {fast / slow:.2f} of the time")


if __name__ == "__main__":
    main()
