"""What a sweep found, in tables and pictures: `python scripts/sweep_report.py [sweep=PATH over=[A,B] metric=kl]`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from betavae.runtime.cli import RunsSettings, script_command
from betavae.runtime.settings import NonEmptyStr, PathStr, Seed63


class Settings(RunsSettings):
    sweep: PathStr | None = Field(None, title="the sweep's folder; null: the newest under runs/sweeps")
    over: Annotated[list[NonEmptyStr], Field(min_length=1, max_length=2)] | None = Field(
        None, title="one or two swept settings to draw `metric` over; null: the first two"
    )
    metric: NonEmptyStr = Field(
        "neg_elbo", title="a test number of the jobs, seconds, or once measured fid, nll_5000, ..."
    )
    seed: Seed63 = Field(0, title="of the samples")
    out: PathStr = Field("sweep_report", title="a folder")


@script_command(Settings)
def main(settings: Settings) -> None:
    from betavae.sweeps import report

    sweep = Path(settings.sweep) if settings.sweep else report.latest_sweep(Path(settings.runs) / "sweeps")
    out = Path(settings.out)
    written = report.write_report(sweep, out, settings.over, settings.metric, settings.seed)
    print((out / "table.md").read_text())
    print(f"{', '.join(written)} in {out}/")


if __name__ == "__main__":
    main()
