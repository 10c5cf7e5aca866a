"""The notebook runs from top to bottom on the snowglobe, on a person's own files and on the
original's, and its new word changes the table."""

import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import torch
from conftest import BART, CLIP, ROOT
from hub import Hub, repositories
from hub import serving as serving_hub
from nbclient import NotebookClient
from published import NAMES, lightning_file, serving

from antarctic.cache import read_cache
from antarctic.checkpoints import checkpoint_settings, load_checkpoint
from model import Captioner, Clip
from snowglobe.scenes import draw_scene, split_scene

NOTEBOOK = ROOT / "notebooks" / "antarctic_captions.ipynb"
OWN = "cache.txt", "cache.npy", "cache.npy.json", "checkpoints/best.safetensors"
PIP = """import os, sys
with open(os.environ["PIP_CALLS"], "a") as file:
    print(*sys.argv[1:], file=file)
"""


def printed(cell):
    """What a cell wrote to standard output."""
    streams = (output for output in cell.outputs if output.get("name") == "stdout")
    return "".join(output.text for output in streams)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(folder, cells=None, **changes):
    """Runs the notebook, or so many of its code cells, in a kernel that is started in the folder.
    Returns the code cells.

    changes: {name: text}, lines NAME = ... as a person edits them.
    """
    notebook = nbformat.read(NOTEBOOK, 4)
    for name, text in changes.items():
        cell = cell_of(code_of(notebook), f"{name} = ")
        cell.source, edited = re.subn(f"(?m)^{name} = .*", f"{name} = {text}", cell.source)
        assert edited == 1
    if cells:
        notebook.cells = code_of(notebook)[:cells]
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, resources=resources).execute()
    return code_of(notebook)


def files_of(folder):
    """{path: bytes} of what is in the folder, but for what Python and the notebook may write."""
    names = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {name.as_posix(): path.read_bytes() for name, path in names.items()
            if name.parts[0] != "demo" and "__pycache__" not in name.parts}


def test_it_is_saved_as_it_ran_from_top_to_bottom():
    cells = code_of(nbformat.read(NOTEBOOK, 4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "now:" in printed(cell_of(cells, "model.teach("))


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A fresh copy of the repository. The kernels get an empty folder of models, and a pip that
    only notes in tmp_path/pip what it is asked."""
    copy = tmp_path / "clone"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("needs a git clone")
    for name in filter(None, listed.stdout.decode().split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "pip.py").write_text(PIP)
    for name in list(os.environ):
        kept = name == "HF_HUB_OFFLINE" or not name.startswith("HF_")
        if name == "DEMO" or not kept or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, path in {"IPYTHONDIR": "ipython", "PYTHONPATH": "modules", "PIP_CALLS": "pip",
                       "HF_HOME": "home"}.items():
        monkeypatch.setenv(name, str(tmp_path / path))
    yield copy
    assert not list(ROOT.glob("notebooks/demo")) and not list(copy.glob("notebooks/demo"))


@pytest.fixture
def hub(monkeypatch):
    """The default models, by their names, from a hub on 127.0.0.1."""
    with serving_hub(Hub(repositories())) as hub:
        hub.hang = {"other"}
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield hub


def cell_of(code, text):
    cell, = (cell for cell in code if text in cell.source)
    return cell


def before_and_after(code):
    """The tables without and with the new word."""
    scored = printed(cell_of(code, "[table] = ")).splitlines()
    joined = printed(cell_of(code, "add_words")).splitlines()[0]
    return [line.split("  ", 1)[1] for line in scored], joined.split(" | ")


def table_of_the_drawing(textfile, embfile, topk, words=()):
    """The table by plain formulas, of the picture that the notebook draws for an empty PATH."""
    clip = Clip(CLIP)  # the hub's ViT-B/16 has the same weights
    entries, embeddings = read_cache([textfile], [embfile], "openai/clip-vit-base-patch16")
    features = clip.encode_images([draw_scene(split_scene("out", 0, 4)[0], 480)])
    vectors = torch.cat((embeddings[:], clip.encode_texts(list(words))))
    return [[*entries, *words][i] for i in (vectors @ features[0]).topk(topk).indices.tolist()]


def check_real(clone, code, textfile, embfile, checkpoint):
    """That the notebook captioned by these files and the hub's models, then with new words, too."""
    said = printed(cell_of(code, "Model.load"))
    entries = len((clone / textfile).read_text().splitlines())
    assert said.startswith(
        f"{textfile} with {entries:,} entries, {checkpoint}, facebook/bart-large on ")
    files, topk = (clone / textfile, clone / embfile), checkpoint_settings(
        clone / checkpoint)["topk"]
    first, second = before_and_after(code)
    assert first == table_of_the_drawing(*files, topk) and "penguin" not in first
    assert second == table_of_the_drawing(*files, topk,
                                          ("penguin", "penguins")) and "penguin" in second
    assert len(printed(cell_of(code, "model.candidates")).splitlines()) == 6
    assert printed(code[-1]).count("Once upon a time there w") == 2
    for text in ("draw_scene(drawing", "contributions("):
        assert any("image/png" in output.get("data", {}) for output in cell_of(code, text).outputs)


# ------------------------------------------------------------------------------- the three branches

@pytest.mark.slow
def test_the_notebook_runs_whole_and_names_the_new_thing(clone, tmp_path, monkeypatch):
    monkeypatch.setenv("DEMO", str(tmp_path / "demo"))
    there = files_of(clone)
    code = execute(clone / "notebooks")
    before, after = before_and_after(code)
    assert "penguin" not in before and "penguin" in after[:2]
    assert "penguin" in printed(cell_of(code, "add_words")).splitlines()[1]  # the best candidate
    seen = cell_of(code, "contributions(")
    assert "penguin" in printed(seen) and "image/png" in seen.outputs[-1]["data"]
    assert "Once upon a time there was" in printed(code[-1])
    assert files_of(clone) == there and not (clone / "demo").exists()
    assert not (tmp_path / "pip").exists()  # a clone has what it needs


@pytest.mark.slow
def test_it_captions_by_a_persons_own_files_and_leaves_them_alone(clone, hub, world, tmp_path):
    for command in (["compute_cache.py"], ["trainer.py", "--epochs", "1", "--topk", "16",
                                           "--table", "topk"]):
        run = subprocess.run([sys.executable, *command, "--datadir", world], cwd=clone,
                             capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    there = files_of(clone)
    assert there.keys() >= set(OWN)
    code = execute(clone / "notebooks")
    check_real(clone, code, "cache.txt", "cache.npy", "checkpoints/best.safetensors")
    assert files_of(clone) == there
    for name in ("openai/clip-vit-base-patch16", "facebook/bart-large", "EleutherAI/gpt-neo-1.3B"):
        assert set(hub.fetched(name).values()) == {1}
    assert not [request for request in hub.requests if request[1] == "other"]
    assert not (tmp_path / "pip").exists()


@pytest.mark.skipif(not all(map(shutil.which, ("bash", "curl", "python3"))), reason="needs curl")
@pytest.mark.slow
def test_it_downloads_the_originals_files_and_captions_by_them(
        clone, hub, cache, checkpoint, tmp_path, monkeypatch):
    captioner = Captioner(BART)
    load_checkpoint(checkpoint, captioner)
    settings = {"topk": 24, "maxlen_enc": 128, "maxlen_dec": 32, "clip_model": "ViT-B/16"}
    ckpt = tmp_path / "checkpoint.ckpt"
    lightning_file(ckpt, captioner, hyper_parameters=settings)
    published = {"cache.txt": cache.textfile, "cache.npy": cache.embfile, "checkpoint.ckpt": ckpt}
    files = {f"/a/{NAMES[name]}": path.read_bytes() for name, path in published.items()}
    (clone / "checkpoints").mkdir()
    for name in OWN:  # which ORIGINAL passes over
        (clone / name).write_text(f"my own {name}")
    there = files_of(clone)
    with serving(files) as server:
        monkeypatch.setenv("CACHE_URL", f"{server.address}/a")
        code = execute(clone / "notebooks", ORIGINAL="True")
    check_real(clone, code, "original/cache.txt", "original/cache.npy", "original/checkpoint.ckpt")
    for name, path in published.items():
        assert (clone / "original" / name).read_bytes() == path.read_bytes()
    new = {f"original/{name}" for name in (*published, "SOURCE.txt")}
    assert {name: data for name, data in files_of(clone).items() if name not in new} == there
    assert not (tmp_path / "pip").exists()


# ----------------------------------------------------------------------------------------- on Colab

@pytest.mark.slow
def test_without_a_clone_it_makes_one_and_leaves_torch_alone(clone, tmp_path):
    author = "-c", "user.name=a", "-c", "user.email=a@b"
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    (tmp_path / "content").mkdir()
    for _ in range(2):  # the second time as after a restart of the session
        execute(tmp_path / "content", cells=1, REPOSITORY=repr(str(clone)))
    made = tmp_path / "content" / "antarctic-captions"
    assert (made / "requirements.txt").read_bytes() == (clone / "requirements.txt").read_bytes()
    assert (tmp_path / "pip").read_text() == "install -q -r colab.txt\n" * 2  # no uninstall
    pinned, kept = ((made / name).read_text().splitlines()
                    for name in ("requirements.txt", "colab.txt"))
    names = {line.partition("==")[0] for line in kept}
    for_tests = {"pytest", "hypothesis", "nbclient", "ipykernel", "ruff"}
    assert not names & {"torch", "torchvision", "torchaudio", *for_tests}
    assert names >= {"transformers", "safetensors", "numpy", "nltk"} and set(kept) < set(pinned)


# ------------------------------------------------------------------------------- as it is committed

def test_the_notebook_is_committed_with_its_outputs():
    code = code_of(nbformat.read(NOTEBOOK, 4))
    assert all(cell.execution_count for cell in code)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
