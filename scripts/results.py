"""Print a table of evaluated runs, averaged over seeds: `python scripts/results.py [runs=runs]`."""

import shlex
from pathlib import Path
from statistics import fmean

from betavae.runtime.cli import RunsSettings, adapt_commands, run_argument, script_command
from betavae.sweeps.results import (
    IGNORED_KEYS,
    EvaluatedRun,
    find_unevaluated_runs,
    format_mean_sd,
    mean_sd,
    read_evaluated_runs,
)

REPEATED_KEYS = ("seed", "data.seed", "data.root", *IGNORED_KEYS)  # settings that may differ within a row


def format_row(runs: list[EvaluatedRun]) -> str:
    """Format the runs of one setting as a row of the table, with their tags behind the command."""
    has_own_data = "test_fingerprint" in runs[0].evaluation
    left_out = ("seed=", "sweep=", "runs=", "tags=", "hydra.", *(() if has_own_data else ("data.root=",)))
    command = [word for word in runs[0].overrides if not word.startswith(left_out)]
    results, k = [run.evaluation for run in runs], runs[0].evaluation["k"][-1]
    records = [run.record for run in runs]
    finished = [run for run in records if run["status"] == "finished"]
    status = "" if finished else f" ({records[0]['status']})"
    machines = {f"{run['machine']}, {run['threads']} thread{'s' * (run['threads'] > 1)}" for run in finished}
    tags = sorted({tag for run in runs for tag in run.config.get("tags", ())})
    cells = [
        shlex.join(["python", "train.py", *command]) + f" ({', '.join(tags)})" * bool(tags) + status,
        str(len(runs)),
        format_mean_sd(*mean_sd([result["neg_elbo"]["mean"] for result in results])),
        format_mean_sd(*mean_sd([result[f"nll_{k}"]["mean"] for result in results])),
        f"{k:,}",
        format_mean_sd(*mean_sd([result["active_units"] for result in results]), digits=1),
        f"{fmean(run['epochs'] for run in finished):g}" if finished else "",
        f"{fmean(run['fit_seconds'] for run in finished) / 60:.1f} min" if finished else "",
        ", ".join(sorted(machines)),
    ]
    return f"| {' | '.join(cells)} |"


class Settings(RunsSettings):
    """Has only the settings that all scripts share."""


@script_command(Settings)
def main(settings: Settings) -> None:
    # Runs of one row have the same settings and the same evaluation; rows of one table have the same data.
    tables: dict[str, dict[str, list[EvaluatedRun]]] = {}
    for run in read_evaluated_runs(Path(settings.runs)):
        result = run.evaluation
        title = f"{result['data']}, {result['likelihood']} likelihood, {result['images']:,} test images"
        config = {key: value for key, value in run.config.items() if key not in REPEATED_KEYS}
        rows = tables.setdefault(f"{title}: {result['note']}", {})
        key = [config, result["k"], result.get("test_fingerprint"), run.record["status"]]
        rows.setdefault(str(key), []).append(run)
    for title, rows in tables.items():
        print(f"\n{title}; nats per image, mean ± standard deviation over seeds\n")
        print("| run | seeds | neg. ELBO | NLL | K | active units | epochs | training | machine |")
        print("|---|---|---|---|---|---|---|---|---|")
        for runs in rows.values():
            print(format_row(runs))
    if missing := find_unevaluated_runs(Path(settings.runs)):
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        command = adapt_commands(f"python scripts/evaluate.py {run_argument('ckpt', missing[0])}")
        print(f"\nnot evaluated: {missing[0]}{more}; evaluate a run by `{command}`")


if __name__ == "__main__":
    main()
