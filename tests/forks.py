"""Runs of the scripts in processes of their own, which can be killed. They are forked from one that
has loaded the libraries, so that a test does not wait seconds for each, and a moment chosen at
random falls into the work and not into the loading."""

import importlib
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path
from unittest import mock

from conftest import ROOT

SCRIPTS = ("compute_cache", "trainer", "sampler", "stories", "scorer")
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([
    *SCRIPTS, "antarctic.cache", "antarctic.causal_lm", "antarctic.features", "antarctic.gallery",
    "model", "nltk", "matplotlib.pyplot", "torch._dynamo"])
os.environ["OMP_NUM_THREADS"] = "1"  # of the one they are forked from, and of what torchrun starts
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"


def child(name, arguments, log, patches, environment):
    os.environ.update(environment)
    for target, value in patches.items():
        mock.patch(target, value).start()
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False, buffering=1) for stream in (1, 2))
    sys.argv = [f"{name}.py", *arguments]
    Path(f"{log}.begun").touch()
    from antarctic import runtime
    runtime.run(importlib.import_module(name).main, **({"alone": True} if name == "scorer" else {}))


def start(log, name, *arguments, patches=None, **environment):
    """Begins a run of a script whose out and err go to the file log. patches: {"script.NAME":
    value}. Returns a Process."""
    process = context.Process(
        target=child, args=(name, [str(a) for a in arguments], str(log), patches
                            or {}, environment))
    process.start()
    return process


def start_two(folder, name, *arguments, patches=None):
    """As torchrun starts two processes; their logs are folder/0 and folder/1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    return [
        start(folder / str(rank), name, *arguments, patches=patches, RANK=str(rank),
              LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        for rank in range(2)
    ]


def finish(log, name, *arguments, **how):
    """Runs a script to its end, which must be a good one. Returns the seconds."""
    loading = context.Process(target=int)  # only the first time it takes long
    loading.start()
    loading.join()
    began, process = time.monotonic(), start(log, name, *arguments, **how)
    process.join()
    assert process.exitcode == 0, Path(log).read_text()
    return time.monotonic() - began


def files(folder):
    """{name: bytes} of what a run leaves."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
