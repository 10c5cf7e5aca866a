"""Files that are never half-written, locks, and texts that are read with bounds."""

import errno
import hashlib
import json
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

LONGEST_TEXT = 10_000  # characters of an entry or a caption; the models read at most 128 tokens
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


# ------------------------------------------------------------------------------------------ locks

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


# ----------------------------------------------------------------------------------- cache files

def staging_path(path):
    """Where a file of a cache is kept until all of them are written."""
    return Path(path).with_name(f".{Path(path).name}.new")


def finish_cache(textfile, embfile):
    """Moves the files that write_cache staged into place, also those of a run that was killed while
    it moved them.

    The description is staged last: where it exists, all files are whole. So text and embeddings
    always belong together.
    """
    files = textfile, embfile, f"{embfile}.json"
    if staging_path(files[-1]).is_file():
        for path in files:
            with writing(path), suppress(FileNotFoundError):  # a killed run has moved it
                os.replace(staging_path(path), path)


def existing_caches(textfiles, embfiles):
    """Pairs of paths (text, embeddings). Raises InputError where a file is missing or the numbers
    of files differ."""
    if len(textfiles) != len(embfiles):
        raise InputError(f"got {len(textfiles)} --textfile but {len(embfiles)} --embfile; they go "
                         "in pairs")
    pairs = []
    for textfile, embfile in zip(textfiles, embfiles):
        finish_cache(textfile, embfile)
        pairs.append((existing_file(textfile, "cache text"),
                      existing_file(embfile, "cache embeddings")))
    return pairs


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


def read_text(path, kind):
    """A UTF-8 text file, without the byte order mark that editors on Windows write.

    kind: what the file is, for messages. Raises InputError where it is missing or not UTF-8.
    """
    try:
        return existing_file(path, kind).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the {kind} {path} is not UTF-8 text") from error


def one_line(text, path, most=LONGEST_TEXT):
    """A text of the file path with each run of white space as one space, fit for a tokenizer.

    Raises InputError where it has more than `most` characters, for which tokenizers would take
    minutes and gigabytes, and AttributeError where it is not a string.
    """
    text = " ".join(text.split())
    if len(text) > most:
        raise InputError(f"{path} holds a text of {len(text):,} characters ({text[:40]!r}...); "
                         f"{most:,} are read at most")
    return text.encode(errors="replace").decode()  # JSON can hold half a surrogate pair


def read_lines(path, kind, most=LONGEST_TEXT):
    """The lines of a text file that are not blank, as one_line returns them.

    kind: what the file is, for messages. Raises InputError as read_text and one_line do.
    """
    lines = read_text(path, kind).split("\n")
    return [one_line(line, path, most) for line in lines if line.strip()]


def read_words(path):
    """The lines of a list of words, see read_lines. Raises InputError where there is none."""
    words = read_lines(path, "list of words")
    if not words:
        raise InputError(f"there is no word in {path}")
    return words
