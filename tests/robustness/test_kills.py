"""A stop at a random moment costs only time.

After SIGKILLs and resumed runs the files are those of an uninterrupted run, byte for byte. SIGINT
and SIGTERM end a run within five seconds, with one sentence.

KILLS=20 ./test.sh tests/robustness/test_kills.py stops each script that often; the default is 2.
"""

import ctypes
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CLIP, GPT, ROOT, commands, flags
from forks import files, finish, start

KILLS = int(os.environ.get("KILLS", "2"))
SMALL = {"antarctic.entries.CHUNK": 32}  # so that a run saves its vectors in several pieces


def small_commands(world, cache, checkpoint):
    """As commands(), with batches so small that a run takes many steps."""
    return commands(
        world, cache, checkpoint,
        compute_cache={"batch_size": 1},
        trainer={"batch_size": 2, "save_seconds": 0.2},
        sampler={"batch_size": 2, "do_sample": True, "num_return_sequences": 30, "where": True},
        stories={"batch_size": 2, "caption": ["a red dog", "a whale", "two trains"] * 8})


def assert_stopped(text):
    """A script's output ends with the sentence of a stopped run."""
    assert text.splitlines()[-1].startswith("stopped;")
    assert "Traceback" not in text


ANSWERS = """#!/bin/sh
case "$*" in
    *PTBTokenizer*) exec tr A-Z a-z;;
    *meteor*) while read line; do sleep 0.02; echo 0.5; done; yes 0.5 | head -48;;
esac
"""  # a Java that gives METEOR's answers, slowly


def scorer_command(world, folder):
    """The arguments of scorer.py by output folder, and an environment in which Java is ANSWERS."""
    captions = json.loads((world / "annotations" / "captions_train2017.json").read_text())
    results = [{"image_id": image["id"], "caption": "a red dog"} for image in captions["images"]]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "bin").mkdir()
    (folder / "bin" / "java").write_text(ANSWERS)
    (folder / "bin" / "java").chmod(0o755)
    options = {"results": folder / "results.json", "datadir": world, "split": "train2017",
               "clip_model": CLIP, "batch_size": 2}
    return (lambda out: flags({**options, "savedir": out}),
            {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"})


def teaching_command(cache, photos, out):
    """The arguments of compute_cache.py --teach, for a copy of the cache in out."""
    for path in (cache.textfile, cache.embfile, Path(f"{cache.embfile}.json")):
        out.mkdir(exist_ok=True)
        if not (out / path.name).exists():
            shutil.copy(path, out)
    return ["--teach", "Tom", photos / "Tom", "--as", "a cat", *flags({
        "clip_model": CLIP, "others": photos / "others", "textfile": out / cache.textfile.name,
        "embfile": out / cache.embfile.name})]


@pytest.fixture(scope="module", params=["compute_cache", "compute_cache --teach", "trainer",
                                        "sampler", "stories", "scorer"])
def run(request, world, cache, checkpoint, photos, tmp_path_factory):
    """A script's name, its arguments by output folder (command), how to start it (options), and
    the seconds and files of an uninterrupted run."""
    folder, environment = tmp_path_factory.mktemp("whole"), {}
    name, _, teaches = request.param.partition(" ")
    if name == "scorer":
        command, environment = scorer_command(world, folder)
    elif teaches:
        command = partial(teaching_command, cache, photos)
    else:
        command = small_commands(world, cache, checkpoint)[name]
    options = {"patches": SMALL, **environment}
    seconds = finish(folder / "log", name, *command(folder / "out"), **options)
    return SimpleNamespace(name=name, command=command, options=options, seconds=seconds,
                           files=files(folder / "out"))


def test_a_script_that_is_killed_again_and_again_ends_as_one_that_is_not(run, tmp_path):
    rng, kills = random.Random(run.name), 0
    command = run.command(tmp_path / "killed")
    while kills < KILLS:
        process = start(tmp_path / "log", run.name, *command, **run.options)
        process.join(rng.uniform(0.02, 1) * run.seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
        if process.exitcode:  # otherwise it was done, and the next run starts anew
            kills += 1
    finish(tmp_path / "log", run.name, *command, **run.options)
    assert files(tmp_path / "killed") == run.files


def test_a_script_that_is_asked_to_stop_stops_within_seconds_and_says_how_to_go_on(run, tmp_path):
    rng, stops = random.Random(run.name), 0
    command = run.command(tmp_path / "stopped")
    for turn, sent in enumerate([signal.SIGINT, signal.SIGTERM] * -(-KILLS // 2)):
        log = tmp_path / f"log{turn}"
        process = start(log, run.name, *command, **run.options)
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
    finish(tmp_path / "log", run.name, *command, **run.options)
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


# ------------------------------------------------------------------------------- scores, by Java

SILENT = """#!/bin/sh
[ "$1" = {hangs} ] || exit 0
echo $$ > {folder}/pid
{body}
"""
JAVAS = {  # {where it hangs: its first argument, what it does then}
    "METEOR reads and gives no answer": ("-jar", "while read line; do :; done"),
    "METEOR reads nothing": ("-jar", "exec sleep 60"),
    "the tokenizer does not end": ("-cp", "exec sleep 60"),
    "java -version does not end": ("-version", "exec sleep 60"),
}


def meteors(pid):
    """The process ids of a process's children that are METEOR."""
    found = subprocess.run(["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)],
                           capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "meteor-" in line]


def state_of(pid):
    """What ps calls a process's state, "" where there is none."""
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True,
                          text=True).stdout.strip()


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def start_scorer(folder, text, environment, tokenizer):
    (folder / "a.txt").write_text(text)
    (folder / "tmp").mkdir()
    return subprocess.Popen(
        [sys.executable, ROOT / "scorer.py", *map(str, flags({
            "preds": folder / "a.txt", "refs": [folder / "a.txt"] * 10, "savedir": folder / "out",
            "tokenizer": tokenizer}))],
        stderr=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(folder / "tmp"), **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def start_with(java, folder):
    """A scorer whose Java, of JAVAS, hangs now; that one's process id is in the file pid."""
    (folder / "bin").mkdir()
    (folder / "bin" / "java").write_text(
        SILENT.format(hangs=java[0], body=java[1], folder=folder))
    (folder / "bin" / "java").chmod(0o755)
    tokenizer = "treebank" if java[0] == "-jar" else "auto"
    # More than a pipe holds, where nobody reads it.
    process = start_scorer(folder, "a red dog " * (1 if "read" in java[1] else 900) + "\n",
                           {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}, tokenizer)
    pid = folder / "pid"
    wait_until(lambda: pid.exists() and pid.read_text().strip(), process)
    time.sleep(0.2)
    return process


def assert_gone(pid, seconds):
    """A process ends. Whoever inherits it may let it be a zombie."""
    began = time.monotonic()
    while state_of(pid)[:1] not in ("", "Z"):
        assert time.monotonic() - began < seconds
        time.sleep(0.05)


def assert_scorer_has_stopped(folder, process, sent, java):
    """The sentence within 5 seconds, unless by SIGKILL; no Java, no file."""
    began = time.monotonic()
    process.send_signal(sent)
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - began < 5
    if sent != signal.SIGKILL:
        assert process.returncode == 130
        assert_stopped(err)
        assert not state_of(java)  # no zombie either
    assert not [*(folder / "tmp").iterdir(), *(folder / "out").glob("*")]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("java", JAVAS.values(), ids=JAVAS)
def test_a_scorer_that_is_asked_to_stop_while_java_hangs_stops_with_the_sentence(
        tmp_path, java, sent):
    process = start_with(java, tmp_path)
    assert_scorer_has_stopped(tmp_path, process, sent, int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Java reads its input's end first")
@pytest.mark.parametrize("java", JAVAS.values(), ids=JAVAS)
def test_java_ends_with_a_scorer_that_is_killed(tmp_path, java):
    """Also where it does not read that its input has ended."""
    process = start_with(java, tmp_path)
    assert_scorer_has_stopped(tmp_path, process, signal.SIGKILL, None)
    assert_gone(int((tmp_path / "pid").read_text()), 5)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_scorer_that_is_stopped_in_meteor_leaves_no_java(tmp_path, sent):
    if not shutil.which("java"):
        pytest.skip("there is no Java here")
    process = start_scorer(tmp_path, "a red dog\n" * 1000, {}, "treebank")
    wait_until(lambda: meteors(process.pid), process)
    [java] = meteors(process.pid)
    time.sleep(random.Random(sent).uniform(0, 3))
    assert_scorer_has_stopped(tmp_path, process, sent, java)
    # Elsewhere until METEOR has loaded, and reads that there is nothing to read.
    assert_gone(java, 5 if sys.platform == "linux" else 120)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_stories_that_are_printed_stop_with_the_sentence_and_begin_anew(tmp_path, sent):
    command = flags({"caption": ["a red dog", "a whale"] * 8, "lm": GPT, "batch_size": "2"})
    seconds = finish(tmp_path / "whole", "stories", *command)
    (tmp_path / "log").touch()
    process = start(tmp_path / "log", "stories", *command)
    while "Once" not in (tmp_path / "log").read_text():
        assert process.exitcode is None
        time.sleep(0.005)
    process.join(random.Random(sent).uniform(0, seconds / 4))
    began = time.monotonic()
    os.kill(process.pid, sent)
    process.join()
    printed = (tmp_path / "log").read_text()
    assert process.exitcode == 130 and time.monotonic() - began < 5, printed
    assert_stopped(printed)
    told, whole = (re.findall(r"^Once.*\n", text, re.M)
                   for text in (printed, (tmp_path / "whole").read_text()))
    assert told and told == whole[:len(told)]


STOPPED_BADLY = {
    "waits for ever at exit":
        "    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    work()\n",
    "raises an error of its own":
        "    try:\n"
        "        work()\n"
        "    except KeyboardInterrupt:\n"
        "        raise ImportError('initialization failed')\n"}


@pytest.mark.parametrize("library", STOPPED_BADLY)
def test_a_library_does_not_hold_a_run_that_was_stopped(tmp_path, library):
    (tmp_path / "late.py").write_text(
        "import sys, threading, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from antarctic import runtime\n"
        "def work():\n"
        "    print('working', flush=True)\n"
        "    time.sleep(60)\n"
        "def main():\n"
        f"{STOPPED_BADLY[library]}"
        "runtime.run(main)\n")
    process = subprocess.Popen([sys.executable, tmp_path / "late.py"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 130 and time.monotonic() - began < 5
    assert_stopped(err)
