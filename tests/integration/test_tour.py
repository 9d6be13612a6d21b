"""The notebook runs from its first cell to its last on a small run, and it is saved with the outputs of a run."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.commands import REPO, TINY, run

PATH = REPO / "docs" / "tour.ipynb"


@pytest.mark.slow
def test_tour_runs(tmp_path, data_root):
    run(*TINY, f"data.root={data_root}", cwd=tmp_path)
    notebook = nbformat.read(PATH, 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("limit_train_batches=200", "limit_train_batches=5")
    NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert "'epoch/penalized_kl'" in outputs[-2]["data"]["text/plain"]


def test_tour_is_saved_with_its_outputs():
    cells = [cell for cell in nbformat.read(PATH, 4).cells if cell.cell_type == "code"]
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 4
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
