"""Files that are opened once and held, so that all that a run reads of one are the same bytes."""

import hashlib
import mmap
import os
import threading
import time
import weakref
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from antarctic.bounded import cannot_be_read, telling
from antarctic.errors import InputError
from antarctic.reads import open_regular, passes, persistent

TICK = 0.02  # seconds; the times that file systems keep are a tick of 1 to 10 ms apart
BLOCK_BYTES = 1 << 20


class HeldFile:
    """A regular file that stays open. A rename over its name changes nothing here, and a change in
    place is noticed by the read that could return other bytes.

    Reads are no mapping: the system kills a process that reads a mapped file which was cut short.
    kind: what the file is, for messages. name: what they call it (default: path). Attributes: path;
    title, the kind and the name; size, in bytes; opened_path, which leads to the open file whatever
    becomes of its name (on Linux; elsewhere it is path). Raises InputError as bounded.telling does.
    """

    def __init__(self, path, kind="file", name=None):
        self.path, self.title = Path(path), f"{kind} {name or path}"
        with telling(name or path, kind):
            self.file = open_regular(path, buffering=0)
        self.lock = threading.Lock()
        self.close = weakref.finalize(self, self.file.close)
        own = f"/proc/self/fd/{self.file.fileno()}"
        self.opened_path = own if os.path.lexists(own) else os.path.abspath(path)
        if abs(time.time() - self.now()[1] / 1e9) < TICK:
            time.sleep(TICK)  # a change in the tick of the last one would show no other time
        self.state = self.now()
        self.size = self.state[0]

    def ask(self, call, *arguments):
        """What a system call of this file returns. An error that may pass is tried again. Raises
        InputError."""
        try:
            return persistent(partial(call, *arguments))
        except OSError as error:
            raise InputError(cannot_be_read(f"the {self.title}", error)) from error

    def now(self):
        """[size, time of change in ns]: they differ once the file was changed in place."""
        status = self.ask(os.fstat, self.file.fileno())
        return [status.st_size, status.st_mtime_ns]

    def is_in_place(self):
        """Whether its name still stands for the open file. Raises OSError where nobody can tell."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        except OSError as error:
            if passes(error):
                raise
            return False

    def check(self, in_place=False):
        """Raises InputError where the file was changed since it was opened. in_place: also where
        another file has its name, or none. And where this cannot be told."""
        same = self.now() == self.state
        if same and in_place:
            same = self.ask(self.is_in_place)
        if not same:
            raise InputError(f"the {self.title} was changed while this run read it, so there are "
                             "no results; rerun the same command once nothing writes to it")

    def check_readable(self):
        """Raises InputError where another reader, such as a library, could not open, read or map
        the file now."""
        def read():
            with open(self.opened_path, "rb") as file:
                if file.read(1):
                    mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ).close()

        self.ask(read)

    def fill(self, buffer, offset):
        """Reads len(buffer) bytes from offset on. buffer: a memoryview of bytes. Raises InputError
        where they cannot be read. A caller that has all its bytes calls check()."""
        while len(buffer):
            count = self.ask(self.read_into, buffer, offset)
            if not count:
                self.cut_short()
            buffer, offset = buffer[count:], offset + count

    def gather(self, offsets, size):
        """Pieces of so many bytes each, one after the other, a bytearray. Raises InputError as
        fill() does."""
        data = bytearray().join(self.ask(self.pieces, offsets, size))
        if len(data) < len(offsets) * size:
            self.cut_short()
        return data

    def pieces(self, offsets, size):
        """The pieces of gather(), a list. Raises OSError."""
        number = self.file.fileno()
        if hasattr(os, "pread"):
            return [os.pread(number, size, offset) for offset in offsets]
        pieces = [bytearray(size) for _ in offsets]
        for piece, offset in zip(pieces, offsets):
            self.read_into(piece, offset)
        return pieces

    def read_into(self, buffer, offset):
        """Reads bytes from offset on, and returns how many."""
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [buffer], offset)
        with self.lock:  # Windows
            self.file.seek(offset)
            return self.file.readinto(buffer)

    def cut_short(self):
        self.check()
        raise InputError(f"the {self.title} is cut short")

    def read(self, size=None, offset=0, most=None):
        """So many of its bytes, all by default. most: the number of bytes that it may have. Raises
        InputError where it has more, and as fill() and check() do."""
        if most is not None and self.size > most:
            raise InputError(f"the {self.title} has {self.size:,} bytes; {most:,} are read at most")
        data = bytearray(min(self.size - offset, self.size if size is None else size))
        self.fill(memoryview(data), offset)
        self.check()
        return bytes(data)

    def blocks(self):
        """Yields its bytes, a block at a time. Raises InputError as read() does."""
        for offset in range(0, self.size, BLOCK_BYTES):
            yield self.read(BLOCK_BYTES, offset)

    def content_key(self, most=1 << 30):
        """What changes with the content: its SHA-256, or, of more bytes than `most`, its state:
        reading them would take minutes. Raises InputError."""
        return sha256(self) if self.size <= most else self.state


def sha256(*files):
    """The SHA-256 of some HeldFiles, one after the other, hexadecimal. Raises InputError."""
    digest = hashlib.sha256()
    for file in files:
        for block in file.blocks():
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def held(path, kind):
    """Holds a file while the body reads it. Yields a HeldFile. Raises InputError as it does, and
    where the file was changed or replaced meanwhile."""
    file = HeldFile(path, kind)
    try:
        yield file
        file.check(in_place=True)
    finally:
        file.close()
