"""Write tables and figures of a sweep: `python scripts/sweep_report.py [sweep=PATH metric=kl]`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from betavae.runtime.cli import RunsSettings, script_command
from betavae.runtime.settings import NonEmptyStr, PathStr, Seed63


class Settings(RunsSettings):
    sweep: PathStr | None = Field(None, title="folder of the sweep; null: the latest under runs/sweeps")
    over: Annotated[list[NonEmptyStr], Field(min_length=1, max_length=2)] | None = Field(
        None, title="one or two swept settings to plot `metric` over; null: the first two"
    )
    metric: NonEmptyStr = Field("neg_elbo", title="a test metric, seconds, or a measurement: fid, nll_5000, ...")
    seed: Seed63 = Field(0, title="seed of the samples")
    out: PathStr = Field("sweep_report", title="folder of the report")


@script_command(Settings)
def main(settings: Settings) -> None:
    from betavae.sweeps.report import write_report
    from betavae.sweeps.results import find_latest_sweep

    sweep = Path(settings.sweep) if settings.sweep else find_latest_sweep(Path(settings.runs) / "sweeps")
    out = Path(settings.out)
    files = write_report(sweep, out, settings.over, settings.metric, settings.seed)
    print((out / "table.md").read_text())
    print(f"wrote {', '.join(files)} to {out}/")


if __name__ == "__main__":
    main()
