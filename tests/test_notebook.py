"""The notebook runs from top to bottom on the snowglobe, and its new word changes the caption."""

import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import BART, ROOT
from hub import Hub, repositories
from hub import serving as serving_hub
from model import Captioner, load_checkpoint
from published import NAMES, lightning_file, serving

NOTEBOOK = ROOT / "notebooks" / "antarctic_captions.ipynb"


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


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
    assert "Once upon a time there w" in printed(code[-1])
    assert not os.path.exists(ROOT / "notebooks" / "demo")


def real_models(tmp_path, original):
    """The notebook's text for the real models, in a copy of the repository's files."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        if Path(name).parts[0] not in ("tests", "benchmarks", "docs"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    notebook = nbformat.read(tmp_path / "notebooks" / NOTEBOOK.name, 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("ORIGINAL = False", f"ORIGINAL = {original}")
    return notebook


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="lists the repository's files by git")
@pytest.mark.parametrize("original", [True, False])
def test_the_notebook_runs_with_the_models_of_the_hub(script, cache, checkpoint, tmp_path, monkeypatch, original):
    """With the published files, or with those of the user, which stay as they are."""
    files = {"cache.txt": cache.textfile.read_bytes(), "cache.npy": cache.embfile.read_bytes()}
    captioner = Captioner(BART)
    load_checkpoint(checkpoint, captioner)
    lightning_file(tmp_path / "a.ckpt", captioner, hyper_parameters={"topk": 24, "maxlen_enc": 128, "maxlen_dec": 32})
    files["checkpoint.ckpt"] = (tmp_path / "a.ckpt").read_bytes()
    folder = tmp_path / "repository"
    notebook = real_models(folder, original)
    if not original:
        (folder / "checkpoints").mkdir()
        for name, path in (("cache.txt", "cache.txt"), ("cache.npy", "cache.npy"), ("checkpoint.ckpt", "checkpoints/best.safetensors")):
            (folder / path).write_bytes(files[name])
    with serving({f"/a/{NAMES[name]}": data for name, data in files.items()}) as server, serving_hub(Hub(repositories())) as hub:
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HOME": tmp_path / "home", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1",
                            "IPYTHONDIR": tmp_path / "ipython", "DEMO": tmp_path / "demo", "CACHE_URL": f"{server.address}/a"}.items():
            monkeypatch.setenv(name, str(value))
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder / "notebooks")}}).execute()
        assert hub.fetched("facebook/bart-large") and not [request for request in hub.requests if request[1] == "other"]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    before, after = (printed(cell) for cell in code if "candidates_of(features)[:6]" in cell.source)
    assert len(before.splitlines()) == 6 and len(after.splitlines()) == 7
    assert "Once upon a time there" in printed(code[-1])
    place = folder / "original" if original else folder
    assert (place / "cache.txt").read_bytes() == files["cache.txt"] and (place / "cache.npy").read_bytes() == files["cache.npy"]


def test_on_colab_torch_stays_and_all_else_is_installed(tmp_path, monkeypatch):
    [source] = [cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if "REPOSITORY" in cell.source and cell.cell_type == "code"]
    [line] = [line.strip() for line in source.splitlines() if line.strip().startswith("wanted =")]
    monkeypatch.chdir(ROOT)
    names = {}
    exec(line, names)
    packages = {entry.split("==")[0] for entry in names["wanted"]}
    assert not packages & {"torch", "torchvision", "pytest"} and {"transformers", "safetensors", "pillow"} <= packages
    assert "uninstall" not in source


def test_the_notebook_is_committed_with_its_outputs():
    code = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
