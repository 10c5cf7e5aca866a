"""The notebook runs from top to bottom on the snowglobe, and its new word changes the caption."""

import os

import nbformat
from nbclient import NotebookClient

from conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "antarctic_captions.ipynb"


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def test_the_notebook_runs_whole_and_names_the_new_thing(tmp_path, monkeypatch):
    monkeypatch.setenv("DEMO", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    before, after = (printed(cell) for cell in code if "candidates_of(features)[:6]" in cell.source)
    assert "penguin |" not in before and "penguin" in after.split("|")[0] + after.split("|")[1]
    assert "penguin" in after.splitlines()[1]  # the best candidate
    assert "Once upon a time there was" in printed(code[-1])
    assert not os.path.exists(ROOT / "notebooks" / "demo")


def test_the_notebook_is_committed_with_its_outputs():
    code = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
