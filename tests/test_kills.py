"""SIGKILL at random moments costs nothing but time: in the end the files are those of an uninterrupted run, byte for byte.

KILLS=20 ./test.sh tests/test_kills.py kills each script that often; by itself the suite does it twice.
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from conftest import BART, CLIP, ROOT

KILLS = int(os.environ.get("KILLS", "2"))


def start(script, *arguments):
    return subprocess.Popen([sys.executable, ROOT / f"{script}.py", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore it


def finish(script, *arguments):
    process = start(script, *arguments)
    _, err = process.communicate()
    assert process.returncode == 0, err


def files(folder):
    """{name: bytes} of what a run leaves; anything else, such as a temporary file of a killed run, is not looked at."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def commands(world, cache, checkpoint):
    read = ("--textfile", cache.textfile, "--embfile", cache.embfile, "--clip_model", CLIP, "--lm", BART)
    return {
        "compute_cache": lambda out: ("--datadir", world, "--textfile", out / "c.txt", "--embfile", out / "c.npy", "--clip_model", CLIP,
                                      "--batch_size", "1"),
        "trainer": lambda out: ("--datadir", world, *read, "--savedir", out, "--topk", "8", "--batch_size", "2", "--epochs", "2",
                                "--lrate", "1e-2", "--save_seconds", "0.2"),
        "sampler": lambda out: ("--datadir", world, *read, "--savedir", out, "--ckpt", checkpoint, "--batch_size", "2", "--do_sample",
                                "--num_return_sequences", "50"),
    }


@pytest.mark.parametrize("name", ["compute_cache", "trainer", "sampler"])
def test_a_script_that_is_killed_again_and_again_ends_as_one_that_is_not(world, cache, checkpoint, tmp_path, name):
    command, rng = commands(world, cache, checkpoint)[name], random.Random(name)
    began = time.monotonic()
    finish(name, *command(tmp_path / "whole"))
    seconds = time.monotonic() - began
    for _ in range(KILLS):
        process = start(name, *command(tmp_path / "killed"))
        try:
            process.communicate(timeout=rng.uniform(0.3, 1) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    finish(name, *command(tmp_path / "killed"))
    assert files(tmp_path / "whole") == files(tmp_path / "killed")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_script_that_is_asked_to_stop_says_how_to_go_on(world, cache, checkpoint, tmp_path, sent):
    process = start("trainer", *commands(world, cache, checkpoint)["trainer"](tmp_path), "--epochs", "200")
    assert any("training" in line for line in iter(process.stdout.readline, ""))  # printed once the models are loaded
    time.sleep(1)
    process.send_signal(sent)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("stopped;") and "Traceback" not in err
