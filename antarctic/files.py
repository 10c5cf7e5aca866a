"""Files that are never half-written, locks, and texts that are read with bounds."""

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

# characters of an entry or a caption, of which the models read 128 tokens at most
LONGEST_TEXT = 10_000

TEXT = {"encoding": "utf-8", "newline": "\n",
        "errors": "backslashreplace"}  # errors: file names that are no UTF-8


@contextmanager
def writing(path):
    """Around what writes the file path. Raises InputError, which names it: the disk is full, the
    folder may only be read."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename and Path(path).name not in str(
                error.filename):  # of a file read meanwhile
            raise
        raise InputError(
            f"cannot write {path} ({error.strerror}); finished files are whole, so once that is "
            "mended the same "
            f"command goes on") from error


@contextmanager
def atomic(path, mode="w"):
    """Opens a temporary file beside path and renames it to path at the end, so that path is never
    half-written.

    mode: "w" (UTF-8 text) or "wb". If the body raises, path stays as it was. Raises InputError
    where the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, mode, **({} if "b" in mode else TEXT)) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def append(path, data):
    """Adds bytes to a file that grows as a run goes on; they are on the disk when this returns.
    Raises InputError."""
    with writing(path), open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def locked(path):
    """Holds a file as the mark that this run alone writes what it stands for, until the body ends;
    all processes call this.

    The lock is the system's (flock), which frees it when its process dies, by SIGKILL too; the file
    says who that is. What a dead one left half-written beside it is removed. Raises InputError
    where another run holds it.
    """
    path, files = Path(path), []

    def take():
        while True:
            file = open(path, "a+")
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise InputError(
                    f"another run is writing to {path.parent}: "
                    f"{file.read() or 'it has just begun'}; wait until it "
                    f"ends, or give another folder or file") from error
            except OSError:  # a file system that knows no locks
                pass
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()),
                                    path.stat()):  # else its holder has just removed it
                    break
        files.append(file)
        file.seek(0)
        for dead in file.read().split()[1:2]:
            for left in path.parent.glob(f".*.{dead}.tmp"):
                left.unlink(missing_ok=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()

    def take_named():
        with writing(path):
            take()

    on_rank0(take_named)
    try:
        yield
    finally:
        for file in files:
            path.unlink(missing_ok=True)
            file.close()


def staging_path(path):
    """Where a cache's file waits until all of them are written."""
    return Path(path).with_name(f".{Path(path).name}.new")


def finish_cache(textfile, embfile):
    """Moves the files that write_cache staged into place, also those of a run that was killed
    there.

    The description is staged last: where it is, all are whole. So text and embeddings are never out
    of step.
    """
    files = textfile, embfile, f"{embfile}.json"
    if staging_path(files[-1]).is_file():
        for path in files:
            with writing(path), suppress(FileNotFoundError):  # moved before
                os.replace(staging_path(path), path)


def existing_caches(textfiles, embfiles):
    """Pairs of paths (text, embeddings), after a look whether they are there. Raises InputError."""
    if len(textfiles) != len(embfiles):
        raise InputError(
            f"got {len(textfiles)} --textfile but {len(embfiles)} --embfile; they go in pairs")
    pairs = []
    for textfile, embfile in zip(textfiles, embfiles):
        finish_cache(textfile, embfile)
        pairs.append((existing_file(textfile,
                                    "cache text"), existing_file(embfile, "cache embeddings")))
    return pairs


def write_lines(path, lines):
    """One text a line; line breaks inside a text become spaces, so that line i stays text i."""
    with atomic(path) as file:
        file.writelines(" ".join(line.split()) + "\n" for line in lines)


def write_json(path, data, indent=None):
    with atomic(path) as file:
        json.dump(data, file, ensure_ascii=False, indent=indent)
        file.write("\n")


def output_folder(path):
    """Makes a folder and proves that it can be written to, before hours of work go into it. Raises
    InputError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to the folder {path} ({error.strerror})") from error
    return path


def existing_file(path, what):
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no {what} at {path}")
    return path


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(settings):
    """16 hexadecimal digits that name a run by everything that decides its results: two runs share
    their unfinished work only if these are equal. settings: whatever JSON can hold."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def read_text(path, what):
    """A UTF-8 text file as it is, but for the mark that editors on Windows set first. Raises
    InputError."""
    try:
        return existing_file(path, what).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the {what} {path} is not UTF-8 text") from error


def one_line(text, path, most=LONGEST_TEXT):
    """A text of a file with its white space made single, fit for a tokenizer. Raises InputError
    where it is longer than any entry or caption, which tokenizers would take minutes and gigabytes
    for; AttributeError where it is no text."""
    text = " ".join(text.split())
    if len(text) > most:
        raise InputError(
            f"{path} holds a text of {len(text):,} characters ({text[:40]!r}...); {most:,} are "
            "read at most"
        )
    return text.encode(errors="replace").decode()  # JSON can hold half a character


def read_lines(path, what, most=LONGEST_TEXT):
    """Lines of a text file, white space made single, without blank ones. Raises InputError, also
    for one of more than most characters."""
    return [
        one_line(line, path, most) for line in read_text(path, what).split("\n") if line.strip()
    ]
