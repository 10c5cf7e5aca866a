"""A stop at a random moment costs only time.

After SIGKILLs and resumed runs the files are those of an uninterrupted run, byte for byte. SIGINT
and SIGTERM end a run within five seconds, with one sentence.

KILLS=20 ./test.sh tests/robustness/test_kills.py stops each script that often; the default is 2.
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
from conftest import ROOT, commands, flags
from forks import files, finish, start

KILLS = int(os.environ.get("KILLS", "2"))
SMALL = {"antarctic.entries.CHUNK": 32}  # so that a run saves its vectors in several pieces


def small_commands(world, cache, checkpoint):
    """As commands(), with batches so small that a run takes many steps."""
    return commands(
        world, cache, checkpoint,
        compute_cache={"batch_size": 1},
        trainer={"batch_size": 2, "save_seconds": 0.2},
        sampler={"batch_size": 2, "do_sample": True, "num_return_sequences": 30},
        stories={"batch_size": 2, "caption": ["a red dog", "a whale", "two trains"] * 8})


def assert_stopped(text):
    """A script's output ends with the sentence of a stopped run."""
    assert text.splitlines()[-1].startswith("stopped;")
    assert "Traceback" not in text


@pytest.fixture(scope="module", params=["compute_cache", "trainer", "sampler", "stories"])
def run(request, world, cache, checkpoint, tmp_path_factory):
    """A script's name, its arguments by output folder (command), and the seconds and files of an
    uninterrupted run."""
    name, folder = request.param, tmp_path_factory.mktemp("whole")
    command = small_commands(world, cache, checkpoint)[name]
    seconds = finish(folder / "log", name, *command(folder / "out"), patches=SMALL)
    return SimpleNamespace(name=name, command=command, seconds=seconds, files=files(folder / "out"))


def test_a_script_that_is_killed_again_and_again_ends_as_one_that_is_not(run, tmp_path):
    rng, kills = random.Random(run.name), 0
    command = run.command(tmp_path / "killed")
    while kills < KILLS:
        process = start(tmp_path / "log", run.name, *command, patches=SMALL)
        process.join(rng.uniform(0.02, 1) * run.seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
        if process.exitcode:  # otherwise it was done, and the next run starts anew
            kills += 1
    finish(tmp_path / "log", run.name, *command, patches=SMALL)
    assert files(tmp_path / "killed") == run.files


def test_a_script_that_is_asked_to_stop_stops_within_seconds_and_says_how_to_go_on(run, tmp_path):
    rng, stops = random.Random(run.name), 0
    command = run.command(tmp_path / "stopped")
    for turn, sent in enumerate([signal.SIGINT, signal.SIGTERM] * -(-KILLS // 2)):
        log = tmp_path / f"log{turn}"
        process = start(log, run.name, *command, patches=SMALL)
        while not Path(f"{log}.begun").exists():
            time.sleep(0.005)
        process.join(rng.uniform(0, 0.9) * run.seconds)
        began = time.monotonic()
        if process.exitcode is None:
            os.kill(process.pid, sent)
        process.join()
        if process.exitcode == 0:  # the run was done before the signal
            continue
        assert process.exitcode == 130 and time.monotonic() - began < 5, log.read_text()
        assert_stopped(log.read_text())
        assert not list((tmp_path / "stopped").glob(".*.tmp"))
        stops += 1
    assert stops
    finish(tmp_path / "log", run.name, *command, patches=SMALL)
    assert files(tmp_path / "stopped") == run.files


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name, library", [
    ("compute_cache", "torch"), ("compute_cache", "transformers"), ("trainer", "torch"),
    ("trainer", "transformers"), ("sampler", "torch"), ("sampler", "transformers"),
    ("stories", "torch"), ("stories", "transformers"), ("scorer", "nltk")])
def test_a_script_that_is_asked_to_stop_while_a_library_loads_stops_with_the_sentence(
        world, cache, checkpoint, tmp_path, name, library, sent):
    """A script imports a library after it has checked its arguments; here that takes a minute."""
    (tmp_path / f"{library}.py").write_text(
        "print('loading', flush=True)\nimport time\ntime.sleep(60)\n")
    captions = tmp_path / "a.txt"
    captions.write_text("a red dog\n")
    if name == "scorer":
        arguments = flags({"preds": captions, "refs": captions, "tokenizer": "treebank"})
    else:
        arguments = commands(
            world, cache, checkpoint, compute_cache={"clip_model": None},
            stories={"caption": None, "captions": captions})[name](tmp_path)
    process = subprocess.Popen(
        [sys.executable, ROOT / f"{name}.py", *map(str, arguments)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        # Jobs in the background of a shell ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout.readline() == "loading\n"
    began = time.monotonic()
    process.send_signal(sent)
    _, err = process.communicate()
    assert process.returncode == 130 and time.monotonic() - began < 5
    assert_stopped(err)
    assert not list(tmp_path.glob(".*"))


def block_in_c(*_):
    """Waits for ever in a call of a C library, during which Python runs no signal handler."""
    print("waiting", flush=True)
    mutex = ctypes.create_string_buffer(64)
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def block_in_del(*_):
    """Waits in the deletion of an object, where Python swallows exceptions and continues."""
    class Object:
        def __del__(self):
            print("waiting", flush=True)
            time.sleep(60)
    Object()
    time.sleep(60)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("block", [block_in_c, block_in_del])
def test_a_script_that_is_asked_to_stop_where_python_does_not_hear_it_stops_too(
        world, tmp_path, block, sent):
    log = tmp_path / "log"
    command = small_commands(world, None, None)["compute_cache"](tmp_path)
    process = start(log, "compute_cache", *command, patches={"compute_cache.mine": block})
    while not log.exists() or "waiting" not in log.read_text():
        assert process.exitcode is None, log.read_text()
        time.sleep(0.02)
    began = time.monotonic()
    os.kill(process.pid, sent)
    process.join(20)
    assert process.exitcode == 130 and time.monotonic() - began < 5
    assert_stopped(log.read_text())
