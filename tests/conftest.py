"""What the tests share: the scripts, run in this process, and one small world, cache and checkpoint
for all."""

import os

os.environ[
    # before transformers is imported, here or in a process that a test starts
    "HF_HUB_OFFLINE"] = "1"

import contextlib
import importlib
import io
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLIP, BART = (str(ROOT / "snowglobe" / "weights" / name) for name in ("clip", "bart"))
TRAIN, VAL = 48, 8  # images of the world: of train2017, and of each other split
sys.path.insert(0, str(ROOT))


def run_script(name, *arguments):
    """Runs a script's main() as its command line does. Returns its exit code, and what it wrote to
    out and err."""
    from antarctic import runtime
    script, out, err, code = importlib.import_module(name), io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", [f"{name}.py", *map(str, arguments)]):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runtime.run(script.main)
            except SystemExit as stop:
                code = stop.code or 0
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def succeed(name, *arguments):
    result = run_script(name, *arguments)
    assert result.code == 0, result.err


@pytest.fixture(scope="session")
def script():
    """script(name, *arguments) is run_script."""
    import torch
    torch.set_num_threads(
        1
    )  # the models are small: more threads gain nothing, and lose much where the cores are busy
    return run_script


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder in COCO's layout, as snowglobe.scenes --train 48 --val 8 writes it."""
    from snowglobe import scenes
    folder = tmp_path_factory.mktemp("world")
    with ThreadPool(1) as pool:
        for split in scenes.SPLITS:
            scenes.write_split(folder, split, TRAIN if split == "train2017" else VAL, 0, pool)
    return folder


@pytest.fixture(scope="session")
def cache(script, world, tmp_path_factory):
    """The cache of the world's captions: textfile and embfile."""
    folder = tmp_path_factory.mktemp("cache")
    made = SimpleNamespace(textfile=folder / "cache.txt", embfile=folder / "cache.npy")
    succeed("compute_cache", "--datadir", world, "--textfile", made.textfile, "--embfile",
            made.embfile, "--clip_model", CLIP)
    return made


@pytest.fixture(scope="session")
def checkpoint(script, world, cache, tmp_path_factory):
    """best.safetensors of one epoch on the world."""
    folder = tmp_path_factory.mktemp("checkpoints")
    succeed("trainer", "--datadir", world, "--textfile", cache.textfile, "--embfile", cache.embfile,
            "--savedir", folder, "--clip_model", CLIP, "--lm", BART, "--topk", 24, "--batch_size",
            16, "--lrate", "2e-2", "--epochs", 1)
    return folder / "best.safetensors"
