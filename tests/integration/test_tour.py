"""The notebook runs from its first cell to its last on a small run, and what is saved in it is a run's output."""

import nbformat
from nbclient import NotebookClient

from tests.commands import REPO, TINY, run

PATH = REPO / "docs" / "tour.ipynb"


def test_the_tour_runs(tmp_path, data_root):
    run(*TINY, f"data.root={data_root}", cwd=tmp_path)
    notebook = nbformat.read(PATH, 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("limit_train_batches=200", "limit_train_batches=5")
    NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert "'epoch/paid'" in outputs[-2]["data"]["text/plain"]


def test_its_outputs_are_saved():
    cells = [cell for cell in nbformat.read(PATH, 4).cells if cell.cell_type == "code"]
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 4
    assert all(cell.execution_count for cell in cells)
