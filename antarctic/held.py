"""Files that are opened once and held, so that all that a run reads of one are the same bytes."""

import hashlib
import os
import stat
import threading
import time
import weakref
from contextlib import contextmanager

from antarctic.errors import InputError

TICK = 0.02  # seconds; the times that file systems keep are a tick of 1 to 10 ms apart
BLOCK_BYTES = 1 << 20
NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # opening a pipe waits for its writer otherwise


class HeldFile:
    """A file that stays open. A rename over its name changes nothing here, and a change in place is
    noticed by the read that could return other bytes.

    Reads are no mapping: the system kills a process that reads a mapped file which was cut short.
    Attributes: name, what messages call it; size, in bytes. Raises InputError where it is no
    regular file, and OSError where it cannot be opened.
    """

    def __init__(self, path, name=None):
        self.name = name or path
        self.file = open(path, "rb", buffering=0,
                         opener=lambda path, flags: os.open(path, flags | NONBLOCK))
        self.lock = threading.Lock()
        weakref.finalize(self, self.file.close)
        status = os.fstat(self.file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{self.name} is not a file that can be read again")
        if abs(time.time() - status.st_mtime) < TICK:
            time.sleep(TICK)  # a change in the tick of the last one would show no other time
        self.state = self.now()
        self.size = self.state[0]

    def now(self):
        """[size, time of change in ns]: they differ once the file was changed in place."""
        with self.reading():
            status = os.fstat(self.file.fileno())
        return [status.st_size, status.st_mtime_ns]

    def check(self):
        """Raises InputError where the file was changed since it was opened."""
        if self.now() != self.state:
            raise InputError(f"{self.name} was changed while this run read it, so there are no "
                             "results; rerun the same command once nothing writes to it")

    def fill(self, buffer, offset):
        """Reads len(buffer) bytes from offset on. buffer: a memoryview of bytes. Raises InputError
        where they cannot be read. A caller that has all its bytes calls check()."""
        with self.reading():
            while len(buffer):
                count = self.read_into(buffer, offset)
                if not count:
                    self.cut_short()
                buffer, offset = buffer[count:], offset + count

    def gather(self, offsets, size):
        """Pieces of so many bytes each, one after the other, a bytearray. Raises InputError as
        fill() does."""
        number = self.file.fileno()
        with self.reading():
            if hasattr(os, "pread"):
                pieces = [os.pread(number, size, offset) for offset in offsets]
            else:
                pieces = [bytearray(size) for _ in offsets]
                for piece, offset in zip(pieces, offsets):
                    self.read_into(piece, offset)
            data = bytearray().join(pieces)
        if len(data) < len(offsets) * size:
            self.cut_short()
        return data

    def read_into(self, buffer, offset):
        """Reads bytes from offset on, and returns how many."""
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [buffer], offset)
        with self.lock:  # Windows
            self.file.seek(offset)
            return self.file.readinto(buffer)

    @contextmanager
    def reading(self):
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot read {self.name} ({error.strerror})") from error

    def cut_short(self):
        self.check()
        raise InputError(f"{self.name} is cut short")

    def read(self, size=None, offset=0):
        """So many of its bytes, all by default. Raises InputError as fill() and check() do."""
        data = bytearray(min(self.size - offset, self.size if size is None else size))
        self.fill(memoryview(data), offset)
        self.check()
        return bytes(data)

    def sha256(self):
        """The SHA-256 of the file, hexadecimal. Raises InputError as read() does."""
        digest = hashlib.sha256()
        for offset in range(0, self.size, BLOCK_BYTES):
            digest.update(self.read(BLOCK_BYTES, offset))
        return digest.hexdigest()

    def content_key(self, most=1 << 30):
        """What changes with the content, as files.content_key has it, of the bytes that are held.
        """
        return self.sha256() if self.size <= most else self.state
