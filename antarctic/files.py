"""Files that are never half-written, and what tells one file from another."""

import errno
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

from antarctic.errors import InputError

# backslashreplace is for file names that are not UTF-8.
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
TEXT = {"encoding": "utf-8", "newline": "\n", "errors": "backslashreplace"}


# ---------------------------------------------------------------------------------------- writing

@contextmanager
def writing(path):
    """Wraps code that writes the file path. Raises InputError, with the path, where it cannot be
    written: the disk is full, the folder is read-only."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        # The error may be of another file, which the code reads meanwhile.
        names = Path(path).name, temporary_path(path).name
        if error.filename and not any(name in str(error.filename) for name in names):
            raise
        raise InputError(f"cannot write {path} ({error.strerror}); finished files are whole, so "
                         "rerun the same command to resume once this is fixed") from error


def temporary_path(path):
    """Where this process writes a file before it is whole. The name has no more than 80 characters,
    since path's may be as long as the file system allows."""
    path = Path(path)
    digits = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    return path.with_name(f".{path.name[:40]}-{digits}.{os.getpid()}.tmp")


@contextmanager
def atomic(path, mode="w"):
    """Opens a temporary file beside path and renames it to path at the end, so that path is never
    half-written.

    mode: "w" (UTF-8 text) or "wb". If the body raises, path stays as it was. Raises InputError
    where the file cannot be written.
    """
    path = Path(path)
    temporary = temporary_path(path)
    options = {} if "b" in mode else TEXT
    with writing(path):
        try:
            with open(temporary, mode, **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def create(path, text):
    """Writes a new file, whole or not at all. Raises OSError: FileExistsError where path exists."""
    path = Path(path)
    temporary = temporary_path(path)
    try:
        with open(temporary, "w", **TEXT) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # unlike a rename, it never replaces a file
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with open(path, "x", **TEXT) as file:
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    finally:
        temporary.unlink(missing_ok=True)


def append(path, data):
    """Appends bytes to a file; they are on the disk when this returns. Raises InputError where they
    cannot be written."""
    with writing(path), open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_lines(path, lines):
    """Writes one text a line. Line breaks in a text become spaces, so that line i is text i."""
    with atomic(path) as file:
        file.writelines(" ".join(line.split()) + "\n" for line in lines)


def write_json(path, data, indent=None):
    with atomic(path) as file:
        json.dump(data, file, ensure_ascii=False, indent=indent)
        file.write("\n")


def output_folder(path):
    """Creates a folder and checks that it can be written to, before hours of work go into it.

    Returns its Path. Raises InputError where it cannot be written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to the folder {path} ({error.strerror})") from error
    return path


# ---------------------------------------------------------------------------------------- reading

def reason_of(error):
    """Why a file could not be read or written, in a few words. error: an OSError or InputError."""
    return getattr(error, "strerror", None) or str(error)


def existing_file(path, kind):
    """The Path of a file. Raises InputError where there is none. kind: what the file is."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no {kind} at {path}")
    return path


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_key(path, most=1 << 30):
    """What changes with a file's content: its SHA-256, or, of files of more bytes than `most`, its
    size and time of change, since reading them would take minutes."""
    status = os.stat(path)
    return file_sha256(path) if status.st_size <= most else [status.st_size, status.st_mtime_ns]


def fingerprint(settings):
    """16 hexadecimal digits that stand for everything that determines a run's results.

    Runs share unfinished work only if these are equal. settings: any JSON value.
    """
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
