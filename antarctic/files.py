"""Files that are never half-written, and what tells one file from another."""

import errno
import hashlib
import json
import os
import re
import stat
from contextlib import contextmanager, suppress
from pathlib import Path

from antarctic.bounded import telling
from antarctic.errors import InputError
from antarctic.leftovers import remove_leftovers, temporary_path, temporary_prefix
from antarctic.reads import persistent

NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EROFS}
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
NO_WAIT = getattr(os, "O_NONBLOCK", 0)
# backslashreplace is for file names that are not UTF-8.
TEXT = {"encoding": "utf-8", "newline": "\n", "errors": "backslashreplace"}


# ---------------------------------------------------------------------------------------- opening

def new_file(path, flags):
    """An opener for open(): of a file that nobody has made before."""
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666)


def own_file(path, flags):
    """An opener for open(): of a file that this and later runs write to, which may be new. Raises
    InputError where path is something else. What a link names would be changed, also by another
    name of the same file, and a pipe is waited for."""
    try:
        number = os.open(path, flags | NO_FOLLOW | NO_WAIT, 0o666)
    except OSError as error:
        if os.path.islink(path) or error.errno in (errno.ENXIO, errno.EISDIR):
            raise InputError(f"{path} is a link, a folder or a pipe; remove it") from error
        raise
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(number)
        raise InputError(f"{path} is a link, a folder or a pipe; remove it")
    return number


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
        name = os.path.basename(os.fsdecode(error.filename or ""))
        if name and name != Path(path).name and not name.startswith(temporary_prefix(path)):
            raise
        raise InputError(f"cannot write {path} ({error.strerror}); finished files are whole, so "
                         "rerun the same command to resume once this is fixed") from error


def sync_folder(folder):
    """Returns once the names in a folder are on the disk: until then a power cut undoes what was
    renamed, linked or removed there. Raises OSError."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders, and one that may be written need not be readable
        return
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(number)


@contextmanager
def atomic(path, mode="w", sync=True):
    """Opens a temporary file beside path and renames it to path at the end, so that path is never
    half-written. It is on the disk then.

    mode: "w" (UTF-8 text) or "wb". sync: False leaves the name to a sync_folder for many files. If
    the body raises, path stays as it was. Raises InputError where the file cannot be written.
    """
    path = Path(path)
    temporary = temporary_path(path)
    options = {} if "b" in mode else TEXT
    with writing(path):
        try:
            with open(temporary, mode, opener=new_file, **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                os.unlink(temporary)
            raise
        if sync:
            sync_folder(path.parent)


def create(path, text):
    """Writes a new file, whole or not at all; sync_folder() is left to the caller. Raises OSError:
    FileExistsError where path exists."""
    path = Path(path)
    temporary = temporary_path(path)
    try:
        with open(temporary, "w", opener=new_file, **TEXT) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # unlike a rename, it never replaces a file
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with open(path, "x", opener=new_file, **TEXT) as file:
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
    cannot be written, or path is no file of its own."""
    with writing(path), open(path, "ab", opener=own_file) as file:
        new = not file.tell()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if new:
            sync_folder(Path(path).parent)


def move(source, target, missing_ok=False):
    """Renames a file that is on the disk, in place of any other, for good. missing_ok: does nothing
    where there is no source. Raises InputError where it cannot be renamed."""
    with writing(target):
        try:
            os.replace(source, target)
        except FileNotFoundError:
            if not missing_ok:
                raise
        sync_folder(Path(target).parent)


def remove(*paths):
    """Removes files, where they are there, for good. Raises InputError where one cannot be
    removed."""
    for path in paths:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise InputError(f"cannot remove {path} ({error.strerror}); rerun the same command "
                             "once this is fixed") from error
    for folder in {Path(path).parent for path in paths}:
        with writing(folder):
            sync_folder(folder)


def made_by_runs(folder, before, after):
    """The files of a folder whose names are `before`, a fingerprint, `after`: sorted. Links and
    folders of such a name are no run's. Raises InputError where the folder cannot be read."""
    name = re.compile(re.escape(before) + "[0-9a-f]{16}" + re.escape(after))
    with reading(folder), os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries
                      if name.fullmatch(entry.name) and entry.is_file(follow_symlinks=False))


def write_lines(path, lines):
    """Writes one text a line. Line breaks in a text become spaces, so that line i is text i."""
    with atomic(path) as file:
        file.writelines(" ".join(line.split()) + "\n" for line in lines)


def write_json(path, data, indent=None):
    with atomic(path) as file:
        json.dump(data, file, ensure_ascii=False, indent=indent)
        file.write("\n")


def make_folder(path):
    """Makes a folder and those above it, for good. Raises OSError."""
    path = Path(path)
    if not path.is_dir():
        if path.parent != path:
            make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def output_folder(path):
    """Creates a folder and checks that it can be written to, before hours of work go into it.
    Temporary files that killed runs left in it are removed.

    Returns its Path. Raises InputError where it cannot be written to.
    """
    path = Path(path)
    probe = temporary_path(path / "probe")
    try:
        make_folder(path)
        with open(probe, "wb", opener=new_file):
            pass
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to the folder {path} ({error.strerror})") from error
    remove_leftovers(path)
    return path


# ---------------------------------------------------------------------------------------- reading

def reason_of(error):
    """Why a file could not be read or written, in a few words. error: an OSError or InputError."""
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def reading(path):
    """Wraps code that reads the file path. Raises InputError, with the path, where it cannot be
    read."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path} ({reason_of(error)})") from error


def existing_file(path, kind):
    """The Path of a file. Raises InputError where there is none, or nobody can tell. kind: what the
    file is."""
    path = Path(path)
    with telling(path, kind):
        regular = stat.S_ISREG(persistent(lambda: os.stat(path)).st_mode)
    if not regular:
        raise InputError(f"there is no {kind} at {path}")
    return path


def file_sha256(path):
    """The SHA-256 of a file, in hexadecimal digits. Raises InputError."""
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_lines(path, number):
    """Counts the lines of a file of results before it is called done. Raises InputError where they
    are not so many: another run wrote there at the same time, or the disk lost some."""
    with reading(path), open(path, "rb") as file:
        lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    if lines != number:
        raise InputError(f"{path} has {lines:,} lines and not {number:,}: another run or program "
                         f"has changed it; see that none does, and rerun the same command")


def fingerprint(settings):
    """16 hexadecimal digits that stand for everything that determines a run's results.

    Runs share unfinished work only if these are equal. settings: any JSON value.
    """
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
