"""Reading errors that pass, such as those of a network that is away: told from what a file's bytes
prove, and tried again; files read whole, within bounds."""

import errno
import os
import stat
import time

# These say that there is no such file. All others that have a number are the system's: of a disk, a
# network, rights, too many open files. They say nothing of the file's bytes.
GONE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
PAUSES = 0.1, 0.4, 1.5  # seconds before another attempt


class Patience:
    """Seconds that are left to this process for pauses: a folder of a million files that are not to
    be read costs no million pauses."""

    left = 60.0


def passes(error):
    """Whether an error may pass, as it says nothing of a file's bytes. error: any exception; the
    libraries that decode files raise OSErrors without a number."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in GONE


def persistent(read):
    """What read() returns. Where it raises an error that may pass, it is called again after a
    pause, a few times. Raises the last error."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if not passes(error) or Patience.left < pause:
                raise
        Patience.left -= pause
        time.sleep(pause)
    return read()


def read_regular(path, most):
    """The bytes of a regular file, which is opened once. Raises OSError: one without a number where
    the file is none, or has more than `most` bytes."""
    # A pipe that has no writer is opened without waiting, and then refused.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    check_regular(os.stat(path), most)  # some devices act where they are opened
    with open(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        check_regular(status, most)
        data = file.read(status.st_size + 1)
        if len(data) > status.st_size:  # it grows, or is one of /proc's, which have no size
            data += file.read(most + 1 - len(data))
    if len(data) > most:
        raise OSError(too_large(most))
    return data


def check_regular(status, most):
    """Raises OSError where a file is not regular or has more than `most` bytes. status: its
    os.stat_result."""
    if not stat.S_ISREG(status.st_mode):  # reading a pipe, say, could wait forever
        raise OSError("it is no regular file")
    if status.st_size > most:
        raise OSError(too_large(most))


def too_large(most):
    return f"the file is too large: more than {most >> 20} MB"
