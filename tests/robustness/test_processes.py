"""Two processes write the files of one.

Caches, captions and stories are equal to the byte, trained parameters up to rounding. Where one
process dies the other ends, and any number of processes can resume.
"""

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from conftest import ROOT, commands
from forks import files, finish, start, start_two
from safetensors.torch import load_file

import antarctic.files
from antarctic import checkpoints
from antarctic.datasets import read_coco, read_split
from antarctic.features import shares_of

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(*arguments, cwd=None):
    return subprocess.Popen([*TORCHRUN, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, cwd=cwd)


def two_processes(folder, name, *arguments, expect=(0, 0)):
    """Runs a script as two processes, which must exit with these codes. Returns their logs."""
    processes = start_two(folder, name, *arguments)
    for process in processes:
        process.join()
    logs = [(folder / str(rank)).read_text() for rank in range(2)]
    assert tuple(process.exitcode for process in processes) == expect, logs
    return logs


def largest_difference(path, other):
    """Between the tensors of two safetensors files with the same names."""
    one, two = load_file(path), load_file(other)
    return max((one[name] - two[name]).abs().max().item() for name in one)


def test_two_processes_make_the_cache_of_one(world, cache, tmp_path):
    run = torchrun("--standalone", "--nproc_per_node", 2, ROOT / "compute_cache.py",
                   *commands(world, None, None)["compute_cache"](tmp_path))
    output, _ = run.communicate()
    assert run.returncode == 0 and output.count("wrote 379 entries") == 1, output
    assert (tmp_path / "c.txt").read_bytes() == cache.textfile.read_bytes()
    assert (tmp_path / "c.npy").read_bytes() == cache.embfile.read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_two_processes_caption_as_one(script, world, cache, checkpoint, tmp_path):
    sample = commands(world, cache, checkpoint, sampler={"batch_size": 3})["sampler"]
    first, second = two_processes(tmp_path / "logs", "sampler", *sample(tmp_path / "two"))
    assert "bart@" in first and not second
    assert script("sampler", *sample(tmp_path / "one")).code == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_two_processes_tell_the_stories_of_one(script, tmp_path):
    options = {"caption": ["a red dog", "a whale", "a red dog", "two trains"],
               "num_return_sequences": 3, "batch_size": 2, "max_tokens": 20}
    write = commands(None, None, None, stories=options)["stories"]
    two_processes(tmp_path / "logs", "stories", *write(tmp_path / "two"))
    assert script("stories", *write(tmp_path / "one")).code == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_of_two_processes_one_scores_and_says_so(tmp_path):
    for name in ("preds.txt", "ref0.txt"):
        (tmp_path / name).write_text("a red dog\na whale\n")
    first, second = two_processes(tmp_path / "logs", "scorer", "--preds", tmp_path / "preds.txt",
                                  "--refs", tmp_path / "ref0.txt")
    assert "this script uses one" in first and "scores:" in first and not second


def losses(path):
    """All training and validation losses of a loss.csv, in its order."""
    with open(path) as file:
        return [float(row[column]) for row in csv.DictReader(file)
                for column in ("train_loss", "val_loss") if row[column]]


def test_two_processes_train_as_one(script, world, cache, tmp_path):
    train = commands(world, cache, None, trainer={"batch_size": 7})["trainer"]
    first, second = two_processes(tmp_path / "logs", "trainer", *train(tmp_path / "two"))
    assert "training 3,456 of" in first and not second
    assert script("trainer", *train(tmp_path / "one")).code == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert losses(one / "loss.csv") == pytest.approx(losses(two / "loss.csv"), abs=1e-5)
    assert largest_difference(one / "last.safetensors", two / "last.safetensors") < 1e-4


append, save_state = antarctic.files.append, checkpoints.save_state


def slow_append(path, data):
    append(path, data)
    time.sleep(0.5)


def slow_save_state(*state):
    save_state(*state)
    time.sleep(0.5)


SLOW = {"antarctic.entries.CHUNK": 64, "antarctic.entries.append": slow_append,
        "antarctic.records.append": slow_append, "stories.append": slow_append,
        "antarctic.checkpoints.save_state": slow_save_state}


@pytest.mark.parametrize("name", ["compute_cache", "trainer", "sampler", "stories"])
def test_where_one_process_is_killed_the_other_ends_and_any_number_goes_on(
        world, cache, checkpoint, tmp_path, name):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    saved = {"compute_cache": ".c.npy.*.part", "trainer": "state-*.pt",
             "sampler": "details-*.part", "stories": "stories-*.part"}[name]
    command = commands(
        world, cache, checkpoint,
        trainer={"batch_size": 7, "epochs": 4, "save_seconds": 0},
        sampler={"batch_size": 1},
        stories={"caption": ["a red dog", "a whale", "two trains"] * 4, "batch_size": 1,
                 "max_tokens": 20})[name]

    def save_times():
        return sum(path.stat().st_mtime_ns for path in cut.glob(saved))

    def wait_for_save(process, after=0):
        while save_times() <= after:
            assert process.exitcode is None
            time.sleep(0.01)
        return save_times()

    first, second = start_two(tmp_path / "logs", name, *command(cut), patches=SLOW)
    before = wait_for_save(first)
    second.kill()
    began = time.monotonic()
    first.join()
    log = (tmp_path / "logs" / "0").read_text()
    assert first.exitcode in (2, 130) and time.monotonic() - began < 60, log
    assert "Traceback" not in log and "rerun the same command to resume" in log.splitlines()[-1]
    alone = start(tmp_path / "log", name, *command(cut), patches=SLOW)
    wait_for_save(alone, before)
    alone.kill()
    alone.join()
    two_processes(tmp_path / "logs", name, *command(cut))
    finish(tmp_path / "log", name, *command(whole))
    if name == "trainer":
        assert largest_difference(cut / "last.safetensors", whole / "last.safetensors") < 1e-4
        assert files(cut).keys() == files(whole).keys()
    else:
        assert files(cut) == files(whole)


def write_shards(world, folder, shards):
    """The images of train2017 with their captions in so many tar files."""
    pictures = read_coco(world, "train2017")
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for picture in pictures[shard::shards]:
                tar.add(picture.path, f"{picture.path.stem}.png")
                info, text = tarfile.TarInfo(f"{picture.path.stem}.txt"), picture.captions[0]
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
    return {picture.path.stem: picture.captions[0] for picture in pictures}


def test_two_processes_that_are_killed_caption_each_image_of_tar_shards_once(
        world, cache, checkpoint, tmp_path):
    captions = write_shards(world, tmp_path / "shards", 4)
    command = commands(world, cache, checkpoint, sampler={
        "datadir": tmp_path / "shards", "split": "all", "batch_size": 2})["sampler"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for pattern in ("features-*.part", "details-*.part"):
        processes = start_two(tmp_path / "logs", "sampler", *command(cut), patches=SLOW)
        while not any(path.stat().st_size for path in cut.glob(pattern)):
            assert processes[0].exitcode is None, (tmp_path / "logs" / "0").read_text()
            time.sleep(0.01)
        for process in processes:
            process.kill()
            process.join()
    two_processes(tmp_path / "logs", "sampler", *command(cut))
    finish(tmp_path / "log", "sampler", *command(whole))
    assert files(cut) == files(whole)
    records = [json.loads(line) for line in (cut / "details.jsonl").open()]
    assert sorted(record["image_id"] for record in records) == sorted(captions)
    references = dict(zip([record["image_id"] for record in records],
                          (cut / "ref0.txt").read_text().splitlines()))
    assert references == captions


def test_a_tar_file_is_read_by_one_process_unless_there_are_fewer(world, tmp_path):
    write_shards(world, tmp_path / "shards", 4)
    pictures = read_split(tmp_path / "shards", "all")
    rows = list(range(len(pictures)))
    for missing in (rows, rows[5:30], rows[40:]):
        shares = shares_of(missing, pictures, 5, 2)
        assert sorted(row for share in shares for part in share for row in part) == missing
        for share in shares:
            assert [row for part in share for row in part] == sorted(
                row for part in share for row in part)
            assert all(len(part) <= 5 for part in share)
        tars = [{pictures[row].path.parent for part in share for row in part} for share in shares]
        assert not tars[0] & tars[1] or len(tars[0] | tars[1]) < 2
    assert [len(share) for share in shares_of(rows, pictures, 12, 8)] == [1] * 4 + [0] * 4
    assert all(shares_of(rows, pictures, 2, 5))


def long_work(*_):
    print("working", flush=True)
    time.sleep(120)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_hears_of_the_others_death_while_it_works_by_itself(world, tmp_path, dead):
    command = commands(world, None, None)["compute_cache"](tmp_path)
    processes = start_two(tmp_path / "logs", "compute_cache", *command,
                          patches={"compute_cache.mine": long_work})
    logs = [tmp_path / "logs" / str(rank) for rank in range(2)]
    while not all(log.exists() and "working" in log.read_text() for log in logs):
        assert processes[0].exitcode is None and processes[1].exitcode is None
        time.sleep(0.02)
    alive = 1 - dead
    processes[dead].kill()
    processes[alive].join(60)
    lines = logs[alive].read_text().splitlines()
    assert processes[alive].exitcode == 130, lines
    assert f"process {alive} of 2 stops, as" in lines[1], lines
    assert lines[-1].startswith("stopped;"), lines


def steps_done(state):
    return torch.load(state, weights_only=True)["progress"][1]


def kill_with_children(pid):
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True,
                              text=True).stdout.split()
    for each in [pid, *map(int, children)]:
        os.kill(each, signal.SIGKILL)


def test_of_two_hosts_one_goes_on_alone_where_the_other_died(world, cache, tmp_path):
    """Two launchers share the images, the cache and the models alone. Results are in the folder of
    the first."""
    options = {"batch_size": 7, "save_seconds": 0, "epochs": 100}
    train = commands(world, cache, None, trainer=options)["trainer"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        cluster = ("--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1",
                   "--master_port", free.getsockname()[1])
    hosts = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        hosts.append(torchrun(*cluster, "--node_rank", rank, ROOT / "trainer.py", *train("out"),
                              cwd=tmp_path / str(rank)))
    while not list((tmp_path / "0" / "out").glob("state-*.pt")):
        assert hosts[0].poll() is None, hosts[0].communicate()
        time.sleep(0.05)
    kill_with_children(hosts[1].pid)
    began = time.monotonic()
    output, _ = hosts[0].communicate()
    assert hosts[0].returncode != 0 and time.monotonic() - began < 60
    assert "rerun the same command to resume" in output
    hosts[1].communicate()
    [state] = (tmp_path / "0" / "out").glob("state-*.pt")
    assert not list((tmp_path / "1").iterdir())
    step = steps_done(state)
    resumed = start(tmp_path / "log", "trainer", *train(tmp_path / "0" / "out"))
    while steps_done(state) == step:
        assert resumed.exitcode is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    resumed.kill()
    assert steps_done(state) > step


LAUNCHED = """
import ctypes, os, sys, time
sys.path.insert(0, {root!r})
from antarctic import distributed, runtime
phase, rank = sys.argv[1], os.environ["RANK"]

def wait(*_):
    open(os.path.join({folder!r}, rank), "w").write(str(os.getpid()))
    time.sleep(120)

def wait_in_c():
    open(os.path.join({folder!r}, rank), "w").write(str(os.getpid()))
    mutex = ctypes.create_string_buffer(64)
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

if phase == "join" and rank == "1":
    distributed.join = wait
elif phase == "join":
    open(os.path.join({folder!r}, rank), "w").write(str(os.getpid()))
elif phase == "start":
    open(os.path.join({folder!r}, rank), "w").write(str(os.getpid()))
    while os.getppid() == int(sys.argv[2]):
        time.sleep(0.01)
runtime.run(wait_in_c if phase == "c" else wait, alone=phase == "alone")
"""
PHASES = {
    "start": "before the script runs", "join": "while one waits for the other",
    "work": "while they work", "c": "in a call that does not return",
    "alone": "where one works alone",
}


@pytest.mark.parametrize("phase", PHASES, ids=PHASES.values())
def test_where_torchrun_is_killed_its_processes_end(tmp_path, phase):
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED.format(root=str(ROOT), folder=str(tmp_path)))
    shell = f'exec "$0" -m torch.distributed.run --nproc_per_node 2 {script} {phase} $$'
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(["sh", "-c", shell, sys.executable], stdout=log, stderr=log)
    number = 1 if phase == "alone" else 2

    def pids():
        return [int(path.read_text() or 0) for path in map(tmp_path.joinpath, "01")
                if path.exists()]

    while len(pids()) < number or 0 in pids():
        assert run.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    run.kill()
    run.wait()
    began = time.monotonic()
    while any(map(is_alive, pids())):
        assert time.monotonic() - began < 60, (tmp_path / "log").read_text()
        time.sleep(0.05)
    output = (tmp_path / "log").read_text()
    assert "as torchrun has ended" in output and "Traceback" not in output
    assert "stopped; finished files are whole, rerun the same command to resume" in output


ORPHAN = """import os, sys, time
sys.path.insert(0, {root!r})
from antarctic import runtime
while os.getppid() == int(sys.argv[1]):
    time.sleep(0.01)
if os.getppid() != 1:
    sys.exit("adopted by another one")
runtime.run(lambda: time.sleep(120))
"""


def test_where_a_stranger_has_taken_the_port_of_a_dead_torchrun_its_processes_end(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN.format(root=str(ROOT)))
    with socket.create_server(("127.0.0.1", 0)) as stranger, open(tmp_path / "log", "w") as log:
        environment = os.environ | {
            "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(stranger.getsockname()[1])}
        shell = f'"$0" {tmp_path / "orphan.py"} $$ & echo $! > {tmp_path / "pid"}'
        subprocess.run(["sh", "-c", shell, sys.executable], env=environment, stdout=log, stderr=log)
        pid, began = int((tmp_path / "pid").read_text()), time.monotonic()
        while is_alive(pid):
            assert time.monotonic() - began < 60, (tmp_path / "log").read_text()
            time.sleep(0.05)
    output = (tmp_path / "log").read_text()
    if "adopted by another one" in output:
        pytest.skip("here the first process does not adopt orphans")
    assert "stops, as torchrun has ended" in output and "Traceback" not in output


def is_alive(pid):
    """Whether a process runs. Who inherits it may let it be a zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip()[:1] not in ("", "Z")


def test_a_wrong_path_ends_all_processes_with_a_sentence(tmp_path):
    run = torchrun("--standalone", "--nproc_per_node", 2, ROOT / "compute_cache.py",
                   *commands(tmp_path / "nowhere", None, None)["compute_cache"](tmp_path))
    output, _ = run.communicate()
    assert run.returncode != 0
    assert f"error: there is no data folder at {tmp_path / 'nowhere'}" in output
