"""Files that are read with bounds, and held while they are read.

A pipe keeps nobody waiting, a device is no file, and a file that says it has a terabyte is refused
before a byte of it is read.
"""

import json
import multiprocessing
import os
import signal
import stat
from contextlib import contextmanager, suppress
from pathlib import Path

from antarctic.errors import InputError

MOST_TEXT = 1 << 31  # bytes of a text; a cache of 50 million entries has 1 GB
MOST_SETTINGS = 1 << 24  # bytes of a description or of settings
# Lists and objects of JSON: each takes 64 bytes or more, and may have two in the file. COCO's
# instances of train2017 have 2 million.
MOST_CONTAINERS = 1 << 23
NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # Windows has only the latter


def open_regular(path, kind):
    """Opens a regular file, or a link to one, as a binary file. Raises InputError where there is
    none, or it cannot be read. kind: what the file is, for messages."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening some devices does something
            raise InputError(f"there is no {kind} at {path}: it is no regular file")
        descriptor = os.open(path, os.O_RDONLY | NO_WAIT)
    except (OSError, ValueError) as error:  # ValueError: the path holds a NUL
        if isinstance(error, (FileNotFoundError, NotADirectoryError, ValueError)):
            raise InputError(f"there is no {kind} at {path}") from error
        raise InputError(f"the {kind} {path} cannot be read ({error.strerror})") from error
    file = os.fdopen(descriptor, "rb")
    if stat.S_ISREG(os.fstat(descriptor).st_mode):  # it may have been replaced in between
        return file
    file.close()
    raise InputError(f"there is no {kind} at {path}: it is no regular file")


def read_opened(file, path, kind, most=MOST_TEXT):
    """The bytes of a file that open_regular opened. Raises InputError where it has more than `most`
    or cannot be read."""
    try:
        size = os.fstat(file.fileno()).st_size
        data = file.read(most + 1) if size <= most else None
    except OSError as error:
        raise InputError(f"the {kind} {path} cannot be read ({error.strerror})") from error
    if data is None or len(data) > most:
        raise InputError(f"the {kind} {path} has {size:,} bytes; {most:,} are read at most")
    return data


def read_bytes(path, kind, most=MOST_TEXT):
    """The bytes of a regular file. Raises InputError as open_regular and read_opened do."""
    with open_regular(path, kind) as file:
        return read_opened(file, path, kind, most)


def parse_json(text, path, kind, **options):
    """The value of some JSON of the file path, a text or bytes. options: of json.loads. Raises
    InputError where it has too many lists and objects, and what json.loads raises."""
    marks = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(map(text.count, marks)) > MOST_CONTAINERS:
        raise InputError(f"the {kind} {path} has more than {MOST_CONTAINERS:,} lists and objects")
    return json.loads(text, **options)


def state_of(status):
    """What changes with a file's content, of os.stat."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Held:
    """A regular file that is opened once and held. Attributes: path; file; opened_path, a path that
    leads to the open file whatever becomes of its name (on Linux; elsewhere it is path)."""

    def __init__(self, path, kind):
        self.path, self.kind = Path(path), kind
        self.file = open_regular(path, kind)
        self.state = state_of(os.fstat(self.file.fileno()))
        own = f"/proc/self/fd/{self.file.fileno()}"
        self.opened_path = own if os.path.exists(own) else os.path.abspath(path)

    def require_unchanged(self):
        """Raises InputError where the file was changed, replaced or removed since it was opened."""
        try:
            same = (self.state == state_of(os.fstat(self.file.fileno()))
                    == state_of(os.stat(self.path)))
        except OSError:
            same = False
        if not same:
            raise InputError(f"the {self.kind} {self.path} was changed while it was read; rerun "
                             f"the same command when it is at rest")


@contextmanager
def held(path, kind):
    """Holds a file while the body reads it. Raises InputError where it is no regular file, or was
    changed meanwhile. Yields a Held."""
    file = Held(path, kind)
    with file.file:
        yield file
        file.require_unchanged()


def in_child(make, seconds=20, megabytes=1024):
    """What make() returns, computed by a forked process of bounded time and memory, since it runs
    what a stranger wrote. make: a function of a value that JSON can hold.

    Raises ValueError where it takes more processor time or memory, or raises an exception. Systems
    without fork (Windows) have no bounds.
    """
    if not hasattr(os, "fork"):
        return make()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=answer, args=(make, sender, seconds, megabytes << 20))
    child.start()
    sender.close()
    try:
        if not receiver.poll(3 * seconds):
            raise EOFError
        value, error = json.loads(receiver.recv_bytes(megabytes << 20))
    except (EOFError, OSError) as ended:  # killed for its time, or an answer too long
        raise ValueError(f"it takes more than {seconds} seconds, or too much memory") from ended
    finally:
        child.kill()
        child.join()
    if error:
        raise ValueError(error)
    return value


def answer(make, sender, seconds, memory):
    """The child of in_child."""
    import resource
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with suppress(OSError):  # Linux; the process has its parent's memory already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        result = [make(), None]
    except BaseException as error:
        result = [None, " ".join(f"{type(error).__name__}: {error}".split())[:200]]
    sender.send_bytes(json.dumps(result).encode())
