"""Files that are read with bounds.

A pipe keeps nobody waiting, a device is no file, and a file that says it has a terabyte is refused
before a byte of it is read.
"""

import errno
import json
import multiprocessing
import os
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

from antarctic.errors import InputError
from antarctic.reads import open_regular, read_at_most

MOST_TEXT = 1 << 31  # bytes of a text; a cache of 50 million entries has 1 GB
MOST_SETTINGS = 1 << 24  # bytes of a description or of settings
# Lists and objects of JSON: each takes 64 bytes or more, and may have two in the file. COCO's
# instances of train2017 have 2 million.
MOST_CONTAINERS = 1 << 23


class MissingError(InputError):
    """There is no such file."""


@contextmanager
def telling(path, kind):
    """Tells the errors of opening or reading a file in a sentence. kind: what the file is. Raises
    MissingError where there is none, and InputError where it is no regular file, or the system
    cannot read it."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: the path holds a NUL
        reason = getattr(error, "errno", errno.ENOENT)
        if reason in (errno.ENOENT, errno.ENOTDIR):
            raise MissingError(f"there is no {kind} at {path}") from error
        if reason is None:  # a pipe, a folder
            raise InputError(f"there is no {kind} at {path}: {error}") from error
        raise InputError(cannot_be_read(f"the {kind} {path}", error)) from error


def cannot_be_read(title, error):
    """The sentence for an error of the system. title: a file's kind and name. error: an OSError."""
    return (f"{title} cannot be read ({error.strerror}); rerun the same command once this is "
            "fixed")


def read_bytes(path, kind, most=MOST_TEXT):
    """The bytes of a regular file. Raises InputError as telling() does, and where it has more than
    `most` bytes."""
    with telling(path, kind), open_regular(path) as file:
        data = read_at_most(file, most)
    if data is None:
        raise InputError(f"the {kind} {path} has more than {most:,} bytes")
    return data


def parse_json(text, path, kind, **options):
    """The value of some JSON of the file path, a text or bytes. options: of json.loads. Raises
    InputError where it has too many lists and objects, and what json.loads raises."""
    marks = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(map(text.count, marks)) > MOST_CONTAINERS:
        raise InputError(f"the {kind} {path} has more than {MOST_CONTAINERS:,} lists and objects")
    return json.loads(text, **options)


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
