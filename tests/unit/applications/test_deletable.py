"""Tests that each application can be deleted with its scripts, without breaking anything else."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.commands import REPO, run
from tests.unit.test_architecture import find_imports

# Each application with the scripts that are deleted with it.
APPLICATIONS = {
    "sampling": ["sample", "fidelity"],
    "latents": ["encode", "decode"],
    "interpolation": ["interpolate"],
    "compression": ["compress", "decompress"],
    "anomalies": ["detect", "benchmarks/anomalies"],
    "explorer": ["explore"],
    "export": ["export"],
}
# Imports that the importing file does without if the application was deleted.
OPTIONAL_IMPORTS = {("scripts/explore.py", "anomalies")}
IMPORT_ALL = """
import importlib, runpy, sys
from pathlib import Path
for path in sorted(Path("src").rglob("*.py")):
    importlib.import_module(".".join(path.with_suffix("").parts[1:]).removesuffix(".__init__"))
for path in sorted(Path("scripts").rglob("*.py")):
    runpy.run_path(str(path), run_name="imported")
print(*sorted(name for name in sys.modules if name.startswith("betavae.applications.")))
"""


def parts(application: str) -> list[str]:
    """List the paths of an application and its scripts."""
    path = f"src/betavae/applications/{application}"
    scripts = [f"scripts/{script}.py" for script in APPLICATIONS[application]]
    return [path if (REPO / path).is_dir() else f"{path}.py", *scripts]


def test_every_application_is_listed():
    folder = REPO / "src" / "betavae" / "applications"
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert names == {*APPLICATIONS, "__init__", "trained_run"}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """The imports of each file."""
    paths = [path for name in ("src", "scripts") for path in (REPO / name).rglob("*.py")]
    return {str(path.relative_to(REPO)): find_imports(path) for path in paths}


@pytest.mark.parametrize("application", APPLICATIONS)
def test_no_other_file_imports_an_application(application, imports):
    module = f"betavae.applications.{application}"
    importers = {file for file, names in imports.items() if any(f"{name}.".startswith(f"{module}.") for name in names)}
    others = {file for file in importers if not file.startswith(tuple(parts(application)))}
    assert others == {file for file, optional in OPTIONAL_IMPORTS if optional == application}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of the sources, whose compiled files are kept from test to test."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("src", "scripts"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "mnist_files"))
    (folder / "import_all.py").write_text(IMPORT_ALL)
    return folder


@pytest.mark.parametrize("application", APPLICATIONS)
def test_everything_else_imports_without_an_application(application, sources, tmp_path):
    for number, part in enumerate(parts(application)):
        (sources / part).rename(tmp_path / str(number))
    imported = run(cwd=sources, script="import_all.py", sources=sources).split()
    for number, part in enumerate(parts(application)):
        (tmp_path / str(number)).rename(sources / part)
    names = {name.split(".")[2] for name in imported}
    assert names == {*APPLICATIONS, "trained_run"} - {application}


def test_explorer_shows_no_p_values_without_anomaly_detection(monkeypatch):
    monkeypatch.setitem(sys.modules, "betavae.applications.anomalies.report", None)
    script = runpy.run_path(str(REPO / "scripts" / "explore.py"))
    assert script["load_p_values"]([object(), object()]) == [None, None]
