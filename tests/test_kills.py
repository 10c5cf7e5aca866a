"""A stop at a random moment costs nothing but time: after SIGKILLs the files are in the end those of an uninterrupted run, byte
for byte, and SIGINT and SIGTERM end a run within five seconds, with a sentence.

KILLS=20 ./test.sh tests/test_kills.py stops each script that often; by itself the suite does it a few times.
"""

import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import BART, CLIP, ROOT
from forks import files, finish, start

KILLS = int(os.environ.get("KILLS", "2"))
SMALL = {"antarctic.features.CHUNK": 32}  # so that a run keeps more than one piece


def commands(world, cache, checkpoint):
    read = ("--textfile", cache.textfile, "--embfile", cache.embfile, "--clip_model", CLIP, "--lm", BART)
    return {
        "compute_cache": lambda out: ("--datadir", world, "--textfile", out / "c.txt", "--embfile", out / "c.npy", "--clip_model", CLIP,
                                      "--batch_size", "1"),
        "trainer": lambda out: ("--datadir", world, *read, "--savedir", out, "--topk", "8", "--batch_size", "2", "--epochs", "2",
                                "--lrate", "1e-2", "--save_seconds", "0.2"),
        "sampler": lambda out: ("--datadir", world, *read, "--savedir", out, "--ckpt", checkpoint, "--batch_size", "2", "--do_sample",
                                "--num_return_sequences", "30"),
        "stories": lambda out: ("--caption", *["a red dog", "a whale", "two trains"] * 8, "--lm", ROOT / "snowglobe" / "weights" / "gpt",
                                "--savedir", out, "--batch_size", "2"),
    }


@pytest.fixture(scope="module", params=["compute_cache", "trainer", "sampler", "stories"])
def run(request, world, cache, checkpoint, tmp_path_factory):
    """A script's name, its arguments by the folder to write to, and the seconds and files of an uninterrupted run."""
    name, folder = request.param, tmp_path_factory.mktemp("whole")
    command = commands(world, cache, checkpoint)[name]
    seconds = finish(folder / "log", name, *command(folder / "out"), patches=SMALL)
    return SimpleNamespace(name=name, command=command, seconds=seconds, files=files(folder / "out"))


def test_a_script_that_is_killed_again_and_again_ends_as_one_that_is_not(run, tmp_path):
    rng, kills = random.Random(run.name), 0
    while kills < KILLS:
        process = start(tmp_path / "log", run.name, *run.command(tmp_path / "killed"), patches=SMALL)
        process.join(rng.uniform(0.02, 1) * run.seconds)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL  # else it had ended, and the next one begins anew
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
    finish(tmp_path / "log", run.name, *run.command(tmp_path / "killed"), patches=SMALL)
    assert files(tmp_path / "killed") == run.files


def test_a_script_that_is_asked_to_stop_stops_within_seconds_and_says_how_to_go_on(run, tmp_path):
    rng, stops = random.Random(run.name), 0
    for turn, sent in enumerate([signal.SIGINT, signal.SIGTERM] * -(-KILLS // 2)):
        log = tmp_path / f"log{turn}"
        process = start(log, run.name, *run.command(tmp_path / "stopped"), patches=SMALL)
        while not Path(f"{log}.begun").exists():
            time.sleep(0.005)
        process.join(rng.uniform(0, 0.9) * run.seconds)
        began = time.monotonic()
        if process.exitcode is None:
            os.kill(process.pid, sent)
        process.join()
        if process.exitcode == 0:  # it was at its end
            continue
        assert process.exitcode == 130 and time.monotonic() - began < 5, log.read_text()
        assert log.read_text().splitlines()[-1].startswith("stopped;") and "Traceback" not in log.read_text()
        assert not list((tmp_path / "stopped").glob(".*.tmp"))
        stops += 1
    assert stops
    finish(tmp_path / "log", run.name, *run.command(tmp_path / "stopped"), patches=SMALL)
    assert files(tmp_path / "stopped") == run.files


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name, library", [
    ("compute_cache", "torch"), ("compute_cache", "transformers"), ("stories", "torch"),
    ("stories", "transformers"), ("scorer", "nltk")])
def test_a_script_that_is_asked_to_stop_while_a_library_loads_stops_with_the_sentence(
        world, tmp_path, name, library, sent):
    """A script imports a library once its arguments are checked; here that takes a minute."""
    (tmp_path / f"{library}.py").write_text("print('loading', flush=True)\n"
                                            "import time\ntime.sleep(60)\n")
    (tmp_path / "a.txt").write_text("a red dog\n")
    arguments = {
        "compute_cache": ("--datadir", world, "--textfile", tmp_path / "c.txt", "--embfile",
                          tmp_path / "c.npy"),
        "stories": ("--captions", tmp_path / "a.txt", "--savedir", tmp_path, "--lm",
                    ROOT / "snowglobe" / "weights" / "gpt"),
        "scorer": ("--preds", tmp_path / "a.txt", "--refs", tmp_path / "a.txt", "--tokenizer",
                   "treebank"),
    }[name]
    command = [sys.executable, ROOT / f"{name}.py", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(tmp_path)},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # which background jobs ignore
    assert process.stdout.readline() == "loading\n"
    began = time.monotonic()
    process.send_signal(sent)
    _, err = process.communicate()
    assert process.returncode == 130 and time.monotonic() - began < 5
    assert err.splitlines()[-1].startswith("stopped;") and "Traceback" not in err
    assert not list(tmp_path.glob(".*"))


def deaf(*_):
    """Waits in a library's call for ever, in which Python hears of no signal."""
    print("deaf", flush=True)
    mutex = ctypes.create_string_buffer(64)
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def deletes(*_):
    """As deaf, but in the deletion of an object: there Python swallows what is raised, and goes on."""
    class Object:
        def __del__(self):
            print("deaf", flush=True)
            time.sleep(60)
    Object()
    time.sleep(60)


@pytest.mark.parametrize("where, sent", [(deaf, signal.SIGINT), (deaf, signal.SIGTERM), (deletes, signal.SIGINT), (deletes, signal.SIGTERM)])
def test_a_script_that_is_asked_to_stop_where_python_does_not_hear_it_stops_too(world, cache, tmp_path, where, sent):
    log, command = tmp_path / "log", commands(world, cache, None)["compute_cache"](tmp_path)
    process = start(log, "compute_cache", *command, patches={"compute_cache.mine": where})
    while not log.exists() or "deaf" not in log.read_text():
        assert process.exitcode is None, log.read_text()
        time.sleep(0.02)
    began = time.monotonic()
    os.kill(process.pid, sent)
    process.join(20)
    assert process.exitcode == 130 and time.monotonic() - began < 5
    assert log.read_text().splitlines()[-1].startswith("stopped;") and "Traceback" not in log.read_text()
