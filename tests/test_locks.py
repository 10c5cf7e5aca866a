"""One run at a time writes to a place, also where the file system has no locks."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

from antarctic import leftovers, locks
from antarctic.errors import InputError

fcntl = pytest.importorskip("fcntl")


def fails(number):
    def flock(*_):
        raise OSError(number, os.strerror(number))
    return flock


NO_LOCKS = {"ENOLCK": fails(errno.ENOLCK), "EOPNOTSUPP": fails(errno.EOPNOTSUPP),
            "ENOSYS": fails(errno.ENOSYS), "granted twice": lambda *_: None, "Windows": None}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Seconds are short, and those of the watching are not slept."""
    for name, value in {"BEAT": 0.05, "SETTLE": 0.05, "PATIENCE": 0.1}.items():
        monkeypatch.setattr(locks, name, value)
    sleep = time.sleep
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: sleep(seconds / 10))


@pytest.fixture(params=NO_LOCKS)
def no_flock(request, monkeypatch):
    if NO_LOCKS[request.param]:
        monkeypatch.setattr(fcntl, "flock", NO_LOCKS[request.param])
    else:
        monkeypatch.setattr(locks, "fcntl", None)


def text_by(pid=None, start=None, host=None):
    own = leftovers.this_process()
    process = leftovers.Process(pid or own.pid, start or own.start, host or own.host)
    return f"process {process.pid} on elsewhere ({process.name})\n"


def taken(path):
    """Whether a run gets the lock."""
    try:
        with locks.locked(path):
            assert locks.owner_of(path.read_text()).pid == os.getpid()
        assert not path.exists()
    except InputError as error:
        assert "another run is writing to" in str(error)
        return False
    return True


@contextlib.contextmanager
def touching(path):
    """Another host's run, which lives: its clock is years behind."""
    ended, seconds = threading.Event(), iter(range(10 ** 9))

    def touch():
        while not ended.wait(0.02):
            moment = 1e9 + next(seconds)
            os.utime(path, (moment, moment))
    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_without_locks_a_second_run_is_noticed_with_a_warning(tmp_path, no_flock, capsys):
    path = tmp_path / ".lock"
    with locks.locked(path):
        assert "on a file system without locks" in capsys.readouterr().err
        assert not taken(path)
        assert path.exists()
    assert taken(path) and not list(tmp_path.iterdir())


def test_where_locks_work_nothing_is_warned_of(tmp_path, capsys):
    path = tmp_path / ".lock"
    with locks.locked(path):
        assert not taken(path)
    assert taken(path) and capsys.readouterr().err == ""


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("changes", [{"pid": 999_999_999}, {"start": 7}], ids=["pid", "start"])
def test_a_dead_process_of_this_host_is_followed_at_once(tmp_path, monkeypatch, works, changes):
    if not works:
        monkeypatch.setattr(locks, "fcntl", None)
    (tmp_path / ".lock").write_text(text_by(**changes))
    monkeypatch.setattr(locks, "refuse_if_touched", lambda *_: pytest.fail("it was waited for"))
    assert taken(tmp_path / ".lock")


@pytest.mark.parametrize("works", [True, False])
def test_another_hosts_run_is_known_by_its_signs_and_not_by_clocks(tmp_path, monkeypatch, works):
    """Locks may work on each host and not between them."""
    if not works:
        monkeypatch.setattr(locks, "fcntl", None)
    path = tmp_path / ".lock"
    path.write_text(text_by(host="01234567"))
    with touching(path):
        assert not taken(path)
    if not works:
        os.utime(path)  # it may have been killed just now
        with pytest.raises(InputError, match="where it was killed, try again in 3 minutes"):
            locks.Lock(path)
    for moment in (1e9, 4e9):
        path.write_text(text_by(host="01234567"))
        os.utime(path, (moment, moment))
        assert taken(path)


def test_a_living_lock_is_touched_also_while_the_main_thread_is_busy(tmp_path):
    with locks.locked(tmp_path / ".lock"):
        os.utime(tmp_path / ".lock", (1e9, 1e9))
        until = time.monotonic() + 5
        while (tmp_path / ".lock").stat().st_mtime == 1e9 and time.monotonic() < until:
            sum(range(10_000))
        assert (tmp_path / ".lock").stat().st_mtime > 1e9


@pytest.mark.parametrize("lost", ["taken", "removed"])
def test_a_run_that_has_lost_its_lock_stops_and_leaves_the_others(tmp_path, no_flock, lost, capsys):
    path = tmp_path / ".lock"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's run changes it
    with pytest.raises(KeyboardInterrupt), locks.locked(path):
        path.unlink()
        if lost == "taken":
            path.write_text(text_by(host="01234567"))
        until = time.monotonic() + 10
        while time.monotonic() < until:
            time.sleep(0.01)
    assert "has been removed or taken by another run" in capsys.readouterr().err
    assert path.exists() == (lost == "taken")


def test_of_runs_that_come_at_the_same_time_one_at_most_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "SETTLE", 2)  # a tenth of it is slept
    monkeypatch.setattr(leftovers.Process, "has_died", lambda _: None)
    monkeypatch.setattr(locks, "STALE", 0)
    monkeypatch.setattr(locks, "refuse_if_touched", lambda *_: None)
    number, held, together = iter(range(100)), [], threading.Barrier(4)

    def run():
        together.wait()
        with contextlib.suppress(InputError):
            held.append(locks.Lock(tmp_path / ".lock"))
    monkeypatch.setattr(locks.os, "getpid", lambda: next(number))
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) <= 1
    for lock in held:
        lock.release()


@pytest.mark.parametrize("text", [
    "process * on here", "process 1 on here", "x" * 10 ** 6, "\0" * 99, "é\n" * 99,
    "process 99999999999999999999 on a (1.1.01234567)\n", "process 1 on a (1.1.01234567)\n" * 2],
    ids=range(7))
def test_what_a_lock_holds_is_parsed_and_no_pattern(tmp_path, text):
    for name in (".lock", ".other.lock", ".a.1.tmp", ".b.here.tmp"):
        (tmp_path / name).write_text(text)
    assert taken(tmp_path / ".lock")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_pipe_that_takes_a_watched_locks_place_is_not_waited_for(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    path.write_text(text_by(host="01234567"))
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / ".lock")
    monkeypatch.setattr(locks.time, "sleep",
                        lambda _: os.replace(tmp_path / "pipe" / ".lock", path))
    with pytest.raises(InputError, match="is a link, a folder or a pipe; remove it"):
        locks.refuse_if_touched(path, path.read_text())


@pytest.mark.parametrize("name", ["b\xfccher", "\udcff", "", "a b", "x" * 300])
def test_a_hosts_name_may_be_anything(tmp_path, monkeypatch, name):
    monkeypatch.setattr(locks.socket, "gethostname", lambda: name)
    assert taken(tmp_path / ".lock") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["link", "nowhere", "hard link", "pipe", "folder"])
def test_a_lock_is_no_link(tmp_path, kind):
    mine, path = tmp_path / "mine", tmp_path / ".lock"
    mine.write_text("of a person")
    {"link": lambda: path.symlink_to(mine), "nowhere": lambda: path.symlink_to(tmp_path / "new"),
     "hard link": lambda: os.link(mine, path), "pipe": lambda: os.mkfifo(path),
     "folder": path.mkdir}[kind]()
    with pytest.raises(InputError, match="is a link, a folder or a pipe; remove it"):
        locks.Lock(path)
    assert mine.read_text() == "of a person" and not (tmp_path / "new").exists()


def test_other_locks_of_dead_runs_are_removed(tmp_path):
    def lock(name, text, age=0):
        (tmp_path / name).write_text(text)
        moment = time.time() - age
        os.utime(tmp_path / name, (moment, moment))

    dead, elsewhere = text_by(pid=999_999_999), text_by(host="01234567")
    lock(".features-0123456789abcdef.lock", dead)
    lock(".old.lock", elsewhere, 4000)
    lock(".new.lock", elsewhere, 60)
    lock(".own.lock", text_by())
    lock("yarn.lock", "of another program")
    lock(".empty.lock", "")
    (tmp_path / "text").write_text(dead)
    (tmp_path / ".link.lock").symlink_to("text")
    (tmp_path / "latin1.lock").write_bytes(b"caf\xe9")
    for place, cut in enumerate(["", "pro", dead[:30], "of another program"]):
        lock(f".features-{place:016}.lock", cut)  # killed while it was written, but for the last
    lock(".held.lock", dead)
    lock(f".features-{'a' * 16}.lock", "")
    with (open(tmp_path / ".held.lock") as held,
          open(tmp_path / f".features-{'a' * 16}.lock") as new):
        fcntl.flock(held, fcntl.LOCK_EX)
        fcntl.flock(new, fcntl.LOCK_EX)
        assert taken(tmp_path / ".lock")
    assert {path.name for path in tmp_path.iterdir()} == {
        ".new.lock", ".own.lock", "yarn.lock", "latin1.lock", ".empty.lock", "text", ".link.lock",
        ".held.lock", f".features-{3:016}.lock", f".features-{'a' * 16}.lock"}


def test_a_lock_that_was_cut_off_stays_for_an_hour_where_locks_do_not_work(tmp_path, no_flock):
    for name, age in ((f".features-{0:016}.lock", 60), (f".features-{1:016}.lock", 4000)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    locks.remove_dead_locks(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f".features-{0:016}.lock"]


def test_a_lock_that_cannot_be_removed_is_told_of_and_taken_over(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, locks.locked(tmp_path / ".lock"):
        def refused(*_, **__):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        patch.setattr(Path, "unlink", refused)
    assert f"cannot remove {tmp_path / '.lock'} (Read-only file system)" in capsys.readouterr().err
    assert taken(tmp_path / ".lock")


def test_a_process_ends_though_it_holds_a_lock(tmp_path):
    code = "import sys; from antarctic.locks import Lock; from pathlib import Path; " \
           "Lock(Path(sys.argv[1]) / '.lock')"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=30, cwd=ROOT)
    assert taken(tmp_path / ".lock")
