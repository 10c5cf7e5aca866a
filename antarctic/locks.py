"""Locks: one run at a time writes to a place."""

import _thread
import os
import re
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from antarctic.distributed import on_rank0, warn
from antarctic.errors import InputError
from antarctic.files import own_file, writing
from antarctic.leftovers import HOUR, PROCESS, Process, age_of, is_mine, this_process

BEAT = 5  # seconds between two signs that the owner of a lock lives
WATCH = 4 * BEAT  # how long another run looks for one
STALE = 180  # seconds without one, after which it looks, where a lock may be held all the same
SETTLE = 2  # seconds that a run waits, where flock does not work, for others that begin just now
PATIENCE = 0.5  # seconds: a run that removes dead locks holds each for a moment
TEXT = re.compile(rf"process \d{{1,10}} on \S{{1,255}} \({PROCESS}\)\n")
ONE_TIME = re.compile(r"\.features-[0-9a-f]{16}\.lock")  # of images that may not come again
LONGEST = 400  # characters of a lock's text that are read


@contextmanager
def locked(path):
    """Locks a file until the body ends, so that only this run writes what the file stands for. All
    processes of the run call this.

    The lock is the system's (flock), which frees it when its process dies, by SIGKILL too. The file
    names the process, and a thread touches it every BEAT seconds: by that a run notices another one
    where flock does not work, or not between hosts. Locks beside it that dead processes left are
    removed. Raises InputError where another run has the lock.
    """
    locks = []
    on_rank0(lambda: locks.append(Lock(Path(path))))
    try:
        yield
    finally:
        for lock in locks:
            lock.release()


class Lock:
    """A lock that this process has. Attributes: path; file, which is open; works, whether flock
    does here. Raises InputError where another run has it, or the file cannot be written."""

    def __init__(self, path):
        self.path, self.ended, self.closing = path, threading.Event(), threading.Lock()
        host = re.sub("[^!-~]", "_", socket.gethostname())[:64] or "_"
        self.text = f"process {os.getpid()} on {host} ({this_process().name})\n"
        with writing(path):
            patient_until = time.monotonic() + PATIENCE
            while True:
                self.file = open(path, "a+", encoding="utf-8", errors="replace", opener=own_file)
                try:
                    if self.acquire(patient_until):
                        break
                except BaseException:
                    self.file.close()  # with the lock, which a traceback could hold
                    raise
                self.file.close()
        if not self.works:
            warn(f"{path.parent} is on a file system without locks: a second run there is noticed "
                 f"only by {path.name}, which this run touches every {BEAT} seconds; start none")
        threading.Thread(target=self.beat, daemon=True).start()
        remove_dead_locks(path.parent, path.name)

    def acquire(self, patient_until):
        """Locks the open file. Returns False where it is to be opened anew."""
        before = read(self.file)
        try:
            self.works = flock_works(self.file, self.path)
        except BlockingIOError as error:
            if time.monotonic() > patient_until:
                raise refusal(self.path, before) from error
            time.sleep(0.05)
            return False
        if before:
            refuse_if_alive(self.path, before, self.works)
        if not is_at(self.path, self.file):
            return False  # its owner has just removed it
        self.file.truncate(0)
        self.file.write(self.text)
        self.file.flush()
        if not self.works:
            os.fsync(self.file.fileno())
            time.sleep(SETTLE)  # of runs that come at the same time, the last one to write stays
            if not self.is_own():
                raise refusal(self.path, read(self.file))
        return True

    def is_own(self):
        """Whether the file at path is this lock. True also where that cannot be told."""
        try:
            with open(self.path, encoding="utf-8", errors="replace", opener=own_file) as file:
                return read(file) == self.text
        except (FileNotFoundError, InputError):
            return False
        except OSError:
            return True

    def beat(self):
        """Touches the file until release(), as a daemon thread. Stops the run, as Ctrl-C does,
        where another one has taken the file, which happens only where flock does not work."""
        while not self.ended.wait(BEAT):
            with self.closing, suppress(OSError, ValueError):  # ValueError: it is closed
                os.utime(self.file.fileno() if os.utime in os.supports_fd else self.path)
            if not (self.works or self.is_own() or self.ended.is_set()):
                warn(f"{self.path} has been removed or taken by another run, so this one stops")
                _thread.interrupt_main()
                return

    def release(self):
        self.ended.set()
        try:
            if self.is_own():
                self.path.unlink(missing_ok=True)
        except OSError as error:  # no result depends on it, and the next run takes it over
            warn(f"cannot remove {self.path} ({error.strerror})")
        with self.closing, suppress(OSError):  # what was written is on the disk, or does not matter
            self.file.close()


def read(file):
    """The text of a lock, without what is behind LONGEST characters."""
    file.seek(0)
    return file.read(LONGEST)


def is_at(path, file):
    """Whether an open file is still the one at path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    return False


def flock_works(file, path):
    """Locks the open file at path. Returns whether the file system locks at all. Raises
    BlockingIOError where another process has the lock."""
    if not fcntl:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    # Some file systems grant every lock, so a second one is asked for, which must be refused.
    try:
        with open(path, "r+", opener=own_file) as second:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return True
    return False


def owner_of(text):
    """The Process that a lock's text names, or None."""
    match = TEXT.fullmatch(text)
    return match and Process(*match.groups())


def refusal(path, text):
    """The error of a lock that another run has. text: of read()."""
    owner = text.partition(" (")[0].strip() or "it has just begun"
    return InputError(f"another run is writing to {path.parent}: {owner}; wait until it ends, or "
                      "give another folder or file")


def refuse_if_alive(path, text, works):
    """Raises InputError where the process that a lock's text names is still running. works: whether
    this process has the lock by flock, which may not count on other hosts."""
    owner = owner_of(text)
    dead = owner.has_died() if owner else works or None
    if dead is None and not works and abs(age_of(path)) < STALE:
        raise InputError(f"{refusal(path, text)}; where it was killed, try again in "
                         f"{STALE // 60} minutes")
    if dead is None:
        warn(f"waiting {WATCH} seconds to see whether the run that wrote {path} still touches it")
        refuse_if_touched(path, text)
    elif not (dead or works):
        raise refusal(path, text)


def refuse_if_touched(path, text):
    """Watches a lock. Raises InputError where it changes. Hosts' clocks are not compared: they
    differ and jump."""
    def seen():
        # NFS asks anew where a file is opened.
        with suppress(FileNotFoundError), open(path, "rb", opener=own_file) as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read(LONGEST)

    before = seen()
    for _ in range(WATCH):
        time.sleep(1)
        now = seen()
        if now is None:  # its owner has removed it
            return
        if now != before:
            raise refusal(path, text)


def remove_dead_locks(folder, own=None):
    """Removes the locks of a folder whose processes have died, but not the one named `own`. Where
    these ran on another host, or before this one was started, they go once they are an hour old."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in [entry for entry in entries if entry.name.endswith(".lock")]:
            with suppress(OSError, InputError):  # of one; the others go all the same
                if entry.name != own and is_mine(entry):
                    remove_if_dead(Path(entry.path))


def remove_if_dead(path):
    """Removes a lock of remove_dead_locks. Raises BlockingIOError where it is held all the same,
    and OSError or InputError where that cannot be told."""
    with open(path, "r+", encoding="utf-8", errors="replace", opener=own_file) as file:
        text = read(file)
        owner = owner_of(text)
        # Killed while it was written. Others are taken over, since later runs give them the name.
        cut_off = ONE_TIME.fullmatch(path.name) and "process ".startswith(text[:8])
        dead = owner.has_died() if owner else None
        if dead is False or not (owner or cut_off):
            return
        works = flock_works(file, path)
        if dead or works and not owner or abs(age_of(path)) > HOUR:
            if is_at(path, file):
                path.unlink()
