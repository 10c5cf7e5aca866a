"""Full disks, read-only folders, losses of NaN, clocks that jump, two runs in one folder.

A run ends with one sentence and leaves no half-written file. The same command then resumes, and its
files are those of an uninterrupted run.
"""

import contextlib
import errno
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import commands as commands_of
from forks import files, start, start_two
from safetensors.torch import load_file

import antarctic.checkpoints
import antarctic.files
import antarctic.locks
import trainer
from snowglobe import dials

SCRIPTS = ("compute_cache", "trainer", "sampler")


def arguments_of(world, cache, checkpoint):
    """{script: its arguments by output folder}, see conftest.commands."""
    return commands_of(world, cache, checkpoint, trainer={"batch_size": 6, "save_seconds": 0},
                       sampler={"batch_size": 3, "csv": True}, stories={"max_tokens": 9})


@pytest.fixture
def commands(world, cache, checkpoint):
    return arguments_of(world, cache, checkpoint)


@pytest.fixture
def whole(script, commands, tmp_path):
    """whole(name) gives the files of an uninterrupted run."""
    def run(name):
        result = script(name, *commands[name](tmp_path / "whole"))
        assert result.code == 0, result.err
        return files(tmp_path / "whole")
    return run


def last_line(run):
    return run.err.splitlines()[-1]


def assert_one_sentence(run, folder, reason):
    """The last line, which only progress bars precede, names a file of the folder and the reason.
    Returns the file's name."""
    line = last_line(run)
    assert run.code == 2 and line.startswith("error: cannot write") and reason in line, run.err
    assert "Traceback" not in run.err, run.err
    assert not list(folder.glob(".*.tmp"))
    return re.search(rf"cannot write {re.escape(str(folder))}/(\S+)", line)[1]


def logs_after(processes, folder, seconds=60):
    """Waits for processes of start_two. Returns their logs."""
    for process in processes:
        process.join(seconds)
    return [(folder / str(rank)).read_text() for rank in range(2)]


# ------------------------------------------------------------------------- full and read-only disks

@contextlib.contextmanager
def files_no_larger_than(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", SCRIPTS)
def test_whichever_file_cannot_be_written_is_named_and_the_run_goes_on_later(
        script, commands, whole, tmp_path, name):
    """The limit rises from run to run, so that a different file is the first that does not fit. For
    training it rises twice: in the second round the image features exist."""
    target, out, named = whole(name), tmp_path / "out", []
    sizes = {len(data) for data in target.values() if len(data) > 2000}
    if name == "sampler":
        sizes.add(len(target["details.jsonl"]) // 2)  # whose lines are in the part before
    sizes = sorted(sizes)
    limits = [*(size - 1 for size in sizes), sizes[-1]]
    options = {"save_seconds": 1000} if name == "trainer" else {}
    for limit in limits * (2 if name == "trainer" else 1):
        with files_no_larger_than(limit):
            run = script(name, *commands[name](out, **options))
        if run.code:
            named.append(assert_one_sentence(run, out, "File too large"))
        for path in out.glob("*.safetensors"):  # of an earlier epoch or the last one, but whole
            load_file(path)
    patterns = {
        "compute_cache": [r"\.c\.npy\..*\.part", r"\.c\.npy\.new"],
        "trainer": ["features-", "last.safetensors", "state-"],
        "sampler": ["features-", "details-.*part", "gallery.html"]}[name]
    for pattern in patterns:
        assert any(re.match(pattern, file) for file in named), named
    assert script(name, *commands[name](out)).code == 0
    assert files(out) == target


@contextlib.contextmanager
def tmpfs(folder, size):
    """A small disk, mounted at folder. Yields a function that remounts it with other options."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk, and not in every container")

    def remount(options):
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)

    try:
        yield remount
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_full_disk_is_named_and_once_there_is_space_the_run_goes_on(
        script, commands, whole, tmp_path, name):
    target, disk = whole(name), tmp_path / "disk"
    with tmpfs(disk, sum(map(len, target.values())) // 2) as remount:
        run = script(name, *commands[name](disk))
        assert_one_sentence(run, disk, "No space left on device")
        remount("size=10m")
        run = script(name, *commands[name](disk))
        assert run.code == 0, run.err
        assert files(disk) == target


@pytest.mark.parametrize("name", [*SCRIPTS, "stories"])
def test_a_folder_that_may_only_be_read_is_refused_before_any_work(
        script, commands, tmp_path, monkeypatch, name):
    monkeypatch.setattr("antarctic.model_files.ModelFiles.load",
                        lambda *_, **__: pytest.fail("a model was loaded"))
    with contextlib.ExitStack() as stack:
        folder = tmp_path / "disk"
        if os.geteuid():
            folder.mkdir(mode=0o555)
        else:  # root may write whatever the permissions are
            stack.enter_context(tmpfs(folder, "1m"))("ro")
        run = script(name, *commands[name](folder))
    assert run.code == 2 and run.err.startswith(f"error: cannot write to the folder {folder} (")


@contextlib.contextmanager
def ext4(image, folder):
    """A file system in an image, mounted at folder. Its journal waits for ten minutes, unless a
    program asks for its writes."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-o", "loop,commit=600", image, folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount an image, and not in every container")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(not shutil.which("mkfs.ext4"), reason="there is no mkfs.ext4")
@pytest.mark.parametrize("name", [*SCRIPTS, "stories", "sidecars"])
def test_what_a_finished_run_has_written_survives_a_power_cut(
        script, world, commands, tmp_path, name):
    """The disk is copied at the moment of the end, as a power cut leaves it. What the system still
    holds in its memory is not in it."""
    image, disk = tmp_path / "image", tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    with ext4(image, disk):
        if name == "sidecars":
            shutil.copytree(world / "near", disk / "photos")
            os.sync()
            arguments = commands["sampler"](disk / "a" / "out", datadir=None, sidecar=True,
                                            images=disk / "photos", metadata=True,
                                            shards=disk / "shards", gallery=600)
        else:
            arguments = commands[name](disk / "a" / "out")
        run = script("sampler" if name == "sidecars" else name, *arguments)
        shutil.copy(image, tmp_path / "copy")
        assert run.code == 0, run.err
        written = tree(disk)
    with ext4(tmp_path / "copy", disk):
        survived = tree(disk)
    # Locks, and what a finished run no longer needs, may come back; the next run removes them.
    assert {path: survived.get(path) for path in written} == written


def tree(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes()
            for path in folder.rglob("*")}


def no_space(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_two_processes(commands, tmp_path):
    processes = start_two(tmp_path / "logs", "sampler", *commands["sampler"](tmp_path / "out"),
                          patches={"antarctic.files.os.fsync": no_space})
    log, _ = logs_after(processes, tmp_path / "logs")
    assert processes[0].exitcode == 2 and processes[1].exitcode in (2, 130), log
    assert "No space left on device" in log.splitlines()[-1], log


# ------------------------------------------------------------------------------------- the training

def spoil_call(number, function, spoil):
    """A function whose call of this number returns spoil(*arguments, result)."""
    calls = []

    def spoilt(*arguments, **options):
        calls.append(0)
        result = function(*arguments, **options)
        return spoil(*arguments, result) if len(calls) == number else result
    return spoilt


@pytest.mark.parametrize("poisoned, reported_at", [("loss", 11), ("weights", 12)])
def test_a_loss_that_becomes_nan_is_named_and_nothing_poisoned_is_kept(
        script, commands, whole, tmp_path, monkeypatch, poisoned, reported_at):
    """NaN comes in step 11, in the second epoch: in the loss itself, or in the weights, so that the
    next loss is the first to have it."""
    target, out = whole("trainer"), tmp_path / "out"
    if poisoned == "loss":
        step = spoil_call(11, trainer.share_step, lambda *_: float("nan"))
        monkeypatch.setattr("trainer.share_step", step)
    else:
        def spoil(optimizer, *_):
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0][0] = float("nan")
        monkeypatch.setattr(torch.optim.AdamW, "step",
                            spoil_call(11, torch.optim.AdamW.step, spoil))
    run = script("trainer", *commands["trainer"](out))
    assert run.code == 2 and f"the loss became nan at step {reported_at};" in last_line(run)
    best = load_file(out / "best.safetensors")
    assert best and all(tensor.isfinite().all() for tensor in best.values())
    [path] = out.glob("state-*.pt")
    state = torch.load(path, weights_only=True)
    assert state["progress"][1] == 10
    assert all(tensor.isfinite().all() for tensor in state["trained"].values())
    monkeypatch.undo()
    assert script("trainer", *commands["trainer"](out)).code == 0
    assert files(out) == target


# ---------------------------------------------------------------------------------------- the clock

@pytest.mark.parametrize("name", ["trainer", "sampler"])
def test_clocks_that_jump_change_nothing(
        script, world, cache, checkpoint, tmp_path, monkeypatch, name):
    """A run is stopped in the future and resumed in the past. Its inputs are of the year 2100."""
    # Copies: a page that other tests share holds the cache open, and notices a change.
    copies = [shutil.copytree(folder, tmp_path / new) for folder, new in (
        (world, "world"), (cache.textfile.parent, "cache"))]
    for path in (path for folder in copies for path in folder.rglob("*")):
        os.utime(path, (4102444800, 4102444800))
    mine = SimpleNamespace(textfile=copies[1] / cache.textfile.name,
                           embfile=copies[1] / cache.embfile.name)
    commands, out = arguments_of(copies[0], mine, checkpoint), tmp_path / "out"
    assert script(name, *commands[name](tmp_path / "whole")).code == 0
    target = files(tmp_path / "whole")
    clock, calls = [4e9], []

    def now():
        clock[0] -= 1000
        return clock[0]

    monkeypatch.setattr(time, "time", now)
    monkeypatch.setattr(time, "time_ns", lambda: int(now() * 1e9))
    if name == "trainer":
        patched = "antarctic.checkpoints.save_state"
        save, stop_at = antarctic.checkpoints.save_state, 3
    else:
        patched = "antarctic.records.append"
        save, stop_at = antarctic.files.append, 2

    def save_and_stop(*arguments):
        save(*arguments)
        calls.append(0)
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(patched, save_and_stop)
    assert script(name, *commands[name](out)).code == 130
    clock[0] = 1e6
    run = script(name, *commands[name](out))
    assert run.code == 0, run.err
    assert files(out) == target
    assert len(calls) == {"trainer": 2 * 8 + 2, "sampler": 3}[name]  # no step ran twice


# -------------------------------------------------------------------------- two runs in one folder

@pytest.mark.parametrize("name", [*SCRIPTS, "stories"])
def test_a_second_run_at_one_place_is_refused_with_the_firsts_number_and_host(
        script, commands, tmp_path, name):
    lock = tmp_path / (".c.npy.lock" if name == "compute_cache" else ".lock")
    with antarctic.locks.locked(lock):
        run = script(name, *commands[name](tmp_path))
        assert run.code == 2
        assert f"process {os.getpid()} on {socket.gethostname()}" in last_line(run)
    assert not list(tmp_path.iterdir())
    assert script(name, *commands[name](tmp_path)).code == 0
    assert not lock.exists()


def test_two_runs_do_not_encode_the_same_images_into_one_folder(script, commands, tmp_path,
                                                                monkeypatch):
    sample, features, locks = commands["sampler"], tmp_path / "features", []
    locked = antarctic.locks.locked

    def noted(path):
        locks.append(path)
        return locked(path)
    monkeypatch.setattr("antarctic.features.locked", noted)
    assert script("sampler", *sample(tmp_path / "a", features=features)).code == 0
    [lock], [path] = locks, features.iterdir()
    with locked(lock):  # nothing is to be encoded
        assert script("sampler", *sample(tmp_path / "b", features=features)).code == 0
    path.unlink()
    with locked(lock):
        run = script("sampler", *sample(tmp_path / "b", features=features))
        assert run.code == 2 and f"process {os.getpid()}" in last_line(run)


def test_two_processes_are_refused_together(commands, tmp_path):
    with antarctic.locks.locked(tmp_path / ".lock"):
        processes = start_two(tmp_path / "logs", "trainer", *commands["trainer"](tmp_path))
        logs = logs_after(processes, tmp_path / "logs")
        assert processes[0].exitcode == 2 and processes[1].exitcode in (2, 130), logs
        assert f"process {os.getpid()}" in logs[0].splitlines()[-1], logs


def half_write_and_wait(path, _):
    with antarctic.files.atomic(path.with_name("preds.txt")) as file:
        file.write("half")
        file.flush()
        time.sleep(60)


def test_a_dead_runs_place_is_taken_over_and_its_temporary_files_go(
        script, commands, whole, tmp_path):
    out, target = tmp_path / "out", whole("sampler")
    process = start(tmp_path / "log", "sampler", *commands["sampler"](out),
                    patches={"antarctic.records.append": half_write_and_wait})
    while not list(out.glob(".*.tmp")):
        assert process.exitcode is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    second = script("sampler", *commands["sampler"](out))
    assert second.code == 2 and f"process {process.pid} on" in last_line(second)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (out / ".lock").exists()
    assert script("sampler", *commands["sampler"](out)).code == 0
    assert files(out) == target


# ------------------------------------------------------------------------------------- earlier runs

def test_what_an_earlier_run_left_is_not_taken_for_this_ones(script, world, commands, tmp_path):
    sample, near = commands["sampler"], world / "near"
    assert script("sampler", *sample(tmp_path)).code == 0
    (tmp_path / "ref-notes.txt").write_text("mine")
    assert (tmp_path / "ref4.txt").exists() and (tmp_path / "captions.csv").exists()
    assert script("sampler", *sample(tmp_path, datadir=None, csv=None, images=near)).code == 0
    assert not list(tmp_path.glob("ref[0-9]*.txt")) and not (tmp_path / "captions.csv").exists()
    assert (tmp_path / "ref-notes.txt").exists()
    lines = (tmp_path / "preds.txt").read_text().splitlines()
    assert len(lines) == len(list(near.iterdir()))


def test_a_cache_of_the_dials_that_was_cut_off_between_two_steps_is_made_again(
        tmp_path, monkeypatch):
    stops = []

    def step(*arguments):
        values = dict(zip(arguments, arguments[1:]))  # {flag: its value}
        if "--add_from" in values and not stops:
            stops.append(0)
            raise KeyboardInterrupt
        for path in (values["--textfile"], values["--embfile"], f"{values['--embfile']}.json"):
            with open(path, "a") as file:
                file.write(" ".join(map(str, arguments)) + "\n")

    monkeypatch.setattr(dials, "script", step)
    for end in (".txt", ".npy", ".npy.json"):
        (tmp_path / f"added{end}").touch()
    with pytest.raises(KeyboardInterrupt):
        dials.make_caches(tmp_path, tmp_path)
    caches = dials.make_caches(tmp_path, tmp_path)
    for name, path in caches.items():
        assert name == "as in training" or "--add_from" in path.with_suffix(".txt").read_text()
    before = files(tmp_path)
    dials.make_caches(tmp_path, tmp_path)
    assert files(tmp_path) == before
