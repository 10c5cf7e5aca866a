"""Two processes of torchrun leave what one leaves: the same caches and captions to the byte, the same training to rounding."""

import csv
import os
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from conftest import BART, CLIP, ROOT


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def two_processes(name, *arguments, expect=0):
    run = subprocess.run([*TORCHRUN, ROOT / f"{name}.py", *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT)
    assert (run.returncode == 0) == (expect == 0), run.stderr
    return run


@pytest.fixture
def read(cache):
    return ("--textfile", cache.textfile, "--embfile", cache.embfile, "--clip_model", CLIP, "--lm", BART)


def test_two_processes_make_the_cache_of_one(world, cache, tmp_path):
    two_processes("compute_cache", "--datadir", world, "--textfile", tmp_path / "c.txt", "--embfile", tmp_path / "c.npy", "--clip_model", CLIP)
    assert (tmp_path / "c.txt").read_bytes() == open(cache.textfile, "rb").read()
    assert (tmp_path / "c.npy").read_bytes() == open(cache.embfile, "rb").read()


def test_two_processes_caption_as_one(script, world, read, checkpoint, tmp_path):
    how = ("--datadir", world, *read, "--ckpt", checkpoint, "--batch_size", "3")
    two_processes("sampler", *how, "--savedir", tmp_path / "two")
    assert script("sampler", *how, "--savedir", tmp_path / "one").code == 0
    for name in ("details.jsonl", "captions.json", "preds.txt", "ref0.txt", "gallery.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_two_processes_train_as_one(script, world, read, tmp_path):
    how = ("--datadir", world, *read, "--topk", "8", "--batch_size", "7", "--lrate", "1e-2", "--epochs", "2")
    two_processes("trainer", *how, "--savedir", tmp_path / "two")
    assert script("trainer", *how, "--savedir", tmp_path / "one").code == 0
    losses = []
    for name in ("one", "two"):
        with open(tmp_path / name / "loss.csv") as file:
            losses.append([float(row[column]) for row in csv.DictReader(file) for column in ("train_loss", "val_loss") if row[column]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4


def test_one_process_goes_on_where_two_were_stopped(script, world, read, tmp_path):
    how = ("--datadir", world, *read, "--topk", "8", "--batch_size", "7", "--lrate", "1e-2", "--epochs", "4", "--save_seconds", "0")
    torchrun = subprocess.Popen([*TORCHRUN, ROOT / "trainer.py", *map(str, how), "--savedir", tmp_path / "cut"],
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while not list((tmp_path / "cut").glob("state-*.pt")):
        assert torchrun.poll() is None
        time.sleep(0.05)
    torchrun.terminate()  # it stops its processes
    torchrun.wait()
    assert len(list((tmp_path / "cut").glob("state-*.pt"))) == 1
    for name in ("cut", "whole"):
        assert script("trainer", *how, "--savedir", tmp_path / name).code == 0
    cut, whole = (load_file(tmp_path / name / "last.safetensors") for name in ("cut", "whole"))
    assert max((cut[name] - whole[name]).abs().max().item() for name in cut) < 1e-4


def test_a_wrong_path_ends_all_processes_with_a_sentence(tmp_path):
    run = two_processes("compute_cache", "--datadir", tmp_path / "nowhere", "--textfile", tmp_path / "c.txt", "--embfile", tmp_path / "c.npy",
                        expect=1)
    assert f"error: there is no data folder at {tmp_path / 'nowhere'}" in run.stderr
