"""Report of a sweep: a table of its settings averaged over seeds, and figures."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from betavae import plotting
from betavae.data.file_listing import as_text
from betavae.errors import UserError
from betavae.grids import save_grids
from betavae.metrics.disentanglement import SCORES
from betavae.runtime import checkpoint, evaluation
from betavae.runtime.run_folder import REPORT, check_claim, claim_folder, read_json
from betavae.sweeps import figures
from betavae.sweeps.results import (
    MEASUREMENT_FILES,
    METRIC_NAMES,
    RECORD_OBJECTIVES,
    SEARCH_FILE,
    STATUSES,
    SettingGroup,
    format_mean_sd,
    format_status_counts,
    get_objectives,
    group_jobs,
    read_job_metrics,
    shorten_key,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def list_metrics(groups: Sequence[SettingGroup]) -> list[str]:
    """List the metrics that any finished job has."""
    return list(dict.fromkeys(name for group in groups for job in group.finished for name in read_job_metrics(job)))


def list_table_metrics(groups: Sequence[SettingGroup]) -> list[str]:
    """List the metrics of the tables, which leave out those below a key of a file."""
    names = [name for name in list_metrics(groups) if "." not in name and name != "seconds"]
    return [*(name for name in METRIC_NAMES if name in names), *(n for n in names if n not in METRIC_NAMES), "seconds"]


def write_csv(groups: Sequence[SettingGroup], path: Path) -> None:
    """Write a row per setting: its values, its jobs per status, and the mean and deviation of each metric."""
    names = list_table_metrics(groups)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        statistics = [f"{name}_{statistic}" for name in names for statistic in ("mean", "sd")]
        writer.writerow([*groups[0].values, *STATUSES, *statistics])
        for group in groups:
            counts = [sum(job.status == status for job in group.jobs) for status in STATUSES]
            cells = [cell for name in names for cell in group.mean_sd(name)]
            writer.writerow([*group.values.values(), *counts, *("" if math.isnan(x) else f"{x:.6g}" for x in cells)])


def format_markdown(groups: Sequence[SettingGroup]) -> str:
    """Format a row per setting as a Markdown table, with the notes and the failed jobs below it."""
    names = [name for name in list_table_metrics(groups) if name in (*METRIC_NAMES, "seconds")]
    header = [*map(shorten_key, groups[0].values), "finished", *(METRIC_NAMES.get(name, name) for name in names)]
    rows = [header, ["---"] * len(header)]
    digits = {"active_units": 1, "seconds": 1}
    for group in groups:
        cells = [format_mean_sd(*group.mean_sd(name), digits.get(name, 2)) for name in names]
        rows.append([*group.values.values(), format_finished(group), *cells])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    notes = {job.record.get("note", "") for group in groups for job in group.finished}
    lines += ["", "Test set, nats per image, mean ± standard deviation over seeds."]
    lines += [format_status_counts([job for group in groups for job in group.jobs]) + "."]
    lines += [f"Note: {note}." for note in sorted(notes) if note]
    if len(notes) > 1:
        lines.append(
            "Jobs with different notes, or with and without a note, have different scales: do not compare them."
        )
    for group in groups:
        lines += [f"Failed: {job.folder.name}: {job.record['error']}" for job in group.jobs if "error" in job.record]
    return "\n".join(lines) + "\n"


def format_finished(group: SettingGroup) -> str:
    """Format how many jobs have finished, and the statuses of the others: `1/3 (1 failed, 1 missing)`."""
    others = [job.status for job in group.jobs if job.status != "finished"]
    counts = [f"{others.count(status)} {status}" for status in dict.fromkeys(others)]
    return f"{len(group.finished)}/{len(group.jobs)}" + (f" ({', '.join(counts)})" if counts else "")


def plot_metric(groups: Sequence[SettingGroup], keys: Sequence[str] | None, metric: str) -> "Figure | None":
    """Plot a metric over one or two swept settings, by default the first two.

    Returns:
        A line for one setting, a heat map or (for a search) a scatter plot for two; None if only the seed was swept.
    """
    swept = list(groups[0].values)
    for key in keys or []:
        if key not in swept:
            raise UserError(f"over={key} is invalid: expected a swept setting ({', '.join(swept) or 'only seeds'})")
    if metric not in list_metrics(groups):
        raise UserError(
            f"metric={metric} is invalid: expected one of {', '.join(list_table_metrics(groups))} (the jobs have it "
            f"neither in metrics.json nor in {' or '.join(MEASUREMENT_FILES)})"
        )
    keys = list(keys or swept[:2])
    if not keys:
        return None
    if len(keys) == 1:
        return figures.plot_line(groups, keys[0], metric)
    pairs = {(group.values[keys[0]], group.values[keys[1]]) for group in groups}
    cells = math.prod(len(figures.sort_values(groups, key)) for key in keys)
    plot = figures.plot_heat_map if len(pairs) * 2 > cells else figures.plot_scatter
    return plot(groups, keys, metric)


def report_pareto_front(sweep: Path, groups: Sequence[SettingGroup]) -> "tuple[Figure | None, str]":
    """Plot and list the Pareto front of a search with two objectives; None and "" for other sweeps."""
    objectives = read_json(sweep / SEARCH_FILE).get("objectives", [])
    pairs = [(group.label, get_objectives(job.record, objectives)) for group in groups for job in group.finished]
    labels, points = [label for label, point in pairs if point], [point for _, point in pairs if point]
    if len(objectives) != 2 or not points:
        return None, ""
    front = figures.find_pareto_front(points)
    names = [("" if key in RECORD_OBJECTIVES else "validation ") + METRIC_NAMES.get(key, key) for key in objectives]
    lines = ["", f"Pareto front of {' and '.join(names)}:", ""]
    for number, i in enumerate(front, start=1):
        lines.append(f"{number}. {points[i][0]:.2f} and {points[i][1]:.2f}: {labels[i]}")
    return figures.plot_pareto_front(points, front, names), "\n".join(lines) + "\n"


def write_report(sweep: Path, out: Path, keys: Sequence[str] | None, metric: str, seed: int) -> list[str]:
    """Write the tables and figures of a sweep.

    A disentanglement score is measured in the jobs that lack it.

    Args:
        sweep: The sweep's folder.
        out: The folder of the report.
        keys: Settings to plot the metric over; None for the first two that were swept.
        metric: The metric to plot.
        seed: Seed of the samples.

    Returns:
        The names of the files.
    """
    check_claim(out, REPORT, "out")
    groups = group_jobs(sweep)
    finished = [job for group in groups for job in group.finished]
    if metric in SCORES:
        missing = [job for job in finished if metric not in read_job_metrics(job)]
        for job in tqdm(missing, "disentanglement of runs", disable=None):
            run = checkpoint.load(str(job.folder), "")
            evaluation.measure_disentanglement(run, job.folder / evaluation.DISENTANGLEMENT_FILE)
    drawn: dict[str, Figure | None] = {}
    front, front_lines = report_pareto_front(sweep, groups)
    if finished:
        drawn = {
            "rate_distortion": figures.plot_rate_distortion(groups),
            metric: plot_metric(groups, keys, metric),
            "pareto": front,
        }
    claim_folder(out, REPORT, "out")
    write_csv(groups, out / "table.csv")
    (out / "table.md").write_text(format_markdown(groups) + front_lines)
    files = {f"{name}.png": figure for name, figure in drawn.items() if figure is not None}
    for name, figure in files.items():
        plotting.save_figure(figure, out / name)
    samples, across = figures.draw_samples(groups, seed) if finished else ([], 0)
    if samples:
        caption = f"samples of the sweep {as_text(sweep.resolve().name)}, from the same z"
        save_grids(samples, out / "samples.png", caption, across)
    return ["table.csv", "table.md", *files, *(["samples.png"] if samples else [])]
