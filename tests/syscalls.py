"""Runs of the scripts in which one system call is spoilt: robustness/syscalls.c, from Python.

A server is started with the library, loads what the scripts need, and forks a process for each run,
which arms the library for itself. So a run takes as long as its work, and not as its loading.
"""

import ctypes
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from conftest import BART, CLIP, GPT, ROOT
from forks import LOADED, child

SOURCE = Path(__file__).with_name("robustness") / "syscalls.c"
DONE, FAIL, SHORT, BEFORE, MIDDLE, AFTER = range(6)  # as in the library
SECONDS = 60  # that a run may take

# number: from 1 on. name: of the function. bytes: those that it writes. how: one of the above.
Call = namedtuple("Call", "number name bytes how path")
# code: the errno of FAIL. names: functions whose later calls fail as well.
Spoil = namedtuple("Spoil", "number how code names", defaults=(0, DONE, 0, ()))
# code: as of subprocess. text: what the run printed. calls: see Call, in order.
Run = namedtuple("Run", "code text calls")


def build(folder, compiler):
    """Compiles the library into a folder. Returns its path."""
    library = folder / "libsyscalls.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE,
                    "-ldl"], check=True)
    return library


class Server:
    """Runs scripts one after the other. log, calls: files that each run overwrites."""

    def __init__(self, process, folder):
        self.process, self.log, self.calls = process, folder / "log", folder / "calls"

    def run(self, name, arguments, watched, side="w", spoil=None, patches=None):
        """Runs a script. watched: the folder whose calls are counted. side: "w" or "r". spoil: a
        Spoil. patches: {"module.NAME": value}. Returns a Run."""
        job = {"name": name, "arguments": [str(argument) for argument in arguments],
               "watched": str(watched), "side": side, "spoil": spoil or Spoil(),
               "patches": patches or {}, "log": str(self.log), "calls": str(self.calls)}
        for path in (self.log, self.calls):
            path.unlink(missing_ok=True)
        print(json.dumps(job), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        lines = self.calls.read_text(errors="surrogateescape").splitlines()
        fields = (line.split("\t", 4) for line in lines)
        calls = [Call(int(n), name, int(size), int(how), path)
                 for n, name, size, how, path in fields]
        return Run(code, self.log.read_text(errors="replace"), calls)


@contextmanager
def serving(library, folder):
    """Starts a Server, which has the library."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import syscalls; syscalls.serve()"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, cwd=folder,
        env=os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1",
                          "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
                          "PATH": ""})  # no Java, which takes seconds to start
    yield Server(process, folder)
    process.stdin.close()
    process.wait()
    process.stdout.close()


def serve():
    """The body of the server: a job a line comes in, an exit code a line goes out."""
    for module in LOADED:
        importlib.import_module(module)
    warm_up()
    from antarctic import gallery
    gallery.write_gallery = partial(gallery.write_gallery, most_inline=1)  # else images lie in it
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            run_job(json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def warm_up():
    """Loads the models once, which fills the caches of the libraries: half of a run's time."""
    import torch

    from antarctic.causal_lm import load_lm
    from antarctic.index import load_faiss
    from model import Captioner, Clip
    load_faiss()
    re._MAXCACHE = 1 << 20  # transformers compiles a thousand patterns for each model
    Clip(CLIP, torch.device("cpu"), torch.float32)
    Captioner(BART, torch.device("cpu"), torch.float32)
    load_lm(GPT, (), torch.device("cpu"), torch.float32)


def run_job(job):
    """Runs a script in a process of its own, and ends that."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.alarm(SECONDS)  # it ends a run that hangs
    calls = os.open(job["calls"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    spoil = Spoil(*job["spoil"])
    code = 0
    try:
        arm = ctypes.CDLL(None).arm
        arm(os.fsencode(job["watched"]), ord(job["side"]), ctypes.c_long(spoil.number), spoil.how,
            spoil.code, f",{','.join(spoil.names)},".encode(), calls)
        child(job["name"], job["arguments"], job["log"], job["patches"], {})
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:  # as Python does at a script's end
        traceback.print_exc()
        code = 1
    arm(b"", ord("w"), ctypes.c_long(0), 0, 0, b"", -1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
