"""Figures of a sweep: rate and distortion, a metric over settings, samples, and a Pareto front."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from betavae import plotting
from betavae.data.labels import cycle_labels
from betavae.grids import Grid
from betavae.runtime import checkpoint
from betavae.sweeps.results import METRIC_NAMES, SettingGroup, get_sort_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (6, 4.5)  # inches
MAX_LEGEND_LINES = 20
MIN_LOG_RATIO = 8  # between the largest and the smallest value of a logarithmic axis


def plot_rate_distortion(groups: Sequence[SettingGroup]) -> "Figure":
    """Plot the rate (KL) and the distortion (recon) of each setting; only beta changes along a line."""
    figure = plotting.create_figure(*SIZE)
    axes = figure.add_subplot()
    has_beta = "beta" in groups[0].values
    lines = group_by_line(groups, "beta" if has_beta else "")
    for label, line in lines.items():
        (x, x_error), (y, y_error) = (split_mean_sd(line, name) for name in ("kl", "recon"))
        style = "o-" if has_beta else "o"
        axes.errorbar(x, y, y_error, x_error, fmt=style, ms=4, lw=1, capsize=2, label=label)
        if len(lines) <= 6 and has_beta:
            for group, point in zip(line, zip(x, y, strict=True), strict=True):
                annotate(axes, f"β={group.values['beta']}", point, 7)
    add_legend(axes, len(lines))
    axes.margins(0.1)  # room for the annotations
    axes.set_xlabel("rate: KL [nats per image]")
    axes.set_ylabel("distortion: −log p(x|z) [nats per image]")
    return figure


def plot_line(groups: Sequence[SettingGroup], key: str, metric: str) -> "Figure":
    """Plot a metric over one setting; along a line only that setting changes."""
    figure = plotting.create_figure(*SIZE)
    axes = figure.add_subplot()
    values = sort_values(groups, key)
    position = {value: float(value) if all(map(is_number, values)) else i for i, value in enumerate(values)}
    lines = group_by_line(groups, key)
    for label, line in lines.items():
        y, y_error = split_mean_sd(line, metric)
        x = [position[group.values[key]] for group in line]
        axes.errorbar(x, y, y_error, fmt="o-", ms=4, lw=1, capsize=2, label=label)
    add_legend(axes, len(lines))
    if needs_log_scale(list(position.values())):
        axes.set_xscale("log")
    if len(values) <= 12:
        axes.set_xticks(list(position.values()), values)
        axes.minorticks_off()
    axes.set_xlabel(key)
    axes.set_ylabel(label_metric(metric))
    return figure


def plot_heat_map(groups: Sequence[SettingGroup], keys: Sequence[str], metric: str) -> "Figure":
    """Plot a metric over a grid of two settings, averaged over other settings."""
    across, down = (sort_values(groups, key) for key in keys)
    cells: dict[tuple[str, str], list[float]] = {}
    for group in groups:
        if group.finished:
            cells.setdefault((group.values[keys[0]], group.values[keys[1]]), []).append(group.mean_sd(metric)[0])
    grid = [[fmean(cells[a, d]) if (a, d) in cells else math.nan for a in across] for d in down]
    figure = plotting.create_figure(2 + 0.8 * len(across), 1.5 + 0.6 * len(down))
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap="viridis", aspect="auto")
    middle = sum(image.get_clim()) / 2
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if not math.isnan(value):
                color = "white" if value < middle else "black"
                axes.text(column, row, f"{value:.4g}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(across)), across)
    axes.set_yticks(range(len(down)), down)
    axes.set_xlabel(keys[0])
    axes.set_ylabel(keys[1])
    axes.set_title(label_metric(metric), fontsize=10)
    return figure


def plot_scatter(groups: Sequence[SettingGroup], keys: Sequence[str], metric: str) -> "Figure":
    """Plot a metric as the color of points, for two settings of a search, which lie on no grid."""
    figure = plotting.create_figure(*SIZE)
    axes = figure.add_subplot()
    finished = [group for group in groups if group.finished]
    columns: list[list[Any]] = []
    for key, set_scale in zip(keys, (axes.set_xscale, axes.set_yscale), strict=True):
        texts = [group.values[key] for group in finished]
        has_numbers = all(map(is_number, texts))
        columns.append(list(map(float, texts)) if has_numbers else texts)
        if has_numbers and needs_log_scale(columns[-1]):
            set_scale("log")
    points = axes.scatter(columns[0], columns[1], c=[group.mean_sd(metric)[0] for group in finished], cmap="viridis")
    figure.colorbar(points, label=label_metric(metric))
    axes.set_xlabel(keys[0])
    axes.set_ylabel(keys[1])
    return figure


@torch.no_grad()
def draw_samples(groups: Sequence[SettingGroup], seed: int) -> tuple[list[Grid], int]:
    """Draw 16 samples of the first finished job of each setting, from the same z if dimensions allow.

    Returns:
        A grid for each setting, none for models of tables, and the number of grids in a row.
    """
    finished = [group for group in groups if group.finished]
    drawn = []
    for group in finished:
        run = checkpoint.load(str(group.finished[0].folder), "")
        if run.columns is not None:
            return [], 0
        vae = run.vae.given(cycle_labels(run.vae.classes, 16))
        images = run.scaling.to_picture(vae.sample(16, 1.0, torch.Generator().manual_seed(seed)))
        drawn.append(Grid(images, 4, title=group.label.replace(", ", "\n")))
    axes = [len(sort_values(groups, key)) for key in groups[0].values]
    is_grid = len(finished) == len(groups) == math.prod(axes)
    return drawn, axes[-1] if axes and is_grid and axes[-1] <= 8 else min(6, len(drawn))


def find_pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Find the points that no other point dominates, sorted by their first number.

    All numbers are minimized: a point dominates another if none of its numbers is larger and the two differ.
    """

    def is_dominated(point: Sequence[float]) -> bool:
        return any(list(other) != list(point) and all(map(float.__le__, other, point)) for other in points)

    return sorted((i for i, point in enumerate(points) if not is_dominated(point)), key=lambda i: tuple(points[i]))


def plot_pareto_front(points: Sequence[Sequence[float]], front: Sequence[int], labels: Sequence[str]) -> "Figure":
    """Plot points of two objectives, and the numbered ones of the Pareto front along a line."""
    figure = plotting.create_figure(*SIZE)
    axes = figure.add_subplot()
    axes.scatter([x for x, _ in points], [y for _, y in points], s=16, color="0.7")
    best = [(points[i][0], points[i][1]) for i in front]
    axes.step([x for x, _ in best], [y for _, y in best], "o-", where="post", ms=5, lw=1)
    for number, point in enumerate(best, start=1):
        annotate(axes, str(number), point, 8)
    axes.margins(0.1)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return figure


def group_by_line(groups: Sequence[SettingGroup], key: str) -> dict[str, list[SettingGroup]]:
    """Group the settings that differ by `key` only, under the label of their other settings."""
    lines: dict[str, list[SettingGroup]] = {}
    for group in groups:
        if group.finished:
            rest = SettingGroup({k: v for k, v in group.values.items() if k != key}, [])
            lines.setdefault(rest.label if rest.values else "", []).append(group)
    return lines


def split_mean_sd(groups: Sequence[SettingGroup], metric: str) -> tuple[list[float], list[float]]:
    """Return the means of a metric, and its standard deviations with 0 where there is only one seed."""
    pairs = [group.mean_sd(metric) for group in groups]
    return [mean for mean, _ in pairs], [0.0 if math.isnan(sd) else sd for _, sd in pairs]


def sort_values(groups: Sequence[SettingGroup], key: str) -> list[str]:
    """Return the distinct values of a setting, numbers by size and before words."""
    return sorted({group.values[key] for group in groups}, key=get_sort_key)


def is_number(text: str) -> bool:
    return get_sort_key(text)[1] == ""


def needs_log_scale(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= MIN_LOG_RATIO


def label_metric(metric: str) -> str:
    return f"test {METRIC_NAMES.get(metric, metric)}"


def annotate(axes: "Axes", text: str, point: tuple[float, float], size: int) -> None:
    axes.annotate(text, point, textcoords="offset points", xytext=(4, 4), fontsize=size)


def add_legend(axes: "Axes", lines: int) -> None:
    if 1 < lines <= MAX_LEGEND_LINES:
        axes.legend(fontsize=8)
