import csv
from pathlib import Path

import pytest

from betavae.errors import UserError
from betavae.sweeps import figures, report
from betavae.sweeps.results import group_jobs
from tests.unit.sweeps.conftest import write_job


def test_tables_are_exact_and_mark_failed_and_missing_jobs(sweep: Path) -> None:
    groups = group_jobs(sweep)
    lines = report.format_markdown(groups).splitlines()
    assert lines[0] == "| beta | finished | neg. ELBO | KL | recon | seconds |"
    assert lines[2] == "| 1 | 3/3 | 3.00 ± 2.65 | 0.75 ± 0.66 | 2.25 ± 1.98 | 3.0 ± 0.0 |"
    assert lines[3] == "| 2 | 0/1 (1 missing) |  |  |  |  |"
    assert lines[4] == "| 10 | 1/2 (1 failed) | 4.00 | 1.00 | 3.00 | 3.0 |"
    assert "Failed: beta_10,seed_2: E: why" in lines
    report.write_csv(groups, sweep / "table.csv")
    rows = list(csv.DictReader((sweep / "table.csv").read_text().splitlines()))
    assert [[row[key] for key in ("finished", "failed", "missing")] for row in rows] == [
        ["3", "0", "0"],
        ["0", "0", "1"],
        ["1", "1", "0"],
    ]
    assert [row["neg_elbo_sd"] for row in rows] == ["2.64575", "", ""]


def test_figures_show_the_metrics(sweep: Path) -> None:
    groups = group_jobs(sweep)
    (axes,) = figures.plot_rate_distortion(groups).axes
    assert axes.lines[0].get_xydata().tolist() == [[0.75, 2.25], [1.0, 3.0]]
    assert [text.get_text() for text in axes.texts] == ["β=1", "β=10"]
    (axes,) = report.plot_metric(groups, None, "neg_elbo").axes
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 3.0], [10.0, 4.0]] and axes.get_xscale() == "log"
    for beta, value in (("1", 5.0), ("2", 7.0)):
        write_job(sweep, [f"beta={beta}", "model.latent_dim=2", "seed=1"], "finished", neg_elbo=value, kl=1, recon=1)
    groups, keys = group_jobs(sweep), ["beta", "model.latent_dim"]
    (axes,) = report.plot_metric(groups, keys, "neg_elbo").axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "10"]
    assert axes.images[0].get_array().filled(-1).tolist() == [[5.0, 7.0, -1.0], [3.0, -1.0, 4.0]]
    axes, _ = figures.plot_scatter([groups[0], groups[-1]], ["beta", "beta"], "neg_elbo").axes
    assert axes.collections[0].get_offsets().tolist() == [[1.0, 1.0], [10.0, 10.0]] and axes.get_yscale() == "log"
    for keys, metric, message in ((["betaa"], "kl", "over=betaa is invalid"), (None, "klx", "metric=klx is invalid")):
        with pytest.raises(UserError, match=message):
            report.plot_metric(groups, keys, metric)


def test_the_pareto_front_holds_all_points_that_none_dominates() -> None:
    points = [[1.0, 5.0], [2.0, 3.0], [2.0, 4.0], [3.0, 3.0], [4.0, 1.0], [2.0, 3.0], [5.0, 1.0]]
    front = figures.find_pareto_front(points)
    assert [points[i] for i in front] == [[1.0, 5.0], [2.0, 3.0], [2.0, 3.0], [4.0, 1.0]]
    (axes,) = figures.plot_pareto_front(points, front, ("a", "b")).axes
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 5.0], [2.0, 3.0], [2.0, 3.0], [4.0, 1.0]]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "4"]
