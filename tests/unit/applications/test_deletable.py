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


def copy_without(application: str, folder: Path) -> None:
    """Copy the sources without an application and its scripts."""
    ignored = shutil.ignore_patterns("__pycache__", "mnist_files")
    for name in ("src", "scripts"):
        shutil.copytree(REPO / name, folder / name, ignore=ignored)
    path = folder / "src" / "betavae" / "applications" / application
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.with_suffix(".py").unlink()
    for script in APPLICATIONS[application]:
        (folder / "scripts" / f"{script}.py").unlink()


def test_every_application_is_listed():
    folder = REPO / "src" / "betavae" / "applications"
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert names == {*APPLICATIONS, "__init__", "trained_run"}


@pytest.mark.parametrize("application", APPLICATIONS)
def test_no_other_file_imports_an_application(application, tmp_path):
    copy_without(application, tmp_path)
    module = f"betavae.applications.{application}"
    importers = {
        str(path.relative_to(tmp_path))
        for path in tmp_path.rglob("*.py")
        if any(name == module or name.startswith(f"{module}.") for name in find_imports(path))
    }
    assert importers == {file for file, optional in OPTIONAL_IMPORTS if optional == application}


@pytest.mark.parametrize("application", APPLICATIONS)
def test_everything_else_imports_without_an_application(application, tmp_path):
    copy_without(application, tmp_path)
    (tmp_path / "import_all.py").write_text(IMPORT_ALL)
    imported = run(cwd=tmp_path, script="import_all.py", sources=tmp_path).split()
    names = {name.split(".")[2] for name in imported}
    assert names == {*APPLICATIONS, "trained_run"} - {application}


def test_explorer_shows_no_p_values_without_anomaly_detection(monkeypatch):
    monkeypatch.setitem(sys.modules, "betavae.applications.anomalies.report", None)
    script = runpy.run_path(str(REPO / "scripts" / "explore.py"))
    assert script["load_p_values"]([object(), object()]) == [None, None]
