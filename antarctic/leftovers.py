"""Temporary files: how they are named, and which of them a killed run has left."""

import hashlib
import os
import re
import secrets
import socket
import stat
from contextlib import suppress
from functools import cache
from pathlib import Path

HOUR = 3600  # seconds without a change, after which no run is writing a file any more
PROCESS = r"(\d{1,10})\.(\d{1,20})\.([0-9a-f]{8})"  # of Process.name
# The last digits are a checksum of what stands before them, so no other program makes such a name.
TEMPORARY = re.compile(rf"(\.[!-~]{{1,40}}\.{PROCESS}\.[0-9a-f]{{8}})\.([0-9a-f]{{8}})\.tmp")


# --------------------------------------------------------------------------------------- processes

class Process:
    """A process: its number, when it began (in ticks of its host's clock since this was started; 0
    where that is not known), and a fingerprint of the host."""

    def __init__(self, pid, start, host):
        self.pid, self.start, self.host = int(pid), int(start), host

    @property
    def name(self):
        return f"{self.pid}.{self.start}.{self.host}"

    def has_died(self):
        """True or False; None where that cannot be told from here."""
        if self.host != this_host() or os.name != "posix":
            return None
        try:
            os.kill(self.pid, 0)  # the signal 0 only asks
        except (ProcessLookupError, OverflowError):
            return True
        except OSError:  # another user's
            pass
        start, state = start_and_state(self.pid)
        # Numbers are used again. A zombie has ended, though its parent has not asked for its code.
        return bool(start and self.start and start != self.start) or state in (b"Z", b"X")


def this_process():
    return Process(os.getpid(), start_and_state(os.getpid())[0], this_host())


def start_and_state(pid):
    """When a process began and what it does, a letter: as Linux tells of it, else (0, b"")."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return int(fields[19]), fields[0]
    except (OSError, ValueError, IndexError):
        return 0, b""


@cache
def this_host():
    """8 hexadecimal digits that stand for this host since it was started. Containers have numbers
    of processes of their own, and may share the host's name."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return short_digest("|".join(parts))


def short_digest(text):
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]


# --------------------------------------------------------------------------------- temporary files

def temporary_prefix(path):
    """How the names of path's temporary files begin: with ASCII only, and few of them, since the
    name of path may be as long as the file system allows."""
    return "." + re.sub(r"[^!-~]", "_", Path(path).name)[:40] + "."


def temporary_path(path):
    """A new name beside path, for a file that is not whole yet. It holds the process, so that a
    later run can tell whether that still writes, and digits that nobody can guess."""
    name = f"{temporary_prefix(path)}{this_process().name}.{secrets.token_hex(4)}"
    return Path(path).with_name(f"{name}.{short_digest(name)}.tmp")


def writer_of(name):
    """The Process that made a temporary file of this name, None where it is the name of none."""
    match = TEMPORARY.fullmatch(name)
    return Process(*match.groups()[1:4]) if match and short_digest(match[1]) == match[5] else None


def is_mine(entry):
    """Whether an os.DirEntry is a regular file, no link, and of this user."""
    return (entry.is_file(follow_symlinks=False)
            and entry.stat(follow_symlinks=False).st_uid == user())


def user():
    return os.geteuid() if hasattr(os, "geteuid") else 0  # as Windows states of each file


def remove_leftovers(folder):
    """Removes the temporary files in a folder whose process has died. Where it ran on another host,
    or before this one was started, they go once they are an hour old."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in [entry for entry in entries if entry.name.endswith(".tmp")]:
            with suppress(OSError):  # another run removes it; the others go all the same
                writer = writer_of(entry.name)
                if not writer or not is_mine(entry):
                    continue
                dead = writer.has_died()
                if dead is None:
                    dead = abs(age_of(entry.path)) > HOUR
                if dead:
                    os.unlink(entry.path)


def scratch_folder(prefix):
    """A tempfile.TemporaryDirectory, which only this user may open. Those that killed processes of
    this host left under the same prefix are removed with all that is in them."""
    import shutil
    import tempfile  # takes a while, and only the page needs it
    name = re.compile(rf"{re.escape(prefix)}-{PROCESS}-\w{{8}}")
    with suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            match = name.fullmatch(entry.name)
            with suppress(OSError):
                if match and Process(*match.groups()).has_died() and is_own_folder(entry):
                    shutil.rmtree(entry.path, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"{prefix}-{this_process().name}-")


def is_own_folder(entry):
    """Whether an os.DirEntry is a folder, no link, that this user alone may open."""
    status = entry.stat(follow_symlinks=False)
    return (stat.S_ISDIR(status.st_mode) and status.st_uid == user()
            and stat.S_IMODE(status.st_mode) == 0o700)


def age_of(path):
    """Seconds since a file changed, by the clock of its file system: those of two hosts differ, and
    each may jump. Raises OSError."""
    changed, probe = os.lstat(path).st_mtime, temporary_path(path)
    number = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        os.utime(number if os.utime in os.supports_fd else probe)
        return os.fstat(number).st_mtime - changed
    finally:
        os.close(number)
        os.unlink(probe)
