"""What tests share: scripts run in this process, their arguments, and one small world with its
cache and checkpoint."""

import os

# Set before transformers is imported, here or in a process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import importlib
import io
import signal
import subprocess
import sys
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLIP, BART, GPT = (str(ROOT / "snowglobe" / "weights" / name) for name in ("clip", "bart", "gpt"))
TRAIN, VAL = 48, 8  # images of the world: in train2017, and in each other split
sys.path.insert(0, str(ROOT))


def run_script(name, *arguments):
    """Runs a script's main() as its command line does. Returns its exit code (code) and what it
    wrote to standard output (out) and standard error (err)."""
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


def flags(options):
    """A dictionary of options as arguments of a command line.

    True gives the flag alone, a list or tuple several values, and None leaves the option out.
    """
    arguments = []
    for option, value in options.items():
        if value is None:
            continue
        arguments.append(f"--{option}")
        if isinstance(value, (list, tuple)):
            arguments += value
        elif value is not True:
            arguments.append(value)
    return arguments


def commands(world, cache, checkpoint, **changes):
    """{script: arguments}: the command lines of the scripts in the small world.

    arguments(out, option=value, ...) gives the arguments of a run that writes to the folder out.
    Options replace the defaults or are added to them, see flags(). changes: {script: {option:
    value}}, options of all runs. cache and checkpoint may be None where no run reads them.
    """
    models = {"clip_model": CLIP, "lm": BART}

    def read():
        return {"datadir": world, "textfile": cache.textfile, "embfile": cache.embfile, **models}

    defaults = {
        "compute_cache": lambda out: {"datadir": world, "textfile": out / "c.txt",
                                      "embfile": out / "c.npy", "clip_model": CLIP},
        "trainer": lambda out: {**read(), "savedir": out, "topk": 8, "lrate": "1e-2", "epochs": 2},
        "sampler": lambda out: {**read(), "savedir": out, "ckpt": checkpoint},
        "stories": lambda out: {"caption": ["a red dog"], "lm": GPT, "savedir": out},
    }

    def arguments(name, out, **options):
        return flags(defaults[name](out) | changes.get(name, {}) | options)

    return {name: partial(arguments, name) for name in defaults}


def pytest_collection_modifyitems(items):
    """All tests of tests/robustness are slow."""
    for item in items:
        if item.path.parent.name == "robustness":
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def script():
    """script(name, *arguments) is run_script."""
    import torch
    # The models are small: more threads gain nothing, and lose much where the cores are busy.
    torch.set_num_threads(1)
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
    """The paths of the cache of the world's captions: textfile and embfile."""
    folder = tmp_path_factory.mktemp("cache")
    paths = SimpleNamespace(textfile=folder / "cache.txt", embfile=folder / "cache.npy")
    succeed("compute_cache", *commands(world, None, None)["compute_cache"](folder, **vars(paths)))
    return paths


@pytest.fixture(scope="session")
def checkpoint(script, world, cache, tmp_path_factory):
    """best.safetensors of one epoch on the world."""
    folder = tmp_path_factory.mktemp("checkpoints")
    train = commands(world, cache, None)["trainer"]
    succeed("trainer", *train(folder, topk=24, batch_size=16, lrate="2e-2", epochs=1))
    return folder / "best.safetensors"


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with others (120 pictures), Tom and Flora (5 each, of what is in no world, three
    alone and two beside known things) and new, of Tom alone."""
    from snowglobe import scenes, strangers, taught
    folder = tmp_path_factory.mktemp("photos")
    for name in ("others", "Tom", "Flora", "new"):
        (folder / name).mkdir()
    for i in range(120):
        scene, _ = scenes.split_scene("train2017", 7, i)
        scenes.draw_scene(scene).save(folder / "others" / f"{i}.png")
    with strangers.moved_in():
        for name in ("Tom", "Flora"):
            for i in range(5):
                taught.draw(name, i < 3, i, True).save(folder / name / f"{i}.png")
        for i in range(4):
            taught.draw("Tom", True, f"new {i}", True).save(folder / "new" / f"{i}.png")
    return folder


@contextlib.contextmanager
def running_page(*arguments, **environment):
    """Starts app.py as a user does. Yields its process and its address. In the end it is stopped as
    by Ctrl-C."""
    process = subprocess.Popen([sys.executable, ROOT / "app.py", *map(str, arguments)],
                               stdout=subprocess.PIPE, text=True, cwd=ROOT,
                               env=os.environ | {"OMP_NUM_THREADS": "1", **environment})
    lines = iter(process.stdout.readline, "")
    line = next((line for line in lines if line.startswith("the page is at")), "")
    assert line, "app.py ended"
    try:
        yield process, line.split()[4].rstrip(";")
    finally:  # also where a test fails
        process.send_signal(signal.SIGINT)
        process.wait(20)
        process.stdout.close()


@pytest.fixture(scope="session")
def served(cache, world, photos, tmp_path_factory):
    """app.py as a user starts it: address, folder (its own temporary files), saved (where "Save"
    writes) and penguin (a drawing of one). BART as pretrained repeats the table, so captions hold
    the nearest entries. Photos of other things are photos/others."""
    folder = tmp_path_factory.mktemp("page")
    arguments = flags({
        "port": "0", "clip_model": CLIP, "lm": BART, "ckpt": "none", "textfile": cache.textfile,
        "embfile": cache.embfile, "examples": world / "near", "savedir": folder / "saved",
        "others": photos / "others", "story_lm": GPT, "device": "cpu", "max_mb": "1"})
    with running_page(*arguments, TMPDIR=str(folder), GRADIO_SHARE="True",
                      GRADIO_ALLOWED_PATHS="/") as (process, address):
        yield SimpleNamespace(address=address, folder=folder, process=process,
                              saved=folder / "saved", penguin=world / "out" / "000030000004.png")
    assert not list(folder.glob("antarctic-page-*"))  # uploads are gone with the page
