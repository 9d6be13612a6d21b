"""What a sweep found: a table per setting over seeds, the rate-distortion plot, a map of any two settings, samples."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from betavae import plotting
from betavae.errors import UserError
from betavae.metrics.disentanglement import SCORES
from betavae.runtime import checkpoint, evaluation
from betavae.runtime.evaluation import DISENTANGLEMENT_FILE
from betavae.runtime.run_folder import REPORT, check_mark, claim_folder, read_json
from betavae.runtime.yaml_files import read_yaml
from betavae.sweeps import pareto
from betavae.sweeps.jobs import (
    RECORD_OBJECTIVES,
    SEARCH_FILE,
    STATUSES,
    Job,
    flat_settings,
    objective_values,
    read_jobs,
    sort_key,
    status_summary,
)

SEED_KEY = "seed"  # the key whose values are repetitions of one setting
SCALES = ("neg_elbo", "kl", "recon")
NAMES = {
    **{"neg_elbo": "neg. ELBO", "kl": "rate", "recon": "distortion", "active_units": "active units"},
    **{"fid": "Fréchet distance", "mig": "MIG", "factor_vae_score": "FactorVAE score"},
}
MEASUREMENT_FILES = ("evaluation.json", "fidelity.json", DISENTANGLEMENT_FILE)  # what scripts leave in a job's folder


class SettingGroup(NamedTuple):
    """The jobs that differ by their seed only, and the values of the swept keys that they share."""

    values: dict[str, str]
    jobs: list[Job]

    @property
    def finished(self) -> list[Job]:
        return [job for job in self.jobs if job.status == "finished"]

    @property
    def label(self) -> str:
        return ", ".join(f"{short_key(key)}={value}" for key, value in self.values.items()) or "all jobs"

    def mean_sd(self, metric: str) -> tuple[float, float]:
        """Mean and sample standard deviation over the finished seeds; nan where there are none, or only one."""
        results = [row[metric] for row in map(job_metrics, self.finished) if metric in row]
        return fmean(results) if results else math.nan, stdev(results) if len(results) > 1 else math.nan


def job_metrics(job: Job) -> dict[str, float]:
    """Of a finished job: the test numbers of its training, its seconds, and what was measured afterwards, by name:
    `fid`, or below a key of that file `mixture.fid`. Where two have one name it is the training's."""
    found: dict[str, float] = {}

    def add(prefix: str, content: dict[str, Any]) -> None:
        for key, value in content.items():
            mean = value.get("mean", value.get("value")) if isinstance(value, dict) else value
            if isinstance(mean, float):  # whole numbers say how it was measured
                found[prefix + key] = mean
            elif isinstance(value, dict) and not prefix:
                add(f"{key}.", value)

    for file in MEASUREMENT_FILES:
        add("", read_json(job.folder / file))
    return {**found, **job.test, "seconds": job.record["seconds"]}


def latest_sweep(sweeps: Path) -> Path:
    found = [path for path in sweeps.glob("*") if any(path.glob("*/overrides.yaml"))]
    if not found:
        raise UserError(
            f"no sweep under {sweeps}/: make one with `python train.py -m beta=1,4`, or name it by sweep=PATH"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def group_jobs(sweep: Path) -> list[SettingGroup]:
    """The settings of a sweep in order of their values, numbers by size."""
    jobs = read_jobs(sweep)
    if not jobs:
        raise UserError(f"sweep: {sweep} holds no job of a sweep; name the folder that holds the jobs' folders")
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    table = [{key: value_of(job, key) for key in keys} for job in jobs]
    swept = [key for key in keys if key != SEED_KEY and len({row[key] for row in table}) > 1]
    groups: dict[tuple[str, ...], list[Job]] = {}
    for job, row in zip(jobs, table, strict=True):
        groups.setdefault(tuple(row[key] for key in swept), []).append(job)
    ordered = sorted(groups, key=lambda values: [sort_key(value) for value in values])
    return [SettingGroup(dict(zip(swept, values, strict=True)), groups[values]) for values in ordered]


def value_of(job: Job, key: str) -> str:
    """The value of a key in a job; where its command did not give it, as the run's config has it."""
    if key in job.overrides or job.status == "missing" or not (job.folder / "config.yaml").exists():
        return job.overrides.get(key, "default")
    value = flat_settings(read_yaml(job.folder / "config.yaml")).get(key)
    return "default" if value is None else str(value)


def short_key(key: str) -> str:
    return key.rsplit(".")[-1]


def available_metrics(found: Sequence[SettingGroup]) -> list[str]:
    return [name for setting in found for job in setting.finished for name in job_metrics(job)]


def table_metrics(found: Sequence[SettingGroup]) -> list[str]:
    """Those of the tables: none below a key."""
    names = dict.fromkeys(name for name in available_metrics(found) if "." not in name)
    known = [*NAMES, *(name for name in names if name not in (*NAMES, "seconds")), "seconds"]
    return sorted(names | {"seconds": None}, key=known.index)


def status_cell(setting: SettingGroup) -> str:
    """`3/3`, or what became of the others: `1/3 (1 failed, 1 missing)`."""
    others = [job.status for job in setting.jobs if job.status != "finished"]
    text = f"{len(setting.finished)}/{len(setting.jobs)}"
    return text + (f" ({', '.join(f'{others.count(s)} {s}' for s in dict.fromkeys(others))})" if others else "")


def write_csv(found: Sequence[SettingGroup], path: Path) -> None:
    """One row per setting: its values, how many jobs reached which status, mean and sd of every number."""
    names = table_metrics(found)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*found[0].values, *STATUSES, *(f"{name}_{part}" for name in names for part in ("mean", "sd"))])
        for setting in found:
            counts = [sum(job.status == status for job in setting.jobs) for status in STATUSES]
            cells = [cell for name in names for cell in setting.mean_sd(name)]
            writer.writerow([*setting.values.values(), *counts, *("" if math.isnan(x) else f"{x:.6g}" for x in cells)])


def markdown(found: Sequence[SettingGroup]) -> str:
    names = [name for name in table_metrics(found) if name in (*NAMES, "seconds")]
    header = [*map(short_key, found[0].values), "finished", *(NAMES.get(name, name) for name in names)]
    rows = [header, ["---"] * len(header)]
    for setting in found:
        cells = [
            format_mean_sd(*setting.mean_sd(name), digits=1 if name in ("active_units", "seconds") else 2)
            for name in names
        ]
        rows.append([*setting.values.values(), status_cell(setting), *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    notes = {job.record.get("note", "") for setting in found for job in setting.finished}
    lines += ["", "Test set, nats per image, mean ± standard deviation over seeds."]
    lines += [status_summary([job for setting in found for job in setting.jobs]) + "."]
    lines += [f"Note: {note}." for note in sorted(notes) if note]
    if len(notes) > 1:
        lines.append(
            "Jobs with different notes, or with and without one, are on different scales: compare none of them."
        )
    for setting in found:
        lines += [f"Failed: {job.folder.name}: {job.record['error']}" for job in setting.jobs if "error" in job.record]
    return "\n".join(lines) + "\n"


def format_mean_sd(mean: float, sd: float, digits: int) -> str:
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" + ("" if math.isnan(sd) else f" ± {sd:.{digits}f}")


def group_lines(found: Sequence[SettingGroup], key: str) -> dict[str, list[SettingGroup]]:
    """Settings that differ by `key` alone, under what they share: the points of one line."""
    lines: dict[str, list[SettingGroup]] = {}
    for setting in found:
        if setting.finished:
            rest = SettingGroup({k: v for k, v in setting.values.items() if k != key}, [])
            lines.setdefault(rest.label if rest.values else "", []).append(setting)
    return lines


def rate_distortion(found: Sequence[SettingGroup]) -> Any:
    """Each setting's rate and distortion; along a line only beta changes."""
    figure = plotting.create_figure(6, 4.5)
    axes = figure.add_subplot()
    swept = "beta" in found[0].values
    lines = group_lines(found, "beta" if swept else "")
    for label, points in lines.items():
        (x, xerr), (y, yerr) = (
            zip(*(point.mean_sd(name) for point in points), strict=True) for name in ("kl", "recon")
        )
        axes.errorbar(
            x, y, error_bars(yerr), error_bars(xerr), fmt="o-" if swept else "o", ms=4, lw=1, capsize=2, label=label
        )
        if len(lines) <= 6:
            for point, at in zip(points, zip(x, y, strict=True), strict=True):
                text = f"β={point.values['beta']}" if swept else ""
                axes.annotate(text, at, textcoords="offset points", xytext=(4, 4), fontsize=7)
    if 1 < len(lines) <= 20:
        axes.legend(fontsize=8)
    axes.margins(0.1)  # room for the names
    axes.set_xlabel("rate: KL [nats per image]")
    axes.set_ylabel("distortion: −log p(x|z) [nats per image]")
    return figure


def error_bars(sds: Sequence[float]) -> list[float]:
    return [0.0 if math.isnan(sd) else sd for sd in sds]


def line_plot(found: Sequence[SettingGroup], key: str, metric: str) -> Any:
    figure = plotting.create_figure(6, 4.5)
    axes = figure.add_subplot()
    values = ordered_values(found, key)
    place = {value: float(value) if all(map(is_number, values)) else i for i, value in enumerate(values)}
    lines = group_lines(found, key)
    for label, points in lines.items():
        y, yerr = zip(*(point.mean_sd(metric) for point in points), strict=True)
        x = [place[point.values[key]] for point in points]
        axes.errorbar(x, y, error_bars(yerr), fmt="o-", ms=4, lw=1, capsize=2, label=label)
    if 1 < len(lines) <= 20:
        axes.legend(fontsize=8)
    low, high = min(place.values()), max(place.values())
    if low > 0 and high / low >= 8:
        axes.set_xscale("log")
    if len(values) <= 12:
        axes.set_xticks(list(place.values()), values)
        axes.minorticks_off()
    axes.set_xlabel(key)
    axes.set_ylabel(f"test {NAMES.get(metric, metric)}")
    return figure


def heat_map(found: Sequence[SettingGroup], keys: Sequence[str], metric: str) -> Any:
    """The metric over two keys, averaged over whatever else was swept; an empty cell has no finished job."""
    across, down = (ordered_values(found, key) for key in keys)
    cells: dict[tuple[str, str], list[float]] = {}
    for setting in found:
        if setting.finished:
            cells.setdefault((setting.values[keys[0]], setting.values[keys[1]]), []).append(setting.mean_sd(metric)[0])
    grid = [[fmean(cells[a, d]) if (a, d) in cells else math.nan for a in across] for d in down]
    figure = plotting.create_figure(2 + 0.8 * len(across), 1.5 + 0.6 * len(down))
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap="viridis", aspect="auto")
    middle = sum(image.get_clim()) / 2
    for row, column in ((r, c) for r in range(len(down)) for c in range(len(across))):
        if not math.isnan(value := grid[row][column]):
            colour = "white" if value < middle else "black"
            axes.text(column, row, f"{value:.4g}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(across)), across)
    axes.set_yticks(range(len(down)), down)
    axes.set_xlabel(keys[0])
    axes.set_ylabel(keys[1])
    axes.set_title(f"test {NAMES.get(metric, metric)}", fontsize=10)
    return figure


def scatter(found: Sequence[SettingGroup], keys: Sequence[str], metric: str) -> Any:
    """For a search, whose settings lie on no grid."""
    figure = plotting.create_figure(6, 4.5)
    axes = figure.add_subplot()
    points = [setting for setting in found if setting.finished]
    xy: list[list[Any]] = []
    for key in keys:
        values = [point.values[key] for point in points]
        xy.append([float(value) for value in values] if all(map(is_number, values)) else values)
    marks = axes.scatter(*xy, c=[point.mean_sd(metric)[0] for point in points], cmap="viridis")
    for values, scale in zip(xy, (axes.set_xscale, axes.set_yscale), strict=True):
        if all(isinstance(value, float) and value > 0 for value in values) and max(values) / min(values) >= 8:  # type: ignore
            scale("log")
    figure.colorbar(marks, label=f"test {NAMES.get(metric, metric)}")
    axes.set_xlabel(keys[0])
    axes.set_ylabel(keys[1])
    return figure


def ordered_values(found: Sequence[SettingGroup], key: str) -> list[str]:
    return sorted({setting.values[key] for setting in found}, key=sort_key)


def is_number(text: str) -> bool:
    return sort_key(text)[1] == ""


def metric_figure(found: Sequence[SettingGroup], keys: Sequence[str] | None, metric: str) -> Any:
    """A line over one swept key, a map over two; None where nothing but the seed was swept."""
    swept = list(found[0].values)
    for key in keys or []:
        if key not in swept:
            raise UserError(f"over: {key} was not swept here; swept: {', '.join(swept) or 'nothing but seeds'}")
    if metric not in available_metrics(found):
        raise UserError(
            f"metric={metric} is not in the jobs' metrics.json, {' or '.join(MEASUREMENT_FILES)}; it must be one of "
            f"{', '.join(table_metrics(found))}"
        )
    keys = list(keys or swept[:2])
    if not keys:
        return None
    if len(keys) == 1:
        return line_plot(found, keys[0], metric)
    pairs = {(setting.values[keys[0]], setting.values[keys[1]]) for setting in found}
    on_grid = len(pairs) * 2 > math.prod(len(ordered_values(found, key)) for key in keys)
    return heat_map(found, keys, metric) if on_grid else scatter(found, keys, metric)


@torch.no_grad()
def contact_sheet(found: Sequence[SettingGroup], seed: int) -> Any:
    """Sixteen samples of each setting (its first finished seed), all from the same z as far as dimensions allow."""
    points = [setting for setting in found if setting.finished]
    last_key = list(found[0].values)[-1:]
    columns = len(ordered_values(found, last_key[0])) if last_key else 1
    if len(points) != len(found) or columns > 8:
        columns = min(6, len(points))
    rows = -(-len(points) // columns)
    titles = [point.label.replace(", ", "\n") for point in points]
    lines = max(title.count("\n") + 1 for title in titles)
    figure = plotting.create_figure(1.6 * columns, (1.6 + 0.12 * lines) * rows)
    for place, (point, title) in enumerate(zip(points, titles, strict=True), start=1):
        vae = checkpoint.load(str(point.finished[0].folder), "").vae
        axes = figure.add_subplot(rows, columns, place)
        images = vae.sample(16, 1.0, torch.Generator().manual_seed(seed))
        plotting.draw_image(axes, plotting.make_grid(images, 4))
        axes.set_title(title, fontsize=7)
    return figure


def pareto_front(sweep: Path, found: Sequence[SettingGroup]) -> tuple[Any, str]:
    """Of a search with two objectives: its picture, and a line for each of its jobs; else nothing."""
    objectives = read_json(sweep / SEARCH_FILE).get("objectives", [])
    finished = [
        (setting.label, objective_values(job.record, objectives)) for setting in found for job in setting.finished
    ]
    named = [(label, point) for label, point in finished if point]
    if len(objectives) != 2 or not named:
        return None, ""
    points = [point for _, point in named]
    best = pareto.pareto_indices(points)
    labels = [
        NAMES.get(name, name) if name in RECORD_OBJECTIVES else f"validation {NAMES.get(name, name)}"
        for name in objectives
    ]
    lines = ["", f"Pareto front of {' and '.join(labels)}:", ""]
    for number, i in enumerate(best, start=1):
        lines.append(f"{number}. {points[i][0]:.2f} and {points[i][1]:.2f}: {named[i][0]}")
    return pareto.pareto_figure(points, best, labels), "\n".join(lines) + "\n"


def write_report(sweep: Path, out: Path, keys: Sequence[str] | None, metric: str, seed: int) -> list[str]:
    """Everything into the folder `out`; the names of the files. A score of disentanglement is measured where it was
    not yet."""
    check_mark(out, REPORT, "out")
    found = group_jobs(sweep)
    if metric in SCORES:
        lacking = [job for setting in found for job in setting.finished if metric not in job_metrics(job)]
        for job in tqdm(lacking, "runs measured", disable=None):
            evaluation.disentanglement(checkpoint.load(str(job.folder), ""), job.folder / DISENTANGLEMENT_FILE)
    figures, (front, lines) = {}, pareto_front(sweep, found)
    if any(setting.finished for setting in found):
        figures = {
            "rate_distortion": rate_distortion(found),
            metric: metric_figure(found, keys, metric),
            "samples": contact_sheet(found, seed),
            "pareto": front,
        }
    claim_folder(out, REPORT, "out")
    write_csv(found, out / "table.csv")
    (out / "table.md").write_text(markdown(found) + lines)
    drawn = {f"{name}.png": figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        plotting.save_figure(figure, out / name)
    return ["table.csv", "table.md", *drawn]
