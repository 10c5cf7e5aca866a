"""The published weights, from the download to a caption, and the default cache and checkpoint of
the scripts."""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import BART, CLIP, ROOT, succeed
from PIL import Image
from published import NAMES, lightning_file, serving

from antarctic import errors
from antarctic.checkpoints import load_checkpoint
from model import Captioner, rescore

MODELS = "--clip_model", CLIP, "--lm", BART


@pytest.fixture(scope="module")
def originals(cache, checkpoint, tmp_path_factory):
    """A folder original/ as download.sh leaves it, in the published formats.

    It holds the weights of the checkpoint fixture, and the cache fixture without its description.
    """
    folder = tmp_path_factory.mktemp("published") / "original"
    folder.mkdir()
    shutil.copy(cache.textfile, folder / "cache.txt")
    shutil.copy(cache.embfile, folder / "cache.npy")
    captioner = Captioner(BART)
    load_checkpoint(checkpoint, captioner)
    settings = argparse.Namespace(topk=24, maxlen_enc=128, maxlen_dec=32, clip_model="ViT-B/16")
    lightning_file(folder / "checkpoint.ckpt", captioner, hyper_parameters=settings)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def photo(world, here):
    """A photo whose name has characters that ASCII and cp1252 lack."""
    path = here / "Eisbär ☃.jpg"
    Image.open(sorted((world / "val2017").glob("*.png"))[0]).convert("RGB").save(path)
    return path.relative_to(here)


def start(*command, cwd, stdout=subprocess.PIPE, **environment):
    """Runs a command to its end, without proxies."""
    own = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return subprocess.run(list(map(str, command)), cwd=cwd, stdout=stdout, stderr=subprocess.PIPE,
                          env={**own, "HOME": str(cwd), **environment}, encoding="utf-8",
                          timeout=120)


@pytest.mark.skipif(not all(map(shutil.which, ("bash", "curl", "python3"))), reason="needs curl")
@pytest.mark.slow
def test_two_commands_caption_a_photo(script, originals, cache, checkpoint, photo, here):
    files = {f"/a/{NAMES[path.name]}": path.read_bytes() for path in originals.iterdir()}
    with serving(files) as server:
        run = start(ROOT / "download.sh", "--original", cwd=here, CACHE_URL=f"{server.address}/a")
    assert run.returncode == 0, run.stderr
    for path in originals.iterdir():
        assert (here / "original" / path.name).read_bytes() == path.read_bytes()

    run = start(sys.executable, ROOT / "sampler.py", "--images", photo, *MODELS, cwd=here)
    assert run.returncode == 0, run.stderr
    caption = (here / "results" / "preds.txt").read_text().removesuffix("\n")
    lines = run.stdout.splitlines()
    assert caption and f"{photo}: {caption}" in lines
    inputs = "original/cache.txt with original/cache.npy, the checkpoint original/checkpoint"
    assert inputs in lines[0]
    results = json.loads((here / "results" / "captions.json").read_text())
    assert results == [{"image_id": str(photo), "caption": caption}]

    # The results are those of this project's own files.
    succeed("sampler", "--images", photo, *MODELS, "--textfile", cache.textfile,
            "--embfile", cache.embfile, "--ckpt", checkpoint, "--table", "topk", "--savedir",
            here / "ours")
    ours, theirs = (here / folder / "details.jsonl" for folder in ("ours", "results"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("stdout", ["ascii", "closed pipe", "full disk"])
@pytest.mark.slow
def test_what_standard_output_lacks_costs_no_result(originals, photo, here, stdout):
    here.joinpath("original").symlink_to(originals)
    command = [sys.executable, ROOT / "sampler.py", "--images", photo, *MODELS]
    environment, out = {}, subprocess.PIPE
    if stdout == "closed pipe":
        read, out = os.pipe()
        os.close(read)
    elif stdout == "full disk":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        environment = {"PYTHONIOENCODING": stdout}
    run = start(*command, cwd=here, stdout=out, **environment)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr and "Exception" not in run.stderr
    caption = (here / "results" / "preds.txt").read_text()
    assert caption.strip() and (here / "results" / "gallery.html").exists()
    if environment:
        assert f"Eisb\\xe4r \\u2603.jpg: {caption}" in run.stdout
    else:
        os.close(out)


@pytest.mark.parametrize("encoding, expected", [
    ("ascii", b"\\xe4 \\u2603 \\udcff\n"), ("cp1252", b"\xe4 \\u2603 \\udcff\n"),
    ("utf-8", "ä ☃ \\udcff\n".encode())])
def test_a_line_is_said_in_any_encoding(monkeypatch, encoding, expected):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding))
    errors.print_safely("ä ☃ \udcff")
    assert buffer.getvalue() == expected
    monkeypatch.setattr(sys, "stdout", None)  # as Python does where it is closed
    errors.print_safely("ä")


def test_twenty_captions_are_printed_and_the_rest_is_counted(script, originals, world, here):
    here.joinpath("original").symlink_to(originals)
    for i in range(23):
        shutil.copy(sorted((world / "val2017").glob("*.png"))[i % 8], here / f"{i:02} \x1b[2J.png")
    run = script("sampler", "--images", here, *MODELS)
    assert run.code == 0, run.err
    captions = (here / "results" / "preds.txt").read_text().splitlines()
    lines = [line for line in run.out.splitlines() if ".png: " in line]
    assert lines == [f"{here}/{i:02} \\x1b[2J.png: {captions[i]}" for i in range(20)]
    assert "... and 3 more in results/preds.txt" in run.out
    assert script("sampler", "--datadir", world, *MODELS).out.count(".png: ") == 0


# ------------------------------------------------------------------------------- default inputs

def taken(run):
    """The cache and checkpoint that a run reports to use by default."""
    assert run.code == 0, run.err
    line, = (line for line in run.out.splitlines() if line.startswith("by default: "))
    return line.partition(": ")[2]


def test_cache_and_checkpoint_are_each_taken_where_they_are(
        script, originals, cache, checkpoint, photo, here):
    sampler = ("sampler", "--images", photo, *MODELS)
    run = script(*sampler)
    assert run.code == 2 and "there is no cache here" in run.err
    assert "./download.sh --original" in run.err
    here.joinpath("original").symlink_to(originals)
    theirs, their_weights = ("original/cache.txt with original/cache.npy",
                             "original/checkpoint.ckpt")
    assert taken(script(*sampler)) == f"the cache {theirs}, the checkpoint {their_weights}"

    (here / "checkpoints").mkdir()
    shutil.copy(checkpoint, here / "checkpoints" / "best.safetensors")
    ours, our_weights = "cache.txt with cache.npy", "checkpoints/best.safetensors"
    assert taken(script(*sampler)) == f"the cache {theirs}, the checkpoint {our_weights}"
    for name in ("cache.txt", "cache.npy", "cache.npy.json"):
        shutil.copy(cache.textfile.with_name(name), here / name)
    assert taken(script(*sampler)) == f"the cache {ours}, the checkpoint {our_weights}"
    (here / "checkpoints" / "best.safetensors").unlink()
    assert taken(script(*sampler)) == f"the cache {ours}, the checkpoint {their_weights}"

    assert taken(script(*sampler, "--ckpt", "none")) == f"the cache {ours}"
    run = script(*sampler, "--textfile", "original/cache.txt", "--embfile", "original/cache.npy",
                 "--ckpt", checkpoint)
    assert run.code == 0 and "taken" not in run.out
    (here / "cache.npy").unlink()
    run = script(*sampler)
    assert run.code == 2 and "cache.txt is there without cache.npy" in run.err


def test_the_other_half_of_a_cache_lies_beside_it(script, originals, photo, here):
    here.joinpath("original").symlink_to(originals)
    (here / "words.txt").write_text("penguin\n")
    run = script("compute_cache", "--entries", "words.txt", "--textfile", "mine.txt",
                 "--clip_model", CLIP)
    assert run.code == 0 and (here / "mine.npy").exists()
    sampler = ("sampler", "--images", photo, *MODELS, "--ckpt", "none")
    both = "the cache original/cache.txt with original/cache.npy and mine.txt with mine.npy"
    assert taken(script(*sampler, "--textfile", "original/cache.txt", "mine.txt")) == both
    assert taken(script(*sampler, "--embfile", "original/cache.npy", "mine.npy")) == both
    run = script(*sampler, "--textfile", "words.txt")
    assert run.code == 2 and "there is no words.npy" in run.err and "--embfile" in run.err


def test_the_trainer_takes_the_cache_that_is_there(script, originals, world, here):
    trainer = ("trainer", "--datadir", world, *MODELS, "--topk", "8", "--tmax", "1")
    run = script(*trainer)
    assert run.code == 2 and "there is no cache here" in run.err
    here.joinpath("original").symlink_to(originals)
    assert taken(script(*trainer)) == "the cache original/cache.txt with original/cache.npy"
    assert (here / "checkpoints" / "best.safetensors").exists()


def test_a_new_cache_replaces_no_file_that_was_not_named(script, here):
    (here / "words.txt").write_text("penguin\n")
    make = ("compute_cache", "--entries", "words.txt", "--clip_model", CLIP)
    assert script(*make).code == 0
    before = {path: path.read_bytes() for path in here.glob("cache.*")}
    assert len(before) == 3
    (here / "words.txt").write_text("whale\n")
    (here / "mine.npy").write_text("mine")
    for options, existing in (((), "cache.txt"), (("--textfile", "mine.txt"), "mine.npy"),
                              (("--embfile", "cache.npy"), "cache.txt")):
        run = script(*make, *options)
        assert run.code == 2 and f"{existing} exists" in run.err
        assert not (here / "mine.txt").exists()
    assert {path: path.read_bytes() for path in before} == before
    assert (here / "mine.npy").read_text() == "mine"
    assert script("compute_cache", "--add", "whale", "--clip_model", CLIP).code == 0
    assert (here / "cache.txt").read_text() == "penguin\nwhale\n"
    assert script(*make, "--textfile", "cache.txt", "--embfile", "cache.npy").code == 0
    assert (here / "cache.txt").read_text() == "whale\n"


@pytest.mark.parametrize("change", [("--add", "penguin"), ("--remove", "a"), ("--index", "a.i")])
def test_the_downloaded_cache_is_not_changed_unasked(script, originals, here, change):
    shutil.copytree(originals, here / "original")
    before = {path: path.read_bytes() for path in here.rglob("*.*")}
    run = script("compute_cache", *change, "--clip_model", CLIP)
    assert run.code == 2 and "original/cache.txt stays" in run.err and "mine.txt" in run.err
    assert {path: path.read_bytes() for path in here.rglob("*.*")} == before
    shutil.rmtree(here / "original")
    run = script("compute_cache", *change, "--clip_model", CLIP)
    assert run.code == 2 and "cache.txt" in run.err


def test_a_stopped_run_goes_on_with_equal_weights_in_another_file(
        script, originals, world, checkpoint, here, monkeypatch):
    here.joinpath("original").symlink_to(originals)
    sampler, calls = ("sampler", "--datadir", world, *MODELS, "--batch_size", "3"), []

    def stopped_rescore(clip, features, candidates):
        calls.append(len(features))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rescore(clip, features, candidates)

    monkeypatch.setattr("model.rescore", stopped_rescore)
    assert script(*sampler).code == 130
    run = script(*sampler, "--ckpt", checkpoint, "--table", "topk")
    assert run.code == 0 and calls == [3, 3, 3, 2], run.err
