"""A table of all evaluated runs, seeds together, in Markdown: `python scripts/results.py [runs=runs]`."""

import json
import shlex
import statistics
from pathlib import Path
from typing import Any

from betavae.errors import UserError
from betavae.runtime.cli import RunsSettings, script_command
from betavae.runtime.settings import flatten
from betavae.runtime.yaml_files import read_yaml
from betavae.sweeps.jobs import IGNORED_KEYS

# What may differ between runs of one row.
SEEDS = ("seed", "data.seed", "data.root", *IGNORED_KEYS)


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def row(runs: list[dict[str, Any]]) -> list[str]:
    results = [run["evaluation"] for run in runs]
    typed = [str(item) for item in runs[0]["overrides"]]
    typed = [item for item in typed if not item.startswith(("seed=", "runs=", "hydra.", "data.root="))]
    minutes = statistics.mean(run["fit_seconds"] for run in runs) / 60
    return [
        shlex.join(["python", "train.py", *typed]),
        str(len(runs)),
        spread([result["neg_elbo"]["mean"] for result in results]),
        spread([result[f"nll_{result['k'][-1]}"]["mean"] for result in results]),
        f"{results[0]['k'][-1]:,}",
        spread([result["active_units"] for result in results], 1),
        f"{statistics.mean(run['epochs'] for run in runs):g}",
        f"{minutes:.1f} min",
        ", ".join(sorted({f"{run['machine']}, {run['threads']} thread{'s' * (run['threads'] > 1)}" for run in runs})),
    ]


class Settings(RunsSettings):
    """Only what all scripts share."""


@script_command(Settings)
def main(settings: Settings) -> None:
    # Runs of one row have the same settings and were evaluated alike; rows of one table are of the same data.
    tables: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(Path(settings.runs).rglob("evaluation.json")):
        try:
            evaluation = json.loads(path.read_text())
            run = json.loads((path.parent / "metrics.json").read_text()) | {"evaluation": evaluation}
            run["overrides"] = read_yaml(path.parent / "overrides.yaml", list)
            config = flatten(read_yaml(path.parent / "config.yaml"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path.parent} is not a whole run that was evaluated ({error})") from error
        config = {key: value for key, value in config.items() if key not in SEEDS}
        title = f"{evaluation['data']}, {evaluation['likelihood']} likelihood, {evaluation['images']:,} test images"
        key = f"{config} {evaluation['k']}"
        tables.setdefault(f"{title}: {evaluation['note']}", {}).setdefault(key, []).append(run)
    if not tables:
        how = "`python scripts/evaluate.py ckpt=RUN_FOLDER` makes one"
        raise UserError(f"no evaluated run under {settings.runs}/: {how}")
    for title, rows in tables.items():
        print(f"\n{title}; nats per image, mean ± standard deviation over seeds\n")
        print("| run | seeds | neg. ELBO | NLL | K | active units | epochs | training | machine |")
        print("|---|---|---|---|---|---|---|---|---|")
        for runs in rows.values():
            print("| " + " | ".join(row(runs)) + " |")


if __name__ == "__main__":
    main()
