"""Two processes leave what one leaves: the same caches, captions and stories to the byte, the same
training to rounding. Where one dies the other ends, and any number of them goes on from there."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import BART, CLIP, ROOT
from forks import files, finish, start, start_two
from safetensors.torch import load_file

import antarctic.files
from antarctic import checkpoints

GPT = ROOT / "snowglobe" / "weights" / "gpt"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(*arguments, cwd=None):
    return subprocess.Popen([*TORCHRUN, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, cwd=cwd)


def two_processes(folder, name, *arguments, expect=(0, 0)):
    """Runs a script as two processes. Returns what each wrote to out and err."""
    both = start_two(folder, name, *arguments)
    for process in both:
        process.join()
    said = [(folder / str(rank)).read_text() for rank in range(2)]
    assert tuple(process.exitcode for process in both) == expect, said
    return said


@pytest.fixture
def read(cache):
    return ("--textfile", cache.textfile, "--embfile", cache.embfile, "--clip_model", CLIP, "--lm",
            BART)


def test_two_processes_make_the_cache_of_one(world, cache, tmp_path):
    run = torchrun("--standalone", "--nproc_per_node", 2, ROOT / "compute_cache.py", "--datadir",
                   world, "--textfile", tmp_path / "c.txt", "--embfile", tmp_path / "c.npy",
                   "--clip_model", CLIP)
    said, _ = run.communicate()
    assert run.returncode == 0 and said.count("wrote 379 entries") == 1, said
    assert (tmp_path / "c.txt").read_bytes() == open(cache.textfile, "rb").read()
    assert (tmp_path / "c.npy").read_bytes() == open(cache.embfile, "rb").read()
    assert len(list(tmp_path.iterdir())) == 3


def test_two_processes_caption_as_one(script, world, read, checkpoint, tmp_path):
    how = ("--datadir", world, *read, "--ckpt", checkpoint, "--batch_size", "3")
    first, second = two_processes(tmp_path / "logs", "sampler", *how, "--savedir", tmp_path / "two")
    assert "bart@" in first and not second
    assert script("sampler", *how, "--savedir", tmp_path / "one").code == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_two_processes_tell_the_stories_of_one(script, tmp_path):
    how = ("--caption", "a red dog", "a whale", "a red dog", "two trains", "--lm", GPT,
           "--num_return_sequences", "3", "--batch_size", "2", "--max_tokens", "20")
    two_processes(tmp_path / "logs", "stories", *how, "--savedir", tmp_path / "two")
    assert script("stories", *how, "--savedir", tmp_path / "one").code == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_of_two_processes_one_scores_and_says_so(tmp_path):
    for name in ("preds.txt", "ref0.txt"):
        (tmp_path / name).write_text("a red dog\na whale\n")
    first, second = two_processes(tmp_path / "logs", "scorer", "--preds", tmp_path / "preds.txt",
                                  "--refs", tmp_path / "ref0.txt")
    assert "this script uses one" in first and "scores:" in first and not second


def test_two_processes_train_as_one(script, world, read, tmp_path):
    how = ("--datadir", world, *read, "--topk", "8", "--batch_size", "7", "--lrate", "1e-2",
           "--epochs", "2")
    first, second = two_processes(tmp_path / "logs", "trainer", *how, "--savedir", tmp_path / "two")
    assert "training 3,456 of" in first and not second
    assert script("trainer", *how, "--savedir", tmp_path / "one").code == 0
    losses = []
    for name in ("one", "two"):
        with open(tmp_path / name / "loss.csv") as file:
            losses.append([
                float(row[column]) for row in csv.DictReader(file)
                for column in ("train_loss", "val_loss") if row[column]
            ])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4


append, save_state = antarctic.files.append, checkpoints.save_state


def slow_append(path, data):
    append(path, data)
    time.sleep(0.5)


def slow_save_state(*state):
    save_state(*state)
    time.sleep(0.5)


SLOW = {"antarctic.features.CHUNK": 64, "antarctic.features.append": slow_append,
        "sampler.append": slow_append, "stories.append": slow_append,
        "antarctic.checkpoints.save_state": slow_save_state}


@pytest.mark.parametrize("name", ["compute_cache", "trainer", "sampler", "stories"])
def test_where_one_process_is_killed_the_other_ends_and_any_number_goes_on(
        script, world, read, checkpoint, tmp_path, name):
    cut, kept = tmp_path / "cut", {
        "compute_cache": ".c.npy.*.part", "trainer": "state-*.pt", "sampler": "details-*.part",
        "stories": "stories-*.part"
    }[name]
    command = {
        "compute_cache": lambda out: ("--datadir", world, "--textfile", out / "c.txt", "--embfile",
                                      out / "c.npy", "--clip_model", CLIP),
        "trainer": lambda out:
        ("--datadir", world, *read, "--savedir", out, "--topk", "8", "--batch_size", "7", "--lrate",
         "1e-2", "--epochs", "4", "--save_seconds", "0"),
        "sampler": lambda out:
        ("--datadir", world, *read, "--savedir", out, "--ckpt", checkpoint, "--batch_size", "1"),
        "stories": lambda out: ("--caption", *["a red dog", "a whale", "two trains"] * 4, "--lm",
                                GPT, "--savedir", out, "--batch_size", "1", "--max_tokens", "20"),
    }[name]

    def until_more_is_kept(process, than=0):
        while sum(path.stat().st_mtime_ns for path in cut.glob(kept)) <= than:
            assert process.exitcode is None
            time.sleep(0.01)
        return sum(path.stat().st_mtime_ns for path in cut.glob(kept))

    first, second = start_two(tmp_path / "logs", name, *command(cut), patches=SLOW)
    before = until_more_is_kept(first)
    second.kill()
    began = time.monotonic()
    first.join()
    said = (tmp_path / "logs" / "0").read_text()
    assert first.exitcode in (2, 130) and time.monotonic() - began < 60, said
    assert "Traceback" not in said and "rerun the same command to resume" in said.splitlines()[-1]
    alone = start(tmp_path / "log", name, *command(cut), patches=SLOW)
    until_more_is_kept(alone, before)
    alone.kill()
    alone.join()
    two_processes(tmp_path / "logs", name, *command(cut))
    finish(tmp_path / "log", name, *command(tmp_path / "whole"))
    if name == "trainer":
        one, other = (load_file(folder / "last.safetensors")
                      for folder in (cut, tmp_path / "whole"))
        assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4
        assert files(cut).keys() == files(tmp_path / "whole").keys()
    else:
        assert files(cut) == files(tmp_path / "whole")


def long_work(*_):
    print("working", flush=True)
    time.sleep(120)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_hears_of_the_others_death_while_it_works_by_itself(world, tmp_path, dead):
    both = start_two(tmp_path / "logs", "compute_cache", "--datadir", world, "--textfile",
                     tmp_path / "c.txt", "--embfile", tmp_path / "c.npy", "--clip_model", CLIP,
                     patches={"compute_cache.mine": long_work})
    logs = [tmp_path / "logs" / str(rank) for rank in range(2)]
    while not all(log.exists() and "working" in log.read_text() for log in logs):
        assert both[0].exitcode is None and both[1].exitcode is None
        time.sleep(0.02)
    both[dead].kill()
    both[1 - dead].join(60)
    said = logs[1 - dead].read_text().splitlines()
    assert both[1 - dead].exitcode == 130 and f"process {1 - dead} of 2 stops, as" in said[
        1] and said[-1].startswith("stopped;"), said


def steps_done(state):
    return torch.load(state, weights_only=True)["progress"][1]


def test_of_two_hosts_one_goes_on_alone_where_the_other_died(script, world, read, tmp_path):
    """Two launchers with nothing in common but the images, the cache and the models; results are on
    the first one's host."""
    how = ("--datadir", world, *read, "--topk", "8", "--batch_size", "7", "--lrate", "1e-2",
           "--save_seconds", "0", "--savedir", "out")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = ("--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1",
                 "--master_port", free.getsockname()[1])
    hosts = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        hosts.append(
            torchrun(*where, "--node_rank", rank, ROOT / "trainer.py", *how, "--epochs", 100,
                     cwd=tmp_path / str(rank)))
    while not list((tmp_path / "0" / "out").glob("state-*.pt")):
        assert hosts[0].poll() is None, hosts[0].communicate()
        time.sleep(0.05)
    workers = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(hosts[1].pid)], capture_output=True,
        text=True).stdout.split()
    for pid in [hosts[1].pid, *map(int, workers)]:
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    said, _ = hosts[0].communicate()
    assert hosts[0].returncode != 0 and time.monotonic(
    ) - began < 60 and "rerun the same command to resume" in said
    hosts[1].communicate()
    [state] = (tmp_path / "0" / "out").glob("state-*.pt")
    assert not list((tmp_path / "1" / "out").iterdir())
    step = steps_done(state)
    resumed = start(tmp_path / "log", "trainer", *how[:-1], tmp_path / "0" / "out", "--epochs", 100)
    while steps_done(state) == step:
        assert resumed.exitcode is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    resumed.kill()
    assert steps_done(state) > step


def test_a_wrong_path_ends_all_processes_with_a_sentence(tmp_path):
    run = torchrun("--standalone", "--nproc_per_node", 2, ROOT / "compute_cache.py", "--datadir",
                   tmp_path / "nowhere", "--textfile", tmp_path / "c.txt", "--embfile",
                   tmp_path / "c.npy")
    said, _ = run.communicate()
    assert run.returncode != 0 and f"error: there is no data folder at {tmp_path / 'nowhere'}" in said
