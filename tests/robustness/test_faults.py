"""Full disks, read-only folders, losses that are no numbers, clocks that jump, two runs at one
place: one sentence, nothing half-written, and the same command goes on and ends as if nothing had
happened."""

import contextlib
import errno
import os
import re
import resource
import signal
import socket
import subprocess
import time

import pytest
import torch
from conftest import BART, CLIP, ROOT
from forks import files, start, start_two
from safetensors.torch import load_file

import antarctic.checkpoints
import antarctic.files
from snowglobe import dials

SCRIPTS = ("compute_cache", "trainer", "sampler")


@pytest.fixture
def commands(world, cache, checkpoint):
    """{script: its arguments by the folder to write to}."""
    read = ("--textfile", cache.textfile, "--embfile", cache.embfile, "--clip_model", CLIP, "--lm",
            BART)
    return {
        "compute_cache": lambda out: ("--datadir", world, "--textfile", out / "c.txt", "--embfile",
                                      out / "c.npy", "--clip_model", CLIP),
        "trainer": lambda out:
        ("--datadir", world, *read, "--savedir", out, "--topk", "8", "--batch_size", "6", "--lrate",
         "1e-2", "--epochs", "2", "--save_seconds", "0"),
        "sampler": lambda out: ("--datadir", world, *read, "--savedir", out, "--ckpt", checkpoint,
                                "--batch_size", "3", "--csv"),
        "stories": lambda out: ("--caption", "a red dog", "--lm", ROOT / "snowglobe" / "weights" /
                                "gpt", "--max_tokens", "9", "--savedir", out),
    }


@pytest.fixture
def whole(script, commands, tmp_path):
    """whole(name): the files of an uninterrupted run."""
    def run(name):
        result = script(name, *commands[name](tmp_path / "whole"))
        assert result.code == 0, result.err
        return files(tmp_path / "whole")
    return run


def assert_one_sentence(run, folder, reason):
    """The last line, which nothing but the screen's bars precedes, names a file of the folder and
    the reason. Returns the name."""
    said = run.err.splitlines()[-1]
    assert run.code == 2 and said.startswith(
        "error: cannot write") and reason in said and "Traceback" not in run.err, run.err
    assert not list(folder.glob(".*.tmp"))
    return re.search(rf"cannot write {re.escape(str(folder))}/(\S+)", said)[1]


# ------------------------------------------------------------------------- full and read-only disks

@contextlib.contextmanager
def files_no_larger_than(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # Python ignores the signal of it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", SCRIPTS)
def test_whichever_file_cannot_be_written_is_named_and_the_run_goes_on_later(
        script, commands, whole, tmp_path, name):
    """The limit rises from run to run, so that one file after the other is the first that does not
    fit; in training twice, as then the image features are there."""
    target, out, named = whole(name), tmp_path / "out", []
    sizes = sorted({len(data) for data in target.values() if len(data) > 2000})
    for size in (2 if name == "trainer" else 1) * [*(size - 1 for size in sizes), sizes[-1]]:
        with files_no_larger_than(size):
            run = script(name, *commands[name](out),
                         *(["--save_seconds", 1000] if name == "trainer" else []))
        if run.code:
            named.append(assert_one_sentence(run, out, "File too large"))
        for path in out.glob("*.safetensors"):  # of an earlier epoch, or the last; but whole
            load_file(path)
    kinds = {
        "compute_cache": [r"\.c\.npy\..*\.part",
                          r"\.c\.npy\.new"], "trainer": ["features-", "last.safetensors", "state-"],
        "sampler": ["features-", "details-.*part", "gallery.html"]
    }[name]
    assert all(any(re.match(kind, file) for file in named) for kind in kinds), named
    assert script(name, *commands[name](out)).code == 0
    assert files(out) == target


@contextlib.contextmanager
def tmpfs(folder, size):
    folder.mkdir()
    if os.geteuid() or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder],
            capture_output=True).returncode:
        pytest.skip("only root may mount a small disk, and not in every container")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=
                                             True)
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_full_disk_is_named_and_once_there_is_space_the_run_goes_on(script, commands, whole,
                                                                      tmp_path, name):
    target = whole(name)
    with tmpfs(tmp_path / "disk", sum(map(len, target.values())) // 2) as remount:
        run = script(name, *commands[name](tmp_path / "disk"))
        assert_one_sentence(run, tmp_path / "disk", "No space left on device")
        remount("size=10m")
        run = script(name, *commands[name](tmp_path / "disk"))
        assert run.code == 0, run.err
        assert files(tmp_path / "disk") == target


@pytest.mark.parametrize("name", [*SCRIPTS, "stories"])
def test_a_folder_that_may_only_be_read_is_refused_before_any_work(script, commands, tmp_path,
                                                                   monkeypatch, name):
    monkeypatch.setattr("model.load", lambda *_: pytest.fail("a model was loaded"))
    with contextlib.ExitStack() as stack:
        folder = tmp_path / "disk"
        if os.geteuid():
            folder.mkdir(mode=0o555)
        else:  # whom no permission keeps out
            stack.enter_context(tmpfs(folder, "1m"))("ro")
        run = script(name, *commands[name](folder))
    assert run.code == 2 and run.err.startswith(f"error: cannot write to the folder {folder} (")


def no_space(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_two_processes(commands, tmp_path):
    both = start_two(tmp_path / "logs", "sampler", *commands["sampler"](tmp_path / "out"),
                     patches={"antarctic.files.os.fsync": no_space})
    for process in both:
        process.join(60)
    said = (tmp_path / "logs" / "0").read_text()
    assert both[0].exitcode == 2 and both[1].exitcode in (
        2, 130) and "No space left on device" in said.splitlines()[-1], said


# ------------------------------------------------------------------------------------- the training

def nan_at(step, what):
    """what(*arguments, plain) in place of a function of training, at its call number step; plain in
    the others."""
    calls = []

    def make(plain):
        def replaced(*arguments, **named):
            calls.append(0)
            result = plain(*arguments, **named)
            return what(*arguments, result) if len(calls) == step else result
        return replaced
    return make


@pytest.mark.parametrize("poisoned, said_at", [("loss", 11), ("weights", 12)])
def test_a_loss_that_becomes_nan_is_named_and_nothing_poisoned_is_kept(
        script, commands, whole, tmp_path, monkeypatch, poisoned, said_at):
    """In step 11, of the second epoch: the loss itself; or the weights, which only the next loss
    shows."""
    target, out = whole("trainer"), tmp_path / "out"
    if poisoned == "loss":
        spoilt, where = nan_at(11, lambda *_: float("nan")), "trainer.share_step"
        import trainer
        monkeypatch.setattr(where, spoilt(trainer.share_step))
    else:
        def spoil(optimizer, *_):
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0][0] = float("nan")
        monkeypatch.setattr(torch.optim.AdamW, "step", nan_at(11, spoil)(torch.optim.AdamW.step))
    run = script("trainer", *commands["trainer"](out))
    assert run.code == 2 and f"the loss became nan at step {said_at};" in run.err.splitlines()[-1]
    assert load_file(out / "best.safetensors").keys() and all(
        t.isfinite().all() for t in load_file(out / "best.safetensors").values())
    [state] = out.glob("state-*.pt")
    kept = torch.load(state, weights_only=True)
    assert kept["progress"][1] == 10 and all(t.isfinite().all() for t in kept["trained"].values())
    monkeypatch.undo()
    assert script("trainer", *commands["trainer"](out)).code == 0
    assert files(out) == target


# ---------------------------------------------------------------------------------------- the clock

@pytest.mark.parametrize("name", ["trainer", "sampler"])
def test_clocks_that_jump_change_nothing(script, world, cache, checkpoint, commands, whole,
                                         tmp_path, monkeypatch, name):
    """Stopped in the future, gone on with in the past, with inputs from the year 2100."""
    for path in [*world.rglob("*.png"), cache.textfile, cache.embfile]:
        os.utime(path, (4102444800, 4102444800))
    target, out = whole(name), tmp_path / "out"
    clock, calls = [4e9], []

    def now():
        clock[0] -= 1000
        return clock[0]

    monkeypatch.setattr(time, "time", now)
    monkeypatch.setattr(time, "time_ns", lambda: int(now() * 1e9))
    wait_for, stop_at = {
        "trainer": ("antarctic.checkpoints.save_state", 3), "sampler": ("sampler.append", 2)
    }[name]
    plain = antarctic.files.append if name == "sampler" else antarctic.checkpoints.save_state

    def stops(*arguments):
        plain(*arguments)
        calls.append(0)
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(wait_for, stops)
    assert script(name, *commands[name](out)).code == 130
    clock[0] = 1e6
    run = script(name, *commands[name](out))
    assert run.code == 0, run.err
    assert files(out) == target
    assert len(calls) == {"trainer": 2 * 8 + 2, "sampler": 3}[name]  # nothing was done twice


# ---------------------------------------------------------------------------- two runs at one place

@pytest.mark.parametrize("name", [*SCRIPTS, "stories"])
def test_a_second_run_at_one_place_is_refused_with_the_firsts_number_and_host(
        script, commands, tmp_path, name):
    lock = tmp_path / (".c.npy.lock" if name == "compute_cache" else ".lock")
    with antarctic.files.locked(lock):
        run = script(name, *commands[name](tmp_path))
        assert run.code == 2 and f"process {os.getpid()} on {socket.gethostname()}" in run.err.splitlines(
        )[-1]
    assert not list(tmp_path.iterdir())
    assert script(name, *commands[name](tmp_path)).code == 0
    assert not lock.exists()


def test_two_runs_do_not_encode_the_same_images_into_one_folder(script, commands, tmp_path):
    assert script("sampler", *commands["sampler"](tmp_path / "a"), "--features",
                  tmp_path / "f").code == 0
    for path in (tmp_path / "f").iterdir():
        path.unlink()
        with antarctic.files.locked(path.with_name(f".{path.name}.lock")):
            run = script("sampler", *commands["sampler"](tmp_path / "b"), "--features",
                         tmp_path / "f")
            assert run.code == 2 and f"process {os.getpid()}" in run.err.splitlines()[-1]


def test_two_processes_are_refused_together(commands, tmp_path):
    with antarctic.files.locked(tmp_path / ".lock"):
        both = start_two(tmp_path / "logs", "trainer", *commands["trainer"](tmp_path))
        for process in both:
            process.join(60)
        said = [(tmp_path / "logs" / str(rank)).read_text() for rank in range(2)]
        assert both[0].exitcode == 2 and both[1].exitcode in (
            2, 130) and f"process {os.getpid()}" in said[0].splitlines()[-1], said


def test_a_dead_runs_place_is_taken_over_and_its_temporary_files_go(script, commands, whole,
                                                                    tmp_path):
    out, target = tmp_path / "out", whole("sampler")
    process = start(tmp_path / "log", "sampler", *commands["sampler"](out),
                    patches={"sampler.append": waits})
    while not list(out.glob(".*.tmp")):
        assert process.exitcode is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    second = script("sampler", *commands["sampler"](out))
    assert second.code == 2 and f"process {process.pid} on" in second.err.splitlines()[-1]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (out / ".lock").exists()
    assert script("sampler", *commands["sampler"](out)).code == 0
    assert files(out) == target


def waits(path, _):
    with antarctic.files.atomic(path.with_name("preds.txt")) as file:
        file.write("half")
        file.flush()
        time.sleep(60)


# ------------------------------------------------------------------------------------- earlier runs

def test_what_an_earlier_run_left_is_not_taken_for_this_ones(script, world, commands, tmp_path):
    how = commands["sampler"](tmp_path)
    assert script("sampler", *how).code == 0
    (tmp_path / "ref-notes.txt").write_text("mine")
    assert (tmp_path / "ref4.txt").exists() and (tmp_path / "captions.csv").exists()
    others = [a for a in how if a not in ("--datadir", world, "--csv")]
    assert script("sampler", "--images", world / "near", *others).code == 0
    assert not list(tmp_path.glob("ref[0-9]*.txt")) and not (
        tmp_path / "captions.csv").exists() and (tmp_path / "ref-notes.txt").exists()
    assert len((tmp_path / "preds.txt").read_text().splitlines()) == len(
        list((world / "near").iterdir()))


def test_a_cache_of_the_dials_that_was_cut_off_between_two_steps_is_made_again(
        tmp_path, monkeypatch):
    steps = []

    def step(*arguments):
        files = dict(zip(arguments, arguments[1:]))
        if "--add_from" in files and not steps:
            steps.append("cut")
            raise KeyboardInterrupt
        for name in (files["--textfile"], files["--embfile"], f"{files['--embfile']}.json"):
            with open(name, "a") as file:
                file.write(" ".join(map(str, arguments)) + "\n")

    monkeypatch.setattr(dials, "script", step)
    for end in (".txt", ".npy", ".npy.json"):
        (tmp_path / f"added{end}").touch()
    with pytest.raises(KeyboardInterrupt):
        dials.make_caches(tmp_path, tmp_path)
    made = dials.make_caches(tmp_path, tmp_path)
    for name, path in made.items():
        assert name == "as in training" or "--add_from" in path.with_suffix(".txt").read_text()
    before = files(tmp_path)
    dials.make_caches(tmp_path, tmp_path)
    assert files(tmp_path) == before
