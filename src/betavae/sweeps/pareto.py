"""What a search with two objectives found: the jobs that no other job beats in both."""

from collections.abc import Sequence
from typing import Any

from betavae import plotting


def pareto_indices(points: Sequence[Sequence[float]]) -> list[int]:
    """Which of the points, all to be small, no other one dominates: is as small in each number and not equal. In order
    of their first number."""

    def dominated(point: Sequence[float]) -> bool:
        return any(list(other) != list(point) and all(map(float.__le__, other, point)) for other in points)

    return sorted((i for i, point in enumerate(points) if not dominated(point)), key=lambda i: tuple(points[i]))


def pareto_figure(points: Sequence[Sequence[float]], best: Sequence[int], labels: Sequence[str]) -> Any:
    """All points, and the numbered `best` along the edge of what can be reached."""
    figure = plotting.create_figure(6, 4.5)
    axes = figure.add_subplot()
    axes.scatter(*zip(*points, strict=True), s=16, color="0.7")
    x, y = zip(*(points[i] for i in best), strict=True)
    axes.step(x, y, "o-", where="post", ms=5, lw=1)
    for number, at in enumerate(zip(x, y, strict=True), start=1):
        axes.annotate(str(number), at, textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.margins(0.1)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return figure
