"""Locks: one run at a time writes to a place."""

import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

from antarctic.distributed import on_rank0
from antarctic.errors import InputError
from antarctic.files import writing


@contextmanager
def locked(path):
    """Locks a file until the body ends, so that only this run writes what the file stands for. All
    processes of the run call this.

    The lock is the system's (flock), which frees it when its process dies, by SIGKILL too. The file
    names the process. Temporary files that a dead process left beside it are removed. Raises
    InputError where another run has the lock.
    """
    path, files = Path(path), []

    def lock():
        with writing(path):
            file = open_locked(path)
            files.append(file)
            file.seek(0)
            for pid in file.read().split()[1:2]:  # of a process that died with the lock
                for temporary in path.parent.glob(f".*.{pid}.tmp"):
                    temporary.unlink(missing_ok=True)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()

    on_rank0(lock)
    try:
        yield
    finally:
        for file in files:
            path.unlink(missing_ok=True)
            file.close()


def open_locked(path):
    """Opens the file path and locks it. Raises InputError where another run has the lock."""
    while True:
        file = open(path, "a+")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read() or "it has just begun"
            raise InputError(f"another run is writing to {path.parent}: {owner}; wait until it "
                             "ends, or give another folder or file") from error
        except OSError:  # the file system has no locks
            pass
        # Unless this is still the file at path, its owner has just removed it: try again.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
