"""Reading errors that pass, such as those of a network that is away: told from what a file's bytes
prove, and tried again; files read whole, within bounds."""

import errno
import os
import re
import stat
import time

from antarctic.errors import InputError

NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # Windows has only the latter
NOT_REGULAR = "it is no regular file"
# These say that there is no such file. All others that have a number are the system's: of a disk, a
# network, rights, too many open files. They say nothing of the file's bytes.
GONE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
PAUSES = 0.1, 0.4, 1.5  # seconds before another attempt
NUMBER = re.compile(r"\((?:os error )?(\d{1,3})\)$")  # of the error, as Rust and PyTorch tell it


class Patience:
    """Seconds that are left to this process for pauses: a folder of a million files that are not to
    be read costs no million pauses."""

    left = 60.0


def passes(error):
    """Whether an error may pass, as it says nothing of a file's bytes. error: any exception; the
    libraries that decode files raise OSErrors without a number."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in GONE


def system_error(error):
    """The error of the system that made a library raise an exception, if it may pass: an OSError
    with a number. None where there is none."""
    chain = []
    while error is not None and error not in chain:
        if passes(error):
            return error
        if number := NUMBER.search(str(error)):
            told = OSError(int(number[1]), os.strerror(int(number[1])))
            if passes(told) and told.strerror in str(error):
                return told
        chain.append(error)
        error = error.__cause__ or error.__context__
    return None


def persistent(read):
    """What read() returns. Where it raises an error that may pass, or a library in it does because
    of one, it is called again after a pause, a few times. Raises the last error."""
    for pause in PAUSES:
        try:
            return read()
        except InputError:
            raise
        except Exception as error:
            if not system_error(error) or Patience.left < pause:
                raise
        Patience.left -= pause
        time.sleep(pause)
    return read()


def is_there(path):
    """Whether there is something at a path, or behind a link there. Raises OSError where the system
    cannot tell."""
    try:
        persistent(lambda: os.stat(path))
    except (OSError, ValueError) as error:  # ValueError: the path holds a NUL
        if passes(error):
            raise
        return False
    return True


def open_regular(path, buffering=-1):
    """Opens a regular file, or a link to one, as a binary file. Raises OSError: one without a
    number where path is something else, such as a pipe, which could wait for ever."""
    check_regular(os.stat(path))  # some devices act where they are opened
    file = open(os.open(path, os.O_RDONLY | NO_WAIT), "rb", buffering)
    try:
        check_regular(os.fstat(file.fileno()))  # it may have been replaced in between
    except OSError:
        file.close()
        raise
    return file


def check_regular(status):
    if not stat.S_ISREG(status.st_mode):
        raise OSError(NOT_REGULAR)


def read_regular(path, most):
    """The bytes of a regular file, which is opened once. Raises OSError as open_regular does, and
    without a number where it has more than `most` bytes."""
    with open_regular(path) as file:
        data = read_at_most(file, most)
    if data is None:
        raise OSError(too_large(most))
    return data


def read_at_most(file, most):
    """The bytes of an open file; None where it has more than `most`."""
    size = os.fstat(file.fileno()).st_size
    if size > most:
        return None
    data = file.read(size + 1)
    if len(data) > size:  # it grows, or is one of /proc's, which have no size
        data += file.read(most + 1 - len(data))
    return data if len(data) <= most else None


def too_large(most):
    return f"the file is too large: more than {most >> 20} MB"
