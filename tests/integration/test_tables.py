"""A table from a CSV file to ranked rows, and docs/tables.md as written."""

import csv
import json
import re

import numpy as np
import pytest

import betavae
from tests.commands import TINY, run
from tests.integration.test_readme import PAGES, commands, small

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
NAMES = ["height_mm", "mass_kg", "ratio"]


def write(path, rows, names=NAMES):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "kind"])
        writer.writerows(rows)


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a table of correlated columns of other units, and a run on it."""
    folder = tmp_path_factory.mktemp("table")
    height = RNG.normal(1700, 100, 500)
    mass, ratio = height * 0.04 + RNG.normal(0, 2, 500), RNG.random(500)
    rows = [[*row, "ab"[i % 2]] for i, row in enumerate(np.stack([height, mass, ratio], 1).tolist())]
    write(folder / "people.csv", rows)
    odd = [*rows[:20], [1700, 68, 40.0, "odd"], [1700, 500, 0.5, "odd"]]
    # With the columns in another order, and one more.
    write(folder / "new.csv", [[m, r, h, 0, k] for h, m, r, k in odd], ["mass_kg", "ratio", "height_mm", "more"])
    data = ["data=table", "data.root=people.csv", "data.label=kind", "data.validation_size=0.2", "hydra.run.dir=run"]
    (folder / "log").write_text(run(*TINY, *data, "model.likelihood=gaussian", cwd=folder))
    return folder


def script(name, *args, cwd, **how):
    return run("ckpt=run", *args, cwd=cwd, script=f"scripts/{name}.py", **how)


def test_a_table_trains_with_its_columns_and_units(folder):
    log = (folder / "log").read_text()
    assert "Warning" not in log and "could not" not in log and "drawing" not in log
    loaded = betavae.load(folder / "run")
    assert loaded.columns == NAMES and loaded.vae.image_shape == (3, 1, 1)
    assert loaded.scaling.mode == "standardize"
    assert loaded.scaling.shift == pytest.approx([1700, 68, 0.5], rel=0.05)
    assert loaded.scaling.factor == pytest.approx([100, 4.5, 0.29], rel=0.2)
    assert "in data units" in json.loads((folder / "run" / "metrics.json").read_text())["note"]


def test_rows_return_in_their_units(folder):
    script("encode", "images=new.csv", cwd=folder)
    script("decode", "out=decoded.csv", cwd=folder)
    script("sample", "out=samples.csv", "n=200", cwd=folder)
    decoded, samples = read(folder / "decoded.csv"), read(folder / "samples.csv")
    assert len(decoded) == 22 and len(samples) == 200
    for rows in (decoded[:20], samples):
        assert np.mean([float(row["height_mm"]) for row in rows]) == pytest.approx(1700, abs=100)
        assert np.mean([float(row["ratio"]) for row in rows]) == pytest.approx(0.5, abs=0.3)
    script("decode", "out=decoded.npy", cwd=folder)
    assert np.load(folder / "decoded.npy").shape == (22, 3, 1, 1)


def test_the_most_unusual_columns_of_anomalies_are_named(folder):
    text = script("detect", "images=new.csv", "alpha=0.05", "inliers=[a,b]", "score=neg_elbo", cwd=folder)
    assert "AUROC                               1.0000" in text
    rows = read(folder / "anomalies" / "scores.csv")
    first, second = rows[:2]  # sorted
    assert {first["name"], second["name"]} == {"20", "21"} and first["flagged"] == second["flagged"] == "True"
    by_name = {row["name"]: row["unusual_columns"] for row in rows}
    assert by_name["20"].startswith("ratio=40 (+") and by_name["21"].startswith("mass_kg=500 (+")
    assert not (folder / "anomalies" / "extremes.png").exists()


@pytest.mark.parametrize("name", ["reconstruct", "traverse", "interpolate", "manifold", "fidelity", "explore"])
def test_what_needs_images_says_so(folder, name):
    text = script(name, cwd=folder, code=1)
    assert f"is a model of a table, and {name}.py needs a model of images" in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("sample", [], "out=samples.png is invalid: expected FILE.csv"),
        ("compress", [], "is a model of a table, and compress.py needs a model of images"),
        ("encode", ["images=log"], "expected FILE.csv, .parquet or .npy for a model of a table"),
        ("encode", ["images=short.csv"], "short.csv has no column ratio"),
        ("disentanglement", [], "no factors of variation"),
    ],
)
def test_scripts_reject_in_one_sentence(folder, name, args, message):
    (folder / "short.csv").write_text("height_mm,mass_kg\n1,2\n")
    text = script(name, *args, cwd=folder, code=1)
    assert message in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.likelihood=bernoulli"], r"needs values in \[0, 1\].*model.likelihood=gaussian or laplace"),
        (["model=conv", "model.likelihood=gaussian"], "model.network=conv is invalid: expected mlp for a table"),
        (["data.label=null", "model.likelihood=gaussian"], "column kind has 'a' in row 0, and in 499 more rows"),
        (["data.columns=[]"], "data.columns=.* is invalid"),
    ],
)
def test_training_rejects_what_a_table_has_not(folder, settings, message):
    data = ["data=table", "data.root=people.csv", "data.label=kind", "hydra.run.dir=other"]
    text = run(*TINY, *data, *settings, cwd=folder, code=1)
    assert re.search(message, text) and "Traceback" not in text


def test_exports_evaluation_and_sweeps_work(folder):
    script("evaluate", "k=5", cwd=folder)
    script("export", "format=folder", "out=shared", cwd=folder)
    shared = betavae.load(folder / "shared")
    assert shared.columns == NAMES and "samples.png" not in (folder / "shared" / "README.md").read_text()
    script("export", "format=torchscript", "out=graphs", cwd=folder)
    data = ["data=table", "data.root=people.csv", "data.label=kind", "trainer.max_epochs=1", "hydra.sweep.dir=sweep"]
    run("-m", *TINY, *data, "model.likelihood=gaussian,laplace", "+model.scale=per_value", cwd=folder)
    assert len(list(folder.glob("sweep/*/checkpoints/best.ckpt"))) == 2
    report = run("sweep=sweep", cwd=folder, script="scripts/sweep_report.py")
    assert "table.md" in report and "samples.png" not in report


def test_the_page_runs_as_written(tmp_path):
    pytest.importorskip("sklearn")
    outputs = {}
    for command in commands(PAGES["tables.md"]):
        name, words = small(command)
        if "benchmarks" in name:
            words = ["seeds=[0]", "epochs=2"]
        outputs[name] = run(*words, cwd=tmp_path, script=name)
        assert "Traceback" not in outputs[name] and "Warning" not in outputs[name]
    assert re.search(r"isolation forest +0\.9\d\d", outputs["scripts/benchmarks/tables.py"])
    assert "flagged" in outputs["scripts/detect.py"]
    assert read(tmp_path / "anomalies" / "scores.csv")[0]["unusual_columns"].count(" sd)") == 3
