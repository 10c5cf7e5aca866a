"""Another process changes the cache while a run that reads it is encoding images."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import BART, CLIP, ROOT, commands, flags

from antarctic.errors import InputError
from model import Clip, Model

IN_PLACE = {  # {change: program of the other process}
    "other rows, as by np.save": "a = numpy.load(path); numpy.save(path, a[::-1].copy())",
    "cut short": "os.truncate(path, 1000)",
    "another file, as by cp": "shutil.copyfile(path + '.other', path)"}


@pytest.fixture
def own(cache, tmp_path):
    """A copy of the cache that other processes may change."""
    paths = SimpleNamespace(textfile=tmp_path / "own.txt", embfile=tmp_path / "own.npy")
    for path, original in zip(vars(paths).values(), vars(cache).values()):
        shutil.copy(original, path)
    shutil.copy(f"{cache.embfile}.json", f"{paths.embfile}.json")
    return paths


def add_and_remove(own):
    """compute_cache.py in a process of its own: it adds an entry and removes the first, so each row
    moves."""
    first = own.textfile.read_text(encoding="utf-8").split("\n")[0]
    change = subprocess.run(
        [sys.executable, ROOT / "compute_cache.py", "--textfile", own.textfile, "--embfile",
         own.embfile, "--clip_model", CLIP, "--add", "Geoff Hinton", "--remove", first],
        capture_output=True, text=True)
    assert change.returncode == 0 and "added 1 entries" in change.stdout, change.stderr


def in_place(program, own):
    shutil.copy(own.textfile, f"{own.embfile}.other")
    code = f"import numpy, os, shutil, sys; path = sys.argv[1]; {program}"
    subprocess.run([sys.executable, "-c", code, own.embfile], check=True)


@pytest.fixture
def while_encoding(monkeypatch):
    """while_encoding(act): act() runs once, before the next images are encoded."""
    def patch(act):
        encode, acts = Clip.encode_images, [act]

        def encode_later(*arguments):
            while acts:
                acts.pop()()
            return encode(*arguments)

        monkeypatch.setattr(Clip, "encode_images", encode_later)
    return patch


def results(folder):
    names = "preds.txt", "captions.json", "best.safetensors", "loss.csv"
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


@pytest.mark.parametrize("name", ["sampler", "trainer"])
def test_a_run_ends_with_the_cache_it_began_with(script, world, cache, checkpoint, own, tmp_path,
                                                 while_encoding, name):
    options = {"epochs": 1} if name == "trainer" else {}
    undisturbed = commands(world, cache, checkpoint)[name](tmp_path / "undisturbed", **options)
    assert script(name, *undisturbed).code == 0
    while_encoding(lambda: add_and_remove(own))
    run = script(name, *commands(world, own, checkpoint)[name](tmp_path / "out", **options))
    assert run.code == 0, run.err
    assert results(tmp_path / "out") == results(tmp_path / "undisturbed") != {}
    assert json.loads((tmp_path / "own.npy.json").read_text()) != json.loads(
        cache.embfile.with_name("cache.npy.json").read_text())
    if name == "sampler":  # the results are known as those of the earlier cache
        again = script(name, *commands(world, own, checkpoint)[name](tmp_path / "out"))
        assert "in earlier runs" not in again.err, again.err


@pytest.mark.parametrize("program", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("name", ["sampler", "trainer"])
def test_a_cache_that_is_changed_in_place_gives_no_results(
        script, world, checkpoint, own, tmp_path, while_encoding, name, program):
    while_encoding(lambda: in_place(program, own))
    run = script(name, *commands(world, own, checkpoint)[name](tmp_path / "out"))
    assert run.code == 2 and f"{own.embfile} was changed while" in run.err.splitlines()[-1]
    assert results(tmp_path / "out") == {}


def test_a_model_goes_on_with_the_cache_that_it_was_loaded_with(script, world, cache, own):
    def load(paths):
        return Model.load(CLIP, BART, "none", paths.textfile, paths.embfile, device="cpu")

    paths = sorted(world.glob("val2017/*.png"))[:3]
    model, captions = load(own), load(cache).caption(paths)
    entry = model.entries[0]
    assert script("compute_cache", *flags(vars(own)), "--clip_model", CLIP, "--add", "Geoff Hinton",
                  "--remove", entry).code == 0
    assert model.caption(paths) == captions
    assert torch.equal(model.embeddings[:], load(cache).embeddings[:])
    model = load(own)
    assert model.entries[-1] == "Geoff Hinton" and entry not in model.entries
    in_place(IN_PLACE["cut short"], own)
    with pytest.raises(InputError, match="was changed while this run read it"):
        model.caption(paths)
