"""The two kinds of rooms (docs: Reading the code): who may know whom, read from the imports."""

import ast
from pathlib import Path

import pytest

from tests.commands import REPO

SOURCE = REPO / "src" / "betavae"
FILES = {str(path.relative_to(SOURCE).with_suffix("")): path for path in sorted(SOURCE.rglob("*.py"))}
MACHINERY = ("running/", "sweeping/")
RESEARCH = [name for name in FILES if not name.startswith(MACHINERY) and name != "__init__"]
PURE = [name for name in RESEARCH if name.startswith("measures/")]
PURE += ["networks", "activations", "resnet", "likelihoods", "logistic_mixture", "vae", "objectives", "schedules"]
PURE += ["optimizers", "fast", "precision", "terms", "importance_weighted", "disentangling"]
READ_FIRST = ["networks", "likelihoods", "vae", "terms", "objectives", "module"]
READ_FIRST += [f"data/{name}" for name in ("__init__", "images", "batches", "datamodule")]  # sources aside


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{item.name}" for item in node.names)}
    return found


def rooms(path: Path) -> set[str]:
    """Those of `FILES` that a file imports."""
    names = {name.removeprefix("betavae.").replace(".", "/") for name in imported(path) if name.startswith("betavae.")}
    return {name for name in FILES if name in names or (name.endswith("/__init__") and name[:-9] in names)}


@pytest.mark.parametrize("name", RESEARCH)
def test_research_knows_nothing_of_what_keeps_runs_alive(name):
    assert not [room for room in rooms(FILES[name]) if room.startswith(MACHINERY)]
    assert not [module for module in imported(FILES[name]) if module.split(".")[0] in ("hydra", "omegaconf")]


@pytest.mark.parametrize("name", PURE)
def test_what_a_notebook_may_lift_out_knows_torch_alone(name):
    others = {"lightning", "hydra", "omegaconf", "pydantic", "tensorboard", "matplotlib"}
    assert not {module.split(".")[0] for module in imported(FILES[name])} & others


def test_nobody_goes_round_in_circles():
    arrows = {name: rooms(path) - {name} for name, path in FILES.items() if name != "__init__"}
    left = dict(arrows)
    while ends := [name for name, others in left.items() if not others & left.keys()]:
        for name in ends:
            del left[name]
    assert not left, left


def test_what_is_computed_is_read_in_one_sitting():
    lines = {name: len(FILES[name].read_text().splitlines()) for name in READ_FIRST}
    assert sum(lines.values()) <= 910, lines
    assert lines["module"] <= 130


def test_no_assertion_decides_anything():
    """`python -O` leaves them out."""
    for path in (*FILES.values(), *(REPO / "scripts").glob("*.py"), REPO / "train.py"):
        assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)], path
