"""Runs of the scripts in separate processes, which a test can kill.

They are forked from a process that has loaded the libraries. So a test does not wait seconds for
each, and a kill at a random moment falls into the work and not into the loading.
"""

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
LOADED = [*SCRIPTS, "antarctic.cache", "antarctic.causal_lm", "antarctic.features",
          "antarctic.gallery", "model", "nltk", "matplotlib.pyplot", "torch._dynamo"]
context.set_forkserver_preload(LOADED)
os.environ["OMP_NUM_THREADS"] = "1"  # in the server they are forked from, and under torchrun
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"


def child(name, arguments, log, patches, environment):
    """The body of a process: the script's main(), with a log in place of its output."""
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
    runtime.run(importlib.import_module(name).main, alone=name == "scorer")


def start(log, name, *arguments, patches=None, **environment):
    """Starts a script whose output and errors go to the file log. Returns a Process.

    patches: {"script.NAME": value}. The file log.begun exists once main() is about to run.
    """
    arguments = [str(argument) for argument in arguments]
    process = context.Process(target=child,
                              args=(name, arguments, str(log), patches or {}, environment))
    process.start()
    return process


def start_two(folder, name, *arguments, patches=None):
    """Starts a script as torchrun starts two processes. Their logs are folder/0 and folder/1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(folder / rank, name, *arguments, patches=patches, RANK=rank, LOCAL_RANK=rank,
                  **shared) for rank in ("0", "1")]


def finish(log, name, *arguments, patches=None, **environment):
    """Runs a script, which must succeed. Returns the seconds it takes."""
    loading = context.Process(target=int)  # the first process waits until the server has loaded
    loading.start()
    loading.join()
    began = time.monotonic()
    process = start(log, name, *arguments, patches=patches, **environment)
    process.join()
    assert process.exitcode == 0, Path(log).read_text()
    return time.monotonic() - began


def files(folder):
    """{name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
